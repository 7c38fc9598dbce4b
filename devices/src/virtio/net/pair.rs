//! The worker of one pair of queues: frames both ways between the guest and one queue of the TAP.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::rx::{Pause, Receiver};
use super::tap::{HEADER_LEN, Tap};
use super::{MAX_FRAME, NetCounters, would_block};
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
    tap_watched: bool,
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
            tap_watched: false,
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
        self.watch_tap(tap, watch, ops);
    }

    fn watch_tap(&mut self, tap: &File, watch: bool, ops: &mut EventOps) {
        if watch == self.tap_watched {
            return;
        }
        let events = Events::with_data(tap, TAP, EventSet::IN);
        let done = match watch {
            true => ops.add(events),
            false => ops.remove(events),
        };
        match done {
            Ok(()) => self.tap_watched = watch,
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
            TX_KICK => {
                if let Some(tap) = self.tap.queue(self.index) {
                    self.sender.send(tap);
                }
            }
            ATTACHED => {
                // Fails only when nothing is there to be read.
                let _ = self.attached.read();
                self.receive(ops);
            }
            _ => self.receive(ops),
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
    counters: Arc<NetCounters>,
}

impl Sender {
    pub(super) fn new(ring: Ring, memory: GuestMemoryMmap, counters: Arc<NetCounters>) -> Self {
        Self {
            ring,
            buffers: ChainBuffers::new(memory.clone()),
            memory,
            counters,
        }
    }

    /// Moves frames from the guest to `tap`, up to [`BATCH`].
    ///
    /// What the host does not take is dropped, as a cable would: a TAP refuses only malformed
    /// headers, and everything while the interface is down.
    fn send(&mut self, tap: &File) {
        self.ring.take_kick();
        let mut left = BATCH;
        while let Some(chain) = self.ring.pop(&self.memory) {
            let head = chain.head_index();
            let sent = match self.buffers.load(chain) {
                Ok(()) => write_frame(tap, self.buffers.readable()),
                Err(_) => None,
            };
            match sent {
                Some(bytes) => {
                    self.counters.tx_frames.fetch_add(1, Ordering::Relaxed);
                    self.counters.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
                }
                None => {
                    self.counters.tx_dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
            self.ring.add_used(&self.memory, head, 0);
            left -= 1;
            if left == 0 {
                self.ring.rekick();
                break;
            }
        }
        self.ring.signal(&self.memory);
    }
}

/// Writes one frame with its header; gives its bytes without, or None where it was not taken.
fn write_frame(tap: &File, frame: &Iovecs) -> Option<u64> {
    if !(HEADER_LEN + 1..=MAX_FRAME).contains(&frame.len()) {
        return None;
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
            return Some((frame.len() - HEADER_LEN) as u64);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            if !would_block(&error) {
                tracing::trace!("the host did not take a frame: {error}");
            }
            return None;
        }
    }
}
