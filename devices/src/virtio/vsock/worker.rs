//! The thread behind an active vsock device: it owns the queues and the connections.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestMemoryMmap;

use super::Mux;
use crate::interrupt::Interrupt;
use crate::virtio::{ActivateError, Activation, ActiveQueue};

const RX_QUEUE: usize = 0;
const TX_QUEUE: usize = 1;

/// What the worker thread owns.
pub(super) struct VsockWorker {
    mux: Box<Mux>,
    memory: GuestMemoryMmap,
    rx: ActiveQueue,
    tx: ActiveQueue,
    /// The event queue's only event is a transport reset after a migration: there is none here.
    _event: Option<ActiveQueue>,
    interrupt: Arc<Interrupt>,
    broken: bool,
}

impl VsockWorker {
    /// Joins a mux to queues; gives it back where one of them is missing.
    pub fn new(mux: Box<Mux>, activation: Activation) -> Result<Self, (Box<Mux>, ActivateError)> {
        let mut queues = activation.queues.into_iter();
        let mut usable = |index| {
            queues
                .next()
                .filter(|queue| virtio_queue::QueueT::ready(&queue.queue))
                .ok_or(ActivateError::QueueMissing(index))
        };
        let queues = usable(RX_QUEUE).and_then(|rx| Ok((rx, usable(TX_QUEUE)?)));
        let (rx, tx) = match queues {
            Ok(queues) => queues,
            Err(error) => return Err((mux, error)),
        };
        Ok(Self {
            mux,
            memory: activation.memory,
            rx,
            tx,
            _event: usable(2).ok(),
            interrupt: activation.interrupt,
            broken: false,
        })
    }

    /// Takes what the guest had sent before the reset, and gives the mux back for the next
    /// activation.
    pub fn finish(mut self) -> Box<Mux> {
        if !self.broken {
            self.mux.finish(&self.memory, &mut self.tx.queue);
        }
        self.mux
    }

    fn turn(&mut self, ops: &mut EventOps) {
        if self.broken {
            return;
        }
        let interrupt = &self.interrupt;
        let result = self
            .mux
            .turn(&self.memory, &mut self.rx.queue, &mut self.tx.queue, |_| {
                interrupt.signal_queue()
            });
        if let Err(error) = result {
            tracing::warn!("the vsock device waits for a reset, as a ring is broken: {error}");
            self.broken = true;
            self.interrupt.signal_needs_reset();
            for fd in [
                self.mux.as_raw_fd(),
                self.rx.kick.as_raw_fd(),
                self.tx.kick.as_raw_fd(),
            ] {
                let events = Events::new_raw(fd, EventSet::IN);
                if let Err(error) = ops.remove(events) {
                    tracing::error!("the vsock worker still watches a descriptor: {error}");
                }
            }
        }
    }
}

impl MutEventSubscriber for VsockWorker {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.mux.as_raw_fd() && !self.broken {
            self.mux.look_at_host();
        }
        self.turn(ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        // Every write to a kick is an edge, so that kicks need not be read.
        let kick = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (fd, events) in [
            (self.mux.as_raw_fd(), EventSet::IN),
            (self.rx.kick.as_raw_fd(), kick),
            (self.tx.kick.as_raw_fd(), kick),
        ] {
            if let Err(error) = ops.add(Events::new_raw(fd, events)) {
                tracing::error!("the vsock worker cannot watch a descriptor: {error}");
                self.interrupt.signal_needs_reset();
            }
        }
        // What the driver or the process queued before this thread ran.
        self.turn(ops);
    }
}
