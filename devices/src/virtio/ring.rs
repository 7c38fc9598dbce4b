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

#[cfg(test)]
pub(super) mod tests {
    use crate::testing::{Buffer, HIGH_REGION, INDIRECT, MockDriver, NEXT, REGION_SIZE, WRITE};
    use crate::virtio::VirtioDevice;
    use crate::virtio::balloon::{Balloon, BalloonConfig};
    use crate::virtio::rng::Rng;
    use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
    use virtio_queue::desc::split::Descriptor;

    /// A small generator with a fixed seed, so that a failure can be repeated.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % bound
        }

        fn pick<T: Copy>(&mut self, from: &[T]) -> T {
            from[self.below(from.len() as u64) as usize]
        }

        /// A descriptor that is right in some of its parts.
        fn descriptor(&mut self) -> Descriptor {
            let near = HIGH_REGION + self.below(REGION_SIZE as u64);
            let addr = self.pick(&[near, near, near, 0, 64 << 20, u64::MAX - 8, self.0]);
            let len = self.pick(&[0, 1, 16, 100, 4096, 65_562, 1 << 24, u32::MAX]);
            let flags = self.pick(&[0, WRITE, NEXT, NEXT | WRITE, INDIRECT, 0xffff]);
            Descriptor::new(addr, len, flags, self.below(300) as u16)
        }
    }

    /// Fills the rings of a started device with nonsense, then looks whether it still resets and
    /// starts.
    pub(crate) fn hammer(driver: &mut MockDriver, queues: usize, seed: u64) {
        let mut random = Random(seed | 1);
        for _ in 0..30 {
            for _ in 0..random.below(40) {
                let queue = random.below(queues as u64) as usize;
                let table: Vec<_> = (0..random.below(16)).map(|_| random.descriptor()).collect();
                // One head in eight lies outside of the table.
                let head = random.pick(&[0, 1, 2, 3, 4, 5, 6, 50_000]);
                driver.submit_raw(queue, &table, head);
                if random.below(20) == 0 {
                    driver.set_avail_idx(queue, random.below(1 << 16) as u16);
                }
                driver.notify(queue);
            }
            driver.start(match random.below(2) {
                0 => u64::MAX,
                _ => !(1 << VIRTIO_RING_F_EVENT_IDX),
            });
            // The mock guest never frees: begin with a new one before it is full.
            if random.below(8) == 0 {
                return;
            }
        }
    }

    #[test]
    fn nonsense_in_the_rings_stalls_the_guest_only() {
        let balloon = || {
            let config = BalloonConfig {
                free_page_reporting: true,
                ..BalloonConfig::default()
            };
            Balloon::new(config).0
        };
        for seed in 1..8 {
            let devices: [(Box<dyn VirtioDevice>, usize); 2] =
                [(Box::new(Rng::new()), 1), (Box::new(balloon()), 5)];
            for (device, queues) in devices {
                hammer(&mut MockDriver::started(device), queues, seed * 0x9e37_79b9);
            }
        }
    }

    #[test]
    fn without_event_idx_the_driver_can_ask_for_silence() {
        let wanted = !(1 << VIRTIO_RING_F_EVENT_IDX);
        let mut driver = MockDriver::started_with(Box::new(Rng::new()), wanted);
        let addr = driver.alloc(64);
        // VRING_AVAIL_F_NO_INTERRUPT
        driver.write(driver.queue(0).avail_ring, &[1, 0]);
        driver.submit(0, &[Buffer::writable(addr, 64)]);
        driver.kick(0);
        // With silence lifted, the next request is announced, and the first was served before it.
        while driver.pop_used(0).is_none() {
            std::thread::yield_now();
        }
        assert_eq!(driver.interrupt().status(), 0);
        driver.write(driver.queue(0).avail_ring, &[0, 0]);
        assert_eq!(driver.request(0, &[Buffer::writable(addr, 64)]), 64);
    }
}
