//! A virtqueue in the hands of the worker that owns it: what every worker does with its ring, in
//! one place, so that no device forgets a notification or spins on a bad index.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::Interrupt;
use crate::virtio::ActiveQueue;

/// One queue, its doorbell and its interrupt.
///
/// What the guest wrote into the ring may be nonsense. The first time that it cannot be right, the
/// ring declares DEVICE_NEEDS_RESET and from then on looks empty.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    kick: EventFd,
    interrupt: Arc<Interrupt>,
    broken: bool,
}

impl Ring {
    /// Takes over a queue; one that the driver left unused looks empty forever.
    pub fn new(active: ActiveQueue, interrupt: Arc<Interrupt>) -> Self {
        Self {
            broken: !active.queue.ready(),
            queue: active.queue,
            kick: active.kick,
            interrupt,
        }
    }

    /// The doorbell, to be watched for EPOLLIN.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The doorbell's descriptor, to compare events with.
    pub fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Silences the doorbell until the driver rings again.
    pub fn take_kick(&self) {
        // Fails only when nothing is there to be read: then it is silent.
        let _ = self.kick.read();
    }

    /// Rings the doorbell itself: the worker has had its share and wants to come back after its
    /// other events.
    pub fn rekick(&self) {
        // Fails only when the counter would overflow: then it rings already.
        let _ = self.kick.write(1);
    }

    /// The next chain; None when there is none, and then the driver will ring for the next.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Option<DescriptorChain<&'m GuestMemoryMmap>> {
        while !self.broken {
            match self.queue.iter(memory).map(|mut chains| chains.next()) {
                Ok(Some(chain)) => return Some(chain),
                Ok(None) => {}
                Err(error) => return self.break_down(&error),
            }
            match self.queue.enable_notification(memory) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => return self.break_down(&error),
            }
        }
        None
    }

    /// Puts back the chain that [`Ring::pop`] gave last.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives the chain `head` back to the driver, `len` bytes of it written.
    pub fn add_used(&mut self, memory: &GuestMemoryMmap, head: u16, len: u32) {
        if let Err(error) = self.queue.add_used(memory, head, len) {
            let _: Option<()> = self.break_down(&error);
        }
    }

    /// Tells the driver about used chains, unless it asked not to be told yet.
    pub fn signal(&mut self, memory: &GuestMemoryMmap) {
        if self.broken {
            return;
        }
        match self.queue.needs_notification(memory) {
            Ok(true) => self.interrupt.signal_queue(),
            Ok(false) => {}
            Err(error) => {
                let _: Option<()> = self.break_down(&error);
            }
        }
    }

    fn break_down<T>(&mut self, error: &virtio_queue::Error) -> Option<T> {
        if !self.broken {
            self.broken = true;
            tracing::warn!("the guest's ring cannot be right, its device needs a reset: {error}");
            self.interrupt.signal_needs_reset();
        }
        None
    }
}
