//! The worker of one pair of queues: frames both ways between the guest and one queue of the TAP.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::rx::{Pause, Receiver};
use super::tap::{HEADER_LEN, Tap};
use super::{MAX_FRAME, NetCounters};
use crate::counter;
use crate::virtio::queue::{ChainBuffers, Iovecs};
use crate::virtio::ring::Ring;

/// Frames that are sent before the worker looks at its other events.
const BATCH: usize = 64;

const RX_KICK: u32 = 0;
const TX_KICK: u32 = 1;
const TAP: u32 = 2;
const ATTACHED: u32 = 3;

/// Owns a receive and a transmit queue, and one queue of the TAP.
#[derive(Debug)]
pub(super) struct PairWorker {
    index: usize,
    tap: Arc<Tap>,
    tap_watched: EventSet,
    receiver: Receiver,
    sender: Sender,
    /// Written when the host may send on this queue again.
    attached: EventFd,
}

impl PairWorker {
    pub(super) fn new(
        index: usize,
        tap: Arc<Tap>,
        receiver: Receiver,
        sender: Sender,
        attached: EventFd,
    ) -> Self {
        Self {
            index,
            tap,
            tap_watched: EventSet::empty(),
            receiver,
            sender,
            attached,
        }
    }

    /// Receives, and watches the TAP exactly while a frame from it would find a buffer.
    fn receive(&mut self, ops: &mut EventOps) {
        let tap = self.tap.clone();
        let Some(tap) = tap.queue(self.index) else {
            return;
        };
        let watch = match self.receiver.receive(tap) {
            Pause::NoFrame | Pause::Batch => true,
            Pause::NoBuffer | Pause::Detached => false,
        };
        self.watch_tap(tap, EventSet::IN, watch, ops);
    }

    /// Sends, and watches the TAP exactly while a frame waits for room in it.
    fn send(&mut self, ops: &mut EventOps) {
        let tap = self.tap.clone();
        let Some(tap) = tap.queue(self.index) else {
            return;
        };
        let full = self.sender.send(tap);
        self.watch_tap(tap, EventSet::OUT, full, ops);
    }

    fn watch_tap(&mut self, tap: &File, what: EventSet, watch: bool, ops: &mut EventOps) {
        let mut wanted = self.tap_watched;
        wanted.set(what, watch);
        if wanted == self.tap_watched {
            return;
        }
        let events = Events::with_data(tap, TAP, wanted);
        let done = if self.tap_watched.is_empty() {
            ops.add(events)
        } else if wanted.is_empty() {
            ops.remove(events)
        } else {
            ops.modify(events)
        };
        match done {
            Ok(()) => self.tap_watched = wanted,
            Err(error) => tracing::error!("a network queue cannot watch its interface: {error}"),
        }
    }
}

impl MutEventSubscriber for PairWorker {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            RX_KICK => {
                self.receiver.ring().take_kick();
                self.receive(ops);
            }
            TX_KICK => self.send(ops),
            ATTACHED => {
                // Fails only when nothing is there to be read.
                let _ = self.attached.read();
                self.receive(ops);
            }
            _ => {
                if self.tap_watched.contains(EventSet::OUT) {
                    self.send(ops);
                }
                // Also where the TAP is in error, which is told without being asked for.
                if self.tap_watched.contains(EventSet::IN) {
                    self.receive(ops);
                }
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let watched = [
            (self.receiver.ring().kick(), RX_KICK),
            (self.sender.ring.kick(), TX_KICK),
            (&self.attached, ATTACHED),
        ];
        for (event, data) in watched {
            if let Err(error) = ops.add(Events::with_data(event, data, EventSet::IN)) {
                tracing::error!("a network queue cannot watch its events: {error}");
            }
        }
        self.receive(ops);
    }
}

/// Owns a transmit queue.
#[derive(Debug)]
pub(super) struct Sender {
    ring: Ring,
    memory: GuestMemoryMmap,
    buffers: ChainBuffers,
    /// The chain whose frame is in `buffers` and waits for room in the TAP.
    waiting: Option<u16>,
    counters: Arc<NetCounters>,
}

/// What became of a frame.
enum Sent {
    /// The host has it: its bytes without the header.
    Bytes(u64),
    /// The host has no room for it now.
    Full,
    /// The host will never take it.
    Dropped,
}

impl Sender {
    pub(super) fn new(ring: Ring, memory: GuestMemoryMmap, counters: Arc<NetCounters>) -> Self {
        Self {
            ring,
            buffers: ChainBuffers::new(memory.clone()),
            memory,
            waiting: None,
            counters,
        }
    }

    /// Moves frames from the guest to `tap`, up to [`BATCH`]; true where the next one waits for
    /// room in it.
    fn send(&mut self, tap: &File) -> bool {
        self.ring.take_kick();
        let full = self.send_batch(tap);
        self.ring.signal(&self.memory);
        full
    }

    /// What the host does not take is dropped, as a cable would: a TAP refuses only malformed
    /// headers, and everything while the interface is down.
    fn send_batch(&mut self, tap: &File) -> bool {
        for _ in 0..BATCH {
            let Some((head, sent)) = self.send_next(tap) else {
                return false;
            };
            match sent {
                Sent::Bytes(bytes) => {
                    counter::add(&self.counters.tx_frames, 1);
                    counter::add(&self.counters.tx_bytes, bytes);
                }
                Sent::Full => {
                    self.waiting = Some(head);
                    return true;
                }
                Sent::Dropped => {
                    counter::add(&self.counters.tx_dropped, 1);
                }
            }
            self.ring.add_used(&self.memory, head, 0);
        }
        self.ring.rekick();
        false
    }

    /// Sends the frame that waits, or the ring's next; None where there is neither.
    fn send_next(&mut self, tap: &File) -> Option<(u16, Sent)> {
        if let Some(head) = self.waiting.take() {
            return Some((head, write_frame(tap, self.buffers.readable())));
        }
        let chain = self.ring.pop(&self.memory)?;
        let head = chain.head_index();
        let sent = match self.buffers.load(chain) {
            Ok(()) => write_frame(tap, self.buffers.readable()),
            Err(_) => Sent::Dropped,
        };
        Some((head, sent))
    }
}

/// Writes one frame with its header.
fn write_frame(tap: &File, frame: &Iovecs) -> Sent {
    if !(HEADER_LEN + 1..=MAX_FRAME).contains(&frame.len()) {
        return Sent::Dropped;
    }
    let pieces = frame.as_slice();
    loop {
        // SAFETY: the pieces are checked guest memory that `frame`'s owner keeps mapped, and there
        // are at most MAX_SEGMENTS of them. The kernel only reads them.
        let written = unsafe {
            libc::writev(
                tap.as_raw_fd(),
                pieces.as_ptr(),
                pieces.len() as libc::c_int,
            )
        };
        if written >= 0 {
            return Sent::Bytes((frame.len() - HEADER_LEN) as u64);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Sent::Full,
            _ => {
                tracing::trace!("the host did not take a frame: {error}");
                return Sent::Dropped;
            }
        }
    }
}
