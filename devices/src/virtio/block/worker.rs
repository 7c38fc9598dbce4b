//! The thread behind one queue: takes chains off the ring, and puts them back when they are done.
//!
//! Knows the ring and nothing of disks. Each wake-up does a bounded amount of work, at most one
//! ring full, so that a guest that never stops submitting cannot keep the thread from being
//! stopped; what is left makes it wake up again.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestMemoryMmap;

use super::QUEUE_SIZE;
use super::inflight::InFlight;
use crate::interrupt::Interrupt;
use crate::virtio::ring::Ring;

/// How long to wait when the kernel has no memory for a submission.
const BACK_OFF: Duration = Duration::from_millis(1);

/// Owns a ring and what came out of it.
pub struct QueueWorker {
    in_flight: InFlight,
    ring: Ring,
    memory: GuestMemoryMmap,
    interrupt: Arc<Interrupt>,
}

impl QueueWorker {
    /// A worker for a queue that was checked by the transport.
    pub fn new(
        ring: Ring,
        memory: GuestMemoryMmap,
        interrupt: Arc<Interrupt>,
        in_flight: InFlight,
    ) -> Self {
        Self {
            in_flight,
            ring,
            memory,
            interrupt,
        }
    }

    /// Begins what the driver made available, as far as there is room; true where nothing is left
    /// and the driver will kick for the next.
    fn take_chains(&mut self) -> bool {
        for _ in 0..QUEUE_SIZE {
            if !self.in_flight.has_room() {
                return false;
            }
            let Some(chain) = self.ring.pop(&self.memory) else {
                return true;
            };
            self.in_flight.begin(chain);
        }
        false
    }

    fn give_back(&mut self) {
        let finished = self.in_flight.finished();
        if finished.is_empty() {
            return;
        }
        for chain in finished.drain(..) {
            self.ring.add_used(&self.memory, chain.head, chain.len);
        }
        self.ring.signal(&self.memory);
    }

    fn submit(&mut self) {
        if let Err(error) = self.in_flight.submit() {
            tracing::warn!("disk I/O could not be submitted, trying again: {error}");
            thread::sleep(BACK_OFF);
            self.ring.rekick();
        }
    }
}

impl MutEventSubscriber for QueueWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let completions = self.in_flight.completion_fd();
        let watched = ops
            .add(Events::new(self.ring.kick(), EventSet::IN))
            .and_then(|()| ops.add(Events::new(&completions, EventSet::IN)));
        if let Err(error) = watched {
            tracing::error!("a block queue cannot be watched: {error}");
            self.interrupt.signal_needs_reset();
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.ring.take_kick();
        self.in_flight.reap();
        let drained = self.take_chains();
        self.submit();
        // What the page cache answered has ended by now: same batch, same interrupt.
        self.in_flight.reap();
        self.submit();
        self.give_back();
        // Without room the next completion leads back here.
        if !drained && self.in_flight.has_room() {
            self.ring.rekick();
        }
    }
}
