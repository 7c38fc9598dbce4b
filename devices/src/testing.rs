//! A guest driver that is not a guest: it drives a device through its registers and rings as a
//! Linux driver would, for tests, benches and fuzz targets (feature `testing`).
//!
//! It panics where a test should fail, and every wait has a bound ([`PATIENCE`]). It can also lie:
//! [`MockDriver::submit_raw`] and the register access take anything.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::*;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::interrupt::Interrupt;
use crate::virtio::VirtioDevice;
use crate::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};

/// How long a wait may take before it counts as failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes of each of the two regions of guest memory.
pub const REGION_SIZE: usize = 32 << 20;

/// Where the second region begins; between the two there is a hole.
pub const HIGH_REGION: u64 = 4 << 30;

/// Descriptor flags, as wide as the field.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// See [`NEXT`].
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// See [`NEXT`].
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

const PAGE: u64 = 4096;

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

/// The driver's view of one queue.
#[derive(Debug)]
pub struct MockQueue {
    /// Entries; 0 before [`MockDriver::setup_queue`].
    pub size: u16,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest physical address of the available ring.
    pub avail_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
    avail_idx: u16,
    last_used: u16,
    last_kicked: u16,
    free: Vec<u16>,
    /// For each head, the descriptors of its chain.
    chains: Vec<Vec<u16>>,
}

/// A guest with one device.
#[derive(Debug)]
pub struct MockDriver {
    transport: Arc<MmioTransport>,
    memory: GuestMemoryMmap,
    interrupt: Arc<Interrupt>,
    queues: Vec<MockQueue>,
    features: u64,
    next_free: u64,
}

