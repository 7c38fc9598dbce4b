//! The driver's half of the rings: chains go in, used elements come out (Virtio 1.2, section 2.7).

use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS};
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{MockDriver, PATIENCE};
use crate::bus::BusDevice;
use crate::virtio::mmio::QUEUE_NOTIFY;

/// Descriptor flags, as wide as the field.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// See [`NEXT`].
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// See [`NEXT`].
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// A buffer of a chain to be submitted.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

impl Buffer {
    /// A buffer that the device reads.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            writable: false,
        }
    }

    /// A buffer that the device writes.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            writable: true,
        }
    }
}

/// An element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head of the chain that was used.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

impl MockDriver {
    /// Puts a chain of `buffers` into queue `index`, one descriptor each, without a kick; gives
    /// its head.
    pub fn submit(&mut self, index: usize, buffers: &[Buffer]) -> u16 {
        let queue = &mut self.queues[index];
        assert!(queue.free.len() >= buffers.len(), "queue {index} is full");
        let at = queue.free.len() - buffers.len();
        let descriptors = queue.free.split_off(at);
        let head = descriptors[0];
        for (i, buffer) in buffers.iter().enumerate() {
            let next = descriptors.get(i + 1).copied();
            self.write_descriptor(index, descriptors[i], descriptor(buffer, next));
        }
        self.queues[index].chains[usize::from(head)] = descriptors;
        self.make_available(index, head);
        head
    }

    /// As [`Self::submit`], with the buffers in an indirect table, which takes one descriptor.
    pub fn submit_indirect(&mut self, index: usize, buffers: &[Buffer]) -> u16 {
        let table = self.alloc(buffers.len() as u64 * 16);
        for (i, buffer) in buffers.iter().enumerate() {
            let next = (i + 1 < buffers.len()).then_some(i as u16 + 1);
            self.write_obj(table + i as u64 * 16, descriptor(buffer, next));
        }
        let head = self.queues[index].free.pop().expect("a free descriptor");
        let len = buffers.len() as u32 * 16;
        self.write_descriptor(index, head, Descriptor::new(table, len, INDIRECT, 0));
        self.queues[index].chains[usize::from(head)] = vec![head];
        self.make_available(index, head);
        head
    }

    /// Writes `descriptors` into the table of queue `index` from entry 0 on, as they are, and
    /// makes `head` available. The queue must be used with raw descriptors only from then on.
    pub fn submit_raw(&mut self, index: usize, descriptors: &[Descriptor], head: u16) {
        for (i, descriptor) in descriptors.iter().enumerate() {
            self.write_descriptor(index, i as u16, *descriptor);
        }
        self.make_available(index, head);
    }

    /// Writes entry `at` of the descriptor table.
    pub fn write_descriptor(&self, index: usize, at: u16, descriptor: Descriptor) {
        let table = self.queues[index].desc_table;
        self.write_obj(table + u64::from(at) * 16, descriptor);
    }

    /// Puts `head` into the available ring and moves its index on.
    pub fn make_available(&mut self, index: usize, head: u16) {
        let queue = &self.queues[index];
        let slot = u64::from(queue.avail_idx % queue.size);
        let (ring, next) = (queue.avail_ring, queue.avail_idx.wrapping_add(1));
        self.write_obj(ring + 4 + slot * 2, head.to_le());
        self.set_avail_idx(index, next);
    }

    /// Sets the index of the available ring to any value.
    pub fn set_avail_idx(&mut self, index: usize, value: u16) {
        self.queues[index].avail_idx = value;
        self.store_u16(self.queues[index].avail_ring + 2, value.to_le());
    }

    fn event_idx(&self) -> bool {
        self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0
    }

    /// Notifies the device of what was made available since the last kick, if it asked for it;
    /// tells whether it was notified.
    pub fn kick(&mut self, index: usize) -> bool {
        fence(Ordering::SeqCst);
        let queue = &self.queues[index];
        let (new, old) = (queue.avail_idx, queue.last_kicked);
        let wanted = if self.event_idx() {
            let event = self.read_u16(queue.used_ring + 4 + u64::from(queue.size) * 8);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.read_u16(queue.used_ring) & VRING_USED_F_NO_NOTIFY as u16 == 0
        };
        self.queues[index].last_kicked = new;
        if wanted {
            self.notify(index);
        }
        wanted
    }

