//! A virtqueue in the hands of the worker that owns it: what every worker does with its ring, in
//! one place, so that no device forgets a notification or spins on a bad index.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};
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
    /// The used index that the driver was told about last.
    signalled: u16,
    broken: bool,
}

impl Ring {
    /// Takes over a queue; one that the driver left unused looks empty forever.
    pub fn new(active: ActiveQueue, interrupt: Arc<Interrupt>) -> Self {
        Self {
            signalled: active.queue.next_used(),
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

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.queue.size()
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

    /// Gives the chain `head` back to the driver, `len` bytes of it written.
    pub fn add_used(&mut self, memory: &GuestMemoryMmap, head: u16, len: u32) {
        self.add_used_together(memory, &[(head, len)]);
    }

    /// Gives chains back (head and bytes written of each), so that the driver sees all or none of
    /// them: what a frame in several buffers needs. At most as many as the ring has entries.
    pub fn add_used_together(&mut self, memory: &GuestMemoryMmap, used: &[(u16, u32)]) {
        if self.broken {
            return;
        }
        let written = self.write_used(memory, used);
        self.note(written);
    }

    fn write_used(
        &mut self,
        memory: &GuestMemoryMmap,
        used: &[(u16, u32)],
    ) -> Result<(), virtio_queue::Error> {
        const INDEX: u64 = 2;
        const ELEMENTS: u64 = 4;
        const ELEMENT_LEN: u64 = 8;

        let address = |offset: u64| {
            let ring = GuestAddress(self.queue.used_ring());
            ring.checked_add(offset)
                .ok_or(virtio_queue::Error::AddressOverflow)
        };
        let size = self.queue.size();
        let mut next = self.queue.next_used();
        for (head, len) in used {
            let slot = next
                .checked_rem(size)
                .filter(|_| *head < size)
                .ok_or(virtio_queue::Error::InvalidDescriptorIndex)?;
            let element = [u32::from(*head).to_le(), len.to_le()];
            let at = address(ELEMENTS + u64::from(slot) * ELEMENT_LEN)?;
            memory
                .write_obj(element, at)
                .map_err(virtio_queue::Error::GuestMemory)?;
            next = next.wrapping_add(1);
        }
        memory
            .store(next.to_le(), address(INDEX)?, Ordering::Release)
            .map_err(virtio_queue::Error::GuestMemory)?;
        self.queue.set_next_used(next);
        Ok(())
    }

    /// Tells the driver about chains used since the last call, unless it asked not to be told yet.
    pub fn signal(&mut self, memory: &GuestMemoryMmap) {
        let next = self.queue.next_used();
        if self.broken || next == self.signalled {
            return;
        }
        let wanted = self.wants_signal(memory, next);
        self.signalled = next;
        if self.note(wanted) == Some(true) {
            self.interrupt.signal_queue();
        }
    }

    /// Virtio 1.2, section 2.7.10: used_event with EVENT_IDX, the available ring's flags without.
    fn wants_signal(
        &self,
        memory: &GuestMemoryMmap,
        next: u16,
    ) -> Result<bool, virtio_queue::Error> {
        const USED_EVENT_AFTER: u64 = 4;
        // The used index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let load = |offset: u64| {
            GuestAddress(self.queue.avail_ring())
                .checked_add(offset)
                .ok_or(virtio_queue::Error::AddressOverflow)
                .and_then(|address| {
                    memory
                        .load(address, Ordering::Relaxed)
                        .map(u16::from_le)
                        .map_err(virtio_queue::Error::GuestMemory)
                })
        };
        if self.queue.event_idx_enabled() {
            let event = load(USED_EVENT_AFTER + 2 * u64::from(self.queue.size()))?;
            let since_event = next.wrapping_sub(event).wrapping_sub(1);
            Ok(since_event < next.wrapping_sub(self.signalled))
        } else {
            Ok(load(0)? & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
        }
    }

    /// The value of a ring operation; None, and the ring is broken, where it failed.
    fn note<T>(&mut self, result: Result<T, virtio_queue::Error>) -> Option<T> {
        result.map_or_else(|error| self.break_down(&error), Some)
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