impl MockDriver {
    /// A guest in which nothing has happened to `device` yet.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::try_new(device).expect("guest memory and eventfds")
    }

    fn try_new(device: Box<dyn VirtioDevice>) -> io::Result<Self> {
        let memory = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), REGION_SIZE),
            (GuestAddress(HIGH_REGION), REGION_SIZE),
        ])
        .map_err(io::Error::other)?;
        let interrupt = Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK)?));
        let transport = MmioTransport::new(device, memory.clone(), interrupt.clone())?;
        Ok(Self {
            transport: Arc::new(transport),
            memory,
            interrupt,
            queues: Vec::new(),
            features: 0,
            next_free: PAGE,
        })
    }

    /// A guest whose driver accepted all features, set up all queues at their largest size, and
    /// set DRIVER_OK.
    pub fn started(device: Box<dyn VirtioDevice>) -> Self {
        Self::started_with(device, u64::MAX)
    }

    /// As [`Self::started`], with the features limited to `wanted` (and VERSION_1).
    pub fn started_with(device: Box<dyn VirtioDevice>, wanted: u64) -> Self {
        let mut driver = Self::new(device);
        driver.start(wanted);
        driver
    }

    /// Initializes the device as section 3.1.1 says, from reset to DRIVER_OK.
    pub fn start(&mut self, wanted: u64) {
        self.negotiate(wanted);
        for index in 0..self.transport.kicks().len() {
            self.setup_queue(index, None);
        }
        self.driver_ok();
        assert_eq!(
            self.status() & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET),
            VIRTIO_CONFIG_S_DRIVER_OK,
            "the device did not start"
        );
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The device's registers.
    pub fn transport(&self) -> &Arc<MmioTransport> {
        &self.transport
    }

    /// The device's interrupt.
    pub fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// The feature bits that both sides accepted.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The driver's view of queue `index`.
    pub fn queue(&self, index: usize) -> &MockQueue {
        &self.queues[index]
    }

    /// Reads a 32-bit register.
    pub fn read32(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a 32-bit register.
    pub fn write32(&self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    /// Reads `len` bytes of the configuration space.
    pub fn config(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.transport
            .read(u64::from(VIRTIO_MMIO_CONFIG) + offset, &mut data);
        data
    }

    /// The device status.
    pub fn status(&self) -> u32 {
        self.read32(VIRTIO_MMIO_STATUS)
    }

    /// Adds bits to the device status, as Linux does: with those that are read.
    pub fn add_status(&self, bits: u32) {
        self.write32(VIRTIO_MMIO_STATUS, self.status() | bits);
    }

    /// Resets the device; all that was in the rings is forgotten.
    pub fn reset(&mut self) {
        self.write32(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(self.status(), 0, "the device is not reset");
        self.queues.clear();
        for _ in self.transport.kicks() {
            self.queues.push(MockQueue {
                size: 0,
                desc_table: 0,
                avail_ring: 0,
                used_ring: 0,
                avail_idx: 0,
                last_used: 0,
                last_kicked: 0,
                free: Vec::new(),
                chains: Vec::new(),
            });
        }
    }

    /// The features on offer.
    pub fn offered_features(&self) -> u64 {
        self.write32(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        let high = u64::from(self.read32(VIRTIO_MMIO_DEVICE_FEATURES));
        self.write32(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        high << 32 | u64::from(self.read32(VIRTIO_MMIO_DEVICE_FEATURES))
    }

    /// Reset, ACKNOWLEDGE, DRIVER, what is offered of `wanted` (VERSION_1 always), FEATURES_OK.
    pub fn negotiate(&mut self, wanted: u64) {
        self.reset();
        self.add_status(VIRTIO_CONFIG_S_ACKNOWLEDGE);
        self.add_status(VIRTIO_CONFIG_S_DRIVER);
        let features = self.offered_features() & (wanted | 1 << VIRTIO_F_VERSION_1);
        self.write_features(features);
        self.add_status(VIRTIO_CONFIG_S_FEATURES_OK);
        assert_ne!(
            self.status() & VIRTIO_CONFIG_S_FEATURES_OK,
            0,
            "the device refused the features {features:#x}"
        );
    }

    /// Writes the driver's features; no check whether they were offered.
    pub fn write_features(&mut self, features: u64) {
        self.write32(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.write32(VIRTIO_MMIO_DRIVER_FEATURES, (features >> 32) as u32);
        self.write32(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
        self.write32(VIRTIO_MMIO_DRIVER_FEATURES, features as u32);
        self.features = features;
    }

    /// Lays out queue `index` with `size` entries (the largest size without) and makes it ready.
    pub fn setup_queue(&mut self, index: usize, size: Option<u16>) {
        self.write32(VIRTIO_MMIO_QUEUE_SEL, index as u32);
        let max = self.read32(VIRTIO_MMIO_QUEUE_NUM_MAX) as u16;
        assert_ne!(max, 0, "there is no queue {index}");
        assert_eq!(
            self.read32(VIRTIO_MMIO_QUEUE_READY),
            0,
            "queue {index} is in use"
        );
        let size = size.unwrap_or(max);
        let desc_table = self.alloc(u64::from(size) * 16);
        let avail_ring = self.alloc(u64::from(size) * 2 + 6);
        let used_ring = self.alloc(u64::from(size) * 8 + 6);
        self.write_queue_registers(index, u32::from(size), [desc_table, avail_ring, used_ring]);
        self.write32(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(
            self.read32(VIRTIO_MMIO_QUEUE_READY),
            1,
            "the device refused queue {index} with {size} entries"
        );
        self.queues[index] = MockQueue {
            size,
            desc_table,
            avail_ring,
            used_ring,
            avail_idx: 0,
            last_used: 0,
            last_kicked: 0,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); size.into()],
        };
    }

    /// Selects queue `index` and writes its size and its three addresses (descriptor table,
    /// available ring, used ring), whatever they are.
    pub fn write_queue_registers(&self, index: usize, size: u32, addresses: [u64; 3]) {
        self.write32(VIRTIO_MMIO_QUEUE_SEL, index as u32);
        self.write32(VIRTIO_MMIO_QUEUE_NUM, size);
        let registers = [
            VIRTIO_MMIO_QUEUE_DESC_LOW,
            VIRTIO_MMIO_QUEUE_AVAIL_LOW,
            VIRTIO_MMIO_QUEUE_USED_LOW,
        ];
        for (low, address) in registers.into_iter().zip(addresses) {
            self.write32(low, address as u32);
            self.write32(low + 4, (address >> 32) as u32);
        }
    }

    /// Sets DRIVER_OK.
    pub fn driver_ok(&self) {
        self.add_status(VIRTIO_CONFIG_S_DRIVER_OK);
    }

    /// Takes `len` zeroed bytes of guest memory, page aligned, never given back.
    pub fn alloc(&mut self, len: u64) -> u64 {
        let addr = self.next_free;
        let end = addr + len.next_multiple_of(PAGE).max(PAGE);
        assert!(
            end <= REGION_SIZE as u64,
            "the mock guest is out of memory: use buffers again, or the region at HIGH_REGION"
        );
        self.next_free = end;
        self.write(addr, &vec![0; len as usize]);
        addr
    }

    /// Takes guest memory that holds `data`.
    pub fn alloc_with(&mut self, data: &[u8]) -> u64 {
        let addr = self.alloc(data.len() as u64);
        self.write(addr, data);
        addr
    }

    /// Writes guest memory.
    pub fn write(&self, addr: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(addr))
            .expect("an address in guest memory");
    }

    /// Reads guest memory.
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(addr))
            .expect("an address in guest memory");
        data
    }

    fn write_obj<T: ByteValued>(&self, addr: u64, value: T) {
        self.memory
            .write_obj(value, GuestAddress(addr))
            .expect("an address in guest memory");
    }

    fn read_u16(&self, addr: u64) -> u16 {
        // An atomic load: the device's worker stores to the same place.
        self.memory
            .load(GuestAddress(addr), std::sync::atomic::Ordering::SeqCst)
            .expect("an address in guest memory")
    }

    fn store_u16(&self, addr: u64, value: u16) {
        self.memory
            .store(
                value,
                GuestAddress(addr),
                std::sync::atomic::Ordering::SeqCst,
            )
            .expect("an address in guest memory");
    }

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
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
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
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
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
    fn wait_interrupt(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd {
            fd: self.interrupt.line().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let millis = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one pollfd that lives through the call.
        let ready = unsafe { libc::poll(&mut poll, 1, millis) };
        if ready <= 0 {
            return false;
        }
        let _ = self.interrupt.line().read();
        let pending = self.read32(VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write32(VIRTIO_MMIO_INTERRUPT_ACK, pending);
        true
    }
}

fn descriptor(buffer: &Buffer, next: Option<u16>) -> Descriptor {
    let write = if buffer.writable { WRITE } else { 0 };
    let flags = write | if next.is_some() { NEXT } else { 0 };
    Descriptor::new(buffer.addr, buffer.len, flags, next.unwrap_or(0))
}