    /// Writes QueueNotify, whether the device wants it or not.
    pub fn notify(&self, index: usize) {
        self.transport
            .write(QUEUE_NOTIFY, &(index as u32).to_le_bytes());
    }

    /// The next used element that is there already, if any.
    pub fn pop_used(&mut self, index: usize) -> Option<Used> {
        let queue = &self.queues[index];
        let slot = u64::from(queue.last_used % queue.size.max(1));
        if queue.size == 0 || self.read_u16(queue.used_ring + 2) == queue.last_used {
            return None;
        }
        let element = self.read(queue.used_ring + 4 + slot * 8, 8);
        let queue = &mut self.queues[index];
        queue.last_used = queue.last_used.wrapping_add(1);
        let used = Used {
            head: u16::from_le_bytes([element[0], element[1]]),
            len: u32::from_le_bytes([element[4], element[5], element[6], element[7]]),
        };
        if let Some(chain) = queue.chains.get_mut(usize::from(used.head)) {
            queue.free.append(chain);
        }
        Some(used)
    }

    /// The next used element of queue `index`, waiting for an interrupt as often as it takes; None
    /// after `patience`.
    ///
    /// The ring is looked at only before the first wait and after an interrupt, so a device that
    /// forgets to interrupt is found out.
    pub fn wait_used_for(&mut self, index: usize, patience: Duration) -> Option<Used> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(used) = self.pop_used(index) {
                return Some(used);
            }
            if self.event_idx() {
                let queue = &self.queues[index];
                let used_event = queue.avail_ring + 4 + u64::from(queue.size) * 2;
                self.store_u16(used_event, queue.last_used.to_le());
                fence(Ordering::SeqCst);
                if let Some(used) = self.pop_used(index) {
                    return Some(used);
                }
            }
            if !self.wait_interrupt(deadline) {
                return None;
            }
        }
    }

    /// As [`Self::wait_used_for`] with [`PATIENCE`].
    ///
    /// # Panics
    /// When nothing is used in that time.
    pub fn wait_used(&mut self, index: usize) -> Used {
        self.wait_used_for(index, PATIENCE).unwrap_or_else(|| {
            panic!(
                "nothing was used on queue {index}; status {:#x}",
                self.status()
            )
        })
    }

    /// Submits `buffers`, kicks, and waits until just this chain was used; gives the bytes that
    /// the device says it wrote.
    pub fn request(&mut self, index: usize, buffers: &[Buffer]) -> u32 {
        let head = self.submit(index, buffers);
        self.kick(index);
        let used = self.wait_used(index);
        assert_eq!(used.head, head, "another chain was used");
        used.len
    }

    /// Waits until the device shows DEVICE_NEEDS_RESET; false after `patience`.
    pub fn wait_needs_reset(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            if self.status() & VIRTIO_CONFIG_S_NEEDS_RESET != 0 {
                return true;
            }
            if !self.wait_interrupt(deadline) {
                return self.status() & VIRTIO_CONFIG_S_NEEDS_RESET != 0;
            }
        }
    }

    /// Waits for the interrupt line and acknowledges what it stands for; false at `deadline`.
    pub(super) fn wait_interrupt(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd {
            fd: self.interrupt().line().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let millis = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one pollfd that lives through the call.
        let ready = unsafe { libc::poll(&mut poll, 1, millis) };
        if ready <= 0 {
            return false;
        }
        let _ = self.interrupt().line().read();
        let pending = self.read32(VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write32(VIRTIO_MMIO_INTERRUPT_ACK, pending);
        true
    }

    fn write_obj<T: ByteValued>(&self, addr: u64, value: T) {
        self.memory
            .write_obj(value, GuestAddress(addr))
            .expect("an address in guest memory");
    }

    fn read_u16(&self, addr: u64) -> u16 {
        // An atomic load: the device's worker stores to the same place.
        self.memory
            .load(GuestAddress(addr), Ordering::SeqCst)
            .expect("an address in guest memory")
    }

    fn store_u16(&self, addr: u64, value: u16) {
        self.memory
            .store(value, GuestAddress(addr), Ordering::SeqCst)
            .expect("an address in guest memory");
    }
}

fn descriptor(buffer: &Buffer, next: Option<u16>) -> Descriptor {
    let write = if buffer.writable { WRITE } else { 0 };
    let flags = write | if next.is_some() { NEXT } else { 0 };
    Descriptor::new(buffer.addr, buffer.len, flags, next.unwrap_or(0))
}
