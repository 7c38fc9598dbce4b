//! The receive queue: packets for the guest, each connection in its turn.

use std::io::ErrorKind;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::{Mux, VsockQueue};
use crate::virtio::vsock::connection::Connection;
use crate::virtio::vsock::counters::Counters;
use crate::virtio::vsock::packet::{
    Added, RxBatch, VIRTIO_VSOCK_OP_CREDIT_UPDATE, VIRTIO_VSOCK_OP_RW,
};

/// Buffers used, and turns given, before the transmit queue gets its turn.
const BUDGET: usize = 1024;
/// Buffers used before the driver is notified, so that the guest takes them while more are filled.
const NOTIFY_AFTER: usize = 16;
/// Buffers that one read of a host stream may fill.
const BATCH_BUFFERS: usize = 64;
/// Pieces of memory that one read may fill. One more buffer adds at most 256, and the kernel
/// takes 1,024.
const BATCH_PIECES: usize = 512;

/// Why nothing more was sent to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RxEnd {
    /// There is nothing to send.
    Idle,
    /// The driver gave no buffers; it will notify of the next.
    NoBuffers,
    /// It is the transmit queue's turn.
    Budget,
}

/// What came of one connection's turn.
enum Served {
    /// It may have more to send.
    Again,
    /// It could not send for want of a buffer.
    NoBuffers,
    /// The host stream broke.
    Broken,
    /// The guest has to answer the packet in time.
    Owed,
}

/// The receive queue during one round.
struct Rx<'m, 'q> {
    memory: &'m GuestMemoryMmap,
    queue: &'q mut Queue,
    batch: RxBatch<'m>,
    /// Buffers used of which the driver has not been notified.
    used: usize,
    budget: usize,
}

impl<'m> Rx<'m, '_> {
    /// Gathers buffers for `bytes` of data (0: one buffer for a packet without); false where the
    /// driver has given none.
    fn gather(&mut self, bytes: usize) -> Result<bool, virtio_queue::Error> {
        self.batch.clear();
        while self.batch.len() < BATCH_BUFFERS && self.batch.pieces() < BATCH_PIECES {
            match self.batch.add(self.queue, self.memory)? {
                Added::Yes if self.batch.capacity() >= bytes => break,
                Added::Yes => {}
                Added::Malformed => {
                    self.used += 1;
                    self.budget = self.budget.saturating_sub(1);
                }
                Added::Empty => break,
            }
        }
        Ok(self.batch.len() > 0)
    }

    /// Notifies the driver of what was used, unless it said that it need not know.
    fn notify(&mut self, notify: &mut impl FnMut(VsockQueue)) -> Result<(), virtio_queue::Error> {
        if std::mem::take(&mut self.used) > 0 && self.queue.needs_notification(self.memory)? {
            notify(VsockQueue::Rx);
        }
        Ok(())
    }

    /// Sends the gathered buffers' packets.
    fn send(
        &mut self,
        header: super::super::packet::Header,
        bytes: usize,
        counters: &Counters,
    ) -> Result<(), virtio_queue::Error> {
        let packets = self.batch.commit(self.queue, self.memory, header, bytes)?;
        self.used += packets;
        self.budget = self.budget.saturating_sub(packets);
        Counters::add(&counters.rx_packets, packets as u64);
        Counters::add(&counters.rx_bytes, bytes as u64);
        Ok(())
    }
}

impl Mux {
    /// Sends what there is to send to the guest, as far as it gave buffers.
    pub(super) fn feed_guest(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &mut Queue,
        notify: &mut impl FnMut(VsockQueue),
    ) -> Result<RxEnd, virtio_queue::Error> {
        queue.disable_notification(memory)?;
        let mut rx = Rx {
            memory,
            queue,
            batch: RxBatch::default(),
            used: 0,
            budget: BUDGET,
        };
        let end = self.feed(&mut rx, notify)?;
        rx.notify(notify)?;
        Ok(end)
    }

    fn feed(
        &mut self,
        rx: &mut Rx<'_, '_>,
        notify: &mut impl FnMut(VsockQueue),
    ) -> Result<RxEnd, virtio_queue::Error> {
        while rx.budget > 0 {
            rx.budget -= 1;
            if rx.used >= NOTIFY_AFTER {
                rx.notify(notify)?;
            }
            let sent = if let Some(reset) = self.resets.front().copied() {
                let room = rx.gather(0)?;
                if room {
                    rx.send(self.reset_header(reset), 0, &self.counters)?;
                    self.resets.pop_front();
                }
                room
            } else if let Some(index) = self.runnable.pop_front() {
                self.give_turn(index, rx)?
            } else {
                return Ok(RxEnd::Idle);
            };
            if !sent && !rx.queue.enable_notification(rx.memory)? {
                return Ok(RxEnd::NoBuffers);
            }
        }
        Ok(RxEnd::Budget)
    }

    /// Lets the connection in a slot send; false where there is no buffer for it.
    fn give_turn(
        &mut self,
        index: usize,
        rx: &mut Rx<'_, '_>,
    ) -> Result<bool, virtio_queue::Error> {
        self.table.set_queued(index, false);
        let Some(connection) = self.table.get_mut(index) else {
            return Ok(true);
        };
        match serve(connection, self.guest_cid, rx, &self.counters)? {
            Served::Again => self.schedule(index),
            Served::Broken => self.abort(index),
            Served::Owed => {
                self.set_deadline(index);
                self.schedule(index);
            }
            Served::NoBuffers => {
                self.table.set_queued(index, true);
                self.runnable.push_front(index);
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn serve(
    connection: &mut Connection,
    guest_cid: u64,
    rx: &mut Rx<'_, '_>,
    counters: &Counters,
) -> Result<Served, virtio_queue::Error> {
    if let Some(op) = connection.next_op() {
        if !rx.gather(0)? {
            return Ok(Served::NoBuffers);
        }
        rx.send(connection.header(guest_cid, op), 0, counters)?;
        return Ok(if connection.told(op) {
            Served::Owed
        } else {
            Served::Again
        });
    }
    if !connection.can_read() {
        return Ok(Served::Again);
    }
    if !rx.gather(connection.read_limit())? {
        return Ok(Served::NoBuffers);
    }
    let limit = connection.read_limit().min(rx.batch.capacity());
    if limit == 0 {
        // Buffers with room for a header only: use one up for news of our credit.
        rx.send(
            connection.header(guest_cid, VIRTIO_VSOCK_OP_CREDIT_UPDATE),
            0,
            counters,
        )?;
        return Ok(Served::Again);
    }
    match connection.stream.read(rx.batch.data(limit)) {
        Ok(0) => {
            rx.batch.cancel(rx.queue);
            connection.host_ended();
            if connection.is_cut_off() {
                return Ok(Served::Broken);
            }
        }
        Ok(bytes) => {
            rx.send(
                connection.header(guest_cid, VIRTIO_VSOCK_OP_RW),
                bytes,
                counters,
            )?;
            connection.told(VIRTIO_VSOCK_OP_RW);
            connection.sent(bytes, limit);
        }
        Err(error) => {
            rx.batch.cancel(rx.queue);
            if error.kind() != ErrorKind::WouldBlock {
                return Ok(Served::Broken);
            }
        }
    }
    Ok(Served::Again)
}
