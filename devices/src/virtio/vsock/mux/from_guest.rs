//! The transmit queue: packets from the guest, acted on.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::table::Key;
use super::{MAX_RESETS, Mux, Reset, VsockQueue};
use crate::virtio::vsock::HOST_CID;
use crate::virtio::vsock::asked::{Asked, Request};
use crate::virtio::vsock::connection::{Connection, State, Violation};
use crate::virtio::vsock::counters::Counters;
use crate::virtio::vsock::handle::ConnectError;
use crate::virtio::vsock::packet::{
    Header, TxPacket, VIRTIO_VSOCK_OP_CREDIT_REQUEST, VIRTIO_VSOCK_OP_CREDIT_UPDATE,
    VIRTIO_VSOCK_OP_REQUEST, VIRTIO_VSOCK_OP_RESPONSE, VIRTIO_VSOCK_OP_RST, VIRTIO_VSOCK_OP_RW,
    VIRTIO_VSOCK_OP_SHUTDOWN, VIRTIO_VSOCK_TYPE_STREAM, pop,
};
use crate::virtio::vsock::stream::HostStream;

/// Packets taken before the receive queue gets its turn.
const BUDGET: usize = 256;

/// Why no more packets were taken from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TxEnd {
    /// There are none; the driver will notify of the next.
    Empty,
    /// It is the receive queue's turn.
    Budget,
    /// The guest has to take [`MAX_RESETS`] resets first.
    TooManyResets,
}

impl Mux {
    /// Acts on packets that the guest has queued.
    pub(super) fn drain_guest(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &mut Queue,
        notify: &mut impl FnMut(VsockQueue),
    ) -> Result<TxEnd, virtio_queue::Error> {
        let mut packet = TxPacket::default();
        let mut used = 0;
        queue.disable_notification(memory)?;
        let end = loop {
            if self.resets.len() >= MAX_RESETS {
                break TxEnd::TooManyResets;
            }
            if used == BUDGET {
                break TxEnd::Budget;
            }
            let Some(chain) = pop(queue, memory)? else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                break TxEnd::Empty;
            };
            let head = chain.head_index();
            if packet.read(chain, memory) {
                self.packet(&packet);
            } else {
                Counters::add(&self.counters.dropped_packets, 1);
            }
            queue.add_used(memory, head, 0)?;
            used += 1;
        };
        if used > 0 {
            Counters::add(&self.counters.tx_packets, used as u64);
            if queue.needs_notification(memory)? {
                notify(VsockQueue::Tx);
            }
        }
        Ok(end)
    }

    fn packet(&mut self, packet: &TxPacket<'_>) {
        let header = &packet.header;
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            Counters::add(&self.counters.dropped_packets, 1);
            return;
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        if header.socket_type != VIRTIO_VSOCK_TYPE_STREAM {
            return self.refuse(key, header);
        }
        match self.table.find(key) {
            Some(index) => self.packet_for(index, packet),
            None if header.op == VIRTIO_VSOCK_OP_REQUEST => self.accept(key, header),
            None => self.refuse(key, header),
        }
    }

    /// Answers a packet that belongs to no connection. A reset is never answered.
    fn refuse(&mut self, key: Key, header: &Header) {
        if header.op == VIRTIO_VSOCK_OP_RST {
            return;
        }
        if header.op == VIRTIO_VSOCK_OP_REQUEST {
            Counters::add(&self.counters.refused, 1);
        }
        self.resets.push_back(Reset {
            key,
            socket_type: header.socket_type,
        });
    }

    fn packet_for(&mut self, index: usize, packet: &TxPacket<'_>) {
        let header = &packet.header;
        let Some(connection) = self.table.get_mut(index) else {
            return;
        };
        connection.peer_says(header.buf_alloc, header.fwd_cnt);
        let connecting = matches!(connection.state, State::Connecting(_));
        let result = match header.op {
            VIRTIO_VSOCK_OP_RST => return self.reset_by_guest(index),
            VIRTIO_VSOCK_OP_RESPONSE => {
                let accepted = connection.accepted();
                self.asking.note_answer();
                self.answered(index);
                accepted
            }
            // The guest has not accepted, or thinks that this connection does not exist.
            _ if connecting => Err(Violation),
            VIRTIO_VSOCK_OP_RW => {
                Counters::add(&self.counters.tx_bytes, header.len.into());
                let received = connection.receive(&packet.data);
                self.grow(index);
                received
            }
            VIRTIO_VSOCK_OP_SHUTDOWN => {
                if connection.shut_by_guest(header.flags) {
                    // The guest closed its socket: the reset is what it waits for.
                    return self.abort(index);
                }
                Ok(())
            }
            VIRTIO_VSOCK_OP_CREDIT_UPDATE => Ok(()),
            VIRTIO_VSOCK_OP_CREDIT_REQUEST => {
                connection.credit_wanted();
                Ok(())
            }
            // A second request, or no operation of the specification.
            _ => Err(Violation),
        };
        match result {
            Ok(()) => self.schedule(index),
            Err(Violation) => self.abort(index),
        }
    }

    fn reset_by_guest(&mut self, index: usize) {
        if let Some(connection) = self.table.get_mut(index)
            && matches!(connection.state, State::Connecting(_))
            && let State::Connecting(completion) =
                std::mem::replace(&mut connection.state, State::Lingering)
        {
            Counters::add(&self.counters.refused, 1);
            self.asking.note_answer();
            completion.complete(Err(ConnectError::Refused));
        }
        self.close(index);
    }

    fn accept(&mut self, key: Key, header: &Header) {
        // A service that was registered before the guest asked is found, whatever woke this thread.
        self.take_commands();
        let request = Request::new(key, header);
        if self.table.len() >= self.max_connections {
            return self.answer(&request, None);
        }
        if let Some(service) = self.services.get_mut(&key.host_port) {
            let stream = match UnixStream::pair() {
                Ok((ours, theirs)) => {
                    service(theirs);
                    Some(ours.into())
                }
                Err(error) => {
                    let port = key.host_port;
                    tracing::warn!("no stream could be made for vsock port {port}: {error}");
                    None
                }
            };
            return self.answer(&request, stream);
        }
        match &mut self.fallback {
            Some((fallback, handle)) => fallback(Asked::new(request, handle.clone())),
            None => self.answer(&request, None),
        }
    }

    /// Answers a guest that asked for a connection: with one to `stream`, or a reset.
    pub(super) fn answer(&mut self, request: &Request, stream: Option<OwnedFd>) {
        let key = request.key;
        let free = self.table.find(key).is_none() && self.table.len() < self.max_connections;
        let stream = stream.filter(|_| free);
        let added = stream
            .and_then(|socket| HostStream::new(socket).ok())
            .and_then(|stream| {
                let mut connection = Connection::incoming(key, stream, self.buf_alloc());
                connection.peer_says(request.buf_alloc, request.fwd_cnt);
                self.add(connection)
            });
        if added.is_none() {
            Counters::add(&self.counters.refused, 1);
            self.resets.push_back(Reset {
                key,
                socket_type: request.socket_type,
            });
        }
    }
}
