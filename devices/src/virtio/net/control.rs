//! The control queue (Virtio 1.2, section 5.1.6.5): how many pairs of queues are in use.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::tap::Tap;
use crate::virtio::queue::ChainBuffers;
use crate::virtio::ring::Ring;

/// Commands that are served before the worker looks whether it should stop.
const BATCH: usize = 16;

/// Owns the control queue.
#[derive(Debug)]
pub(super) struct ControlWorker {
    ring: Ring,
    memory: GuestMemoryMmap,
    buffers: ChainBuffers,
    tap: Arc<Tap>,
    /// One per pair: tells its worker that the TAP's queue is attached.
    attached: Vec<EventFd>,
}

impl ControlWorker {
    pub(super) fn new(
        ring: Ring,
        memory: GuestMemoryMmap,
        tap: Arc<Tap>,
        attached: Vec<EventFd>,
    ) -> Self {
        Self {
            ring,
            buffers: ChainBuffers::new(memory.clone()),
            memory,
            tap,
            attached,
        }
    }

    fn serve(&mut self) {
        let mut left = BATCH;
        while let Some(chain) = self.ring.pop(&self.memory) {
            let head = chain.head_index();
            // A command without room for its answer goes back unanswered.
            let answered = self.buffers.load(chain).is_ok() && self.buffers.reserve_last();
            if answered {
                let done = self.obey().is_some();
                let ack = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
                self.buffers.write_last(ack as u8);
            }
            self.ring.add_used(&self.memory, head, answered.into());
            left -= 1;
            if left == 0 {
                self.ring.rekick();
                break;
            }
        }
        self.ring.signal(&self.memory);
    }

    /// Does what the loaded command says; None where it cannot be done.
    fn obey(&mut self) -> Option<()> {
        let command = self.buffers.readable();
        let mut header = [0; 2];
        let mut pairs = [0; 2];
        if !command.read_front(&mut header) || !command.read_front(&mut pairs) {
            return None;
        }
        let [class, code] = header.map(u32::from);
        if (class, code) != (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) {
            return None;
        }
        let pairs = usize::from(u16::from_le_bytes(pairs));
        if !(1..=self.attached.len()).contains(&pairs) {
            return None;
        }
        if let Err(error) = self.tap.attach_queues(pairs) {
            tracing::warn!(
                "{pairs} queues of interface {} cannot be attached: {error}",
                self.tap.name()
            );
            return None;
        }
        for event in self.attached.iter().take(pairs) {
            // Fails only when the counter would overflow: then it is readable already.
            let _ = event.write(1);
        }
        Some(())
    }
}

impl MutEventSubscriber for ControlWorker {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.ring.take_kick();
        self.serve();
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.ring.kick(), EventSet::IN)) {
            tracing::error!("the network device cannot watch its control queue: {error}");
        }
    }
}
