//! The thread behind one queue: takes chains off the ring, and puts them back when they are done.
//!
//! Knows the ring and nothing of disks. Each wake-up does a bounded amount of work, at most one
//! ring full, so that a guest that never stops submitting cannot keep the thread from being
//! stopped; what is left makes it wake up again.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::inflight::InFlight;
use crate::interrupt::Interrupt;
use crate::virtio::ActiveQueue;

/// How long to wait when the kernel has no memory for a submission.
const BACK_OFF: Duration = Duration::from_millis(1);

/// Owns a ring and what came out of it.
pub struct QueueWorker {
    in_flight: InFlight,
    queue: Queue,
    kick: EventFd,
    memory: GuestMemoryMmap,
    interrupt: Arc<Interrupt>,
    /// The ring cannot be right: it is left alone until reset.
    broken: bool,
}

impl QueueWorker {
    /// A worker for a queue that was checked by the transport.
    pub fn new(
        active: ActiveQueue,
        memory: GuestMemoryMmap,
        interrupt: Arc<Interrupt>,
        in_flight: InFlight,
    ) -> Self {
        Self {
            in_flight,
            queue: active.queue,
            kick: active.kick,
            memory,
            interrupt,
            broken: false,
        }
    }

    fn pass(&mut self) -> Result<(), Error> {
        self.queue.disable_notification(&self.memory)?;
        self.in_flight.reap();
        self.take_chains()?;
        self.submit();
        // What the page cache answered has ended by now: same batch, same interrupt.
        self.in_flight.reap();
        self.submit();
        self.give_back()?;
        // Without room the next completion leads back here.
        if self.in_flight.has_room() && self.queue.enable_notification(&self.memory)? {
            self.wake_again();
        }
        Ok(())
    }

    /// Begins what the driver made available, as far as there is room.
    fn take_chains(&mut self) -> Result<(), Error> {
        if !self.in_flight.has_room() {
            return Ok(());
        }
        let mut chains = self.queue.iter(&self.memory)?;
        // Bounded: the iterator ends at the index that was read when it was made.
        while self.in_flight.has_room() {
            let Some(chain) = chains.next() else {
                break;
            };
            self.in_flight.begin(chain);
        }
        Ok(())
    }

    fn give_back(&mut self) -> Result<(), Error> {
        let finished = self.in_flight.finished();
        if finished.is_empty() {
            return Ok(());
        }
        for chain in finished.drain(..) {
            self.queue.add_used(&self.memory, chain.head, chain.len)?;
        }
        if self.queue.needs_notification(&self.memory)? {
            self.interrupt.signal_queue();
        }
        Ok(())
    }

    fn submit(&mut self) {
        if let Err(error) = self.in_flight.submit() {
            tracing::warn!("disk I/O could not be submitted, trying again: {error}");
            thread::sleep(BACK_OFF);
            self.wake_again();
        }
    }

    fn wake_again(&self) {
        // Fails only on an overflowing counter: then the worker will wake up anyway.
        let _ = self.kick.write(1);
    }
}

impl MutEventSubscriber for QueueWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let completions = self.in_flight.completion_fd();
        let watched = ops
            .add(Events::new(&self.kick, EventSet::IN))
            .and_then(|()| ops.add(Events::new(&completions, EventSet::IN)));
        if let Err(error) = watched {
            tracing::error!("a block queue cannot be watched: {error}");
            self.interrupt.signal_needs_reset();
        }
    }

    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        // Fails where the wake-up came from a completion.
        let _ = self.kick.read();
        if self.broken {
            self.in_flight.reap();
            self.in_flight.finished().clear();
            return;
        }
        if let Err(error) = self.pass() {
            tracing::warn!("a block queue's ring is broken: {error}");
            self.broken = true;
            self.interrupt.signal_needs_reset();
            if let Err(error) = ops.remove(Events::new(&self.kick, EventSet::IN)) {
                tracing::error!("a broken block queue is still watched: {error}");
            }
        }
    }
}
