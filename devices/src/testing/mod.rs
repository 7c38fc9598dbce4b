//! A guest driver that is not a guest: it drives a device through its registers and rings as a
//! Linux driver would, for tests, benches and fuzz targets (feature `testing`).
//!
//! It panics where a test should fail, and every wait has a bound ([`PATIENCE`]). It can also lie:
//! [`MockDriver::submit_raw`] and the register access take anything.

mod fuzz;
mod rings;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_config::*;
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::interrupt::Interrupt;
use crate::virtio::VirtioDevice;
use crate::virtio::mmio::MmioTransport;

pub use self::fuzz::fuzz_device;
pub use self::rings::{Buffer, INDIRECT, NEXT, Used, WRITE};

/// How long a wait may take before it counts as failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes of each of the two regions of guest memory.
pub const REGION_SIZE: usize = 32 << 20;

/// Where the second region begins; between the two there is a hole.
pub const HIGH_REGION: u64 = 4 << 30;

const PAGE: u64 = 4096;

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
        let line = EventFd::new(EFD_NONBLOCK)?;
        let transport = MmioTransport::new(device, memory.clone(), line)?;
        Ok(Self {
            transport: Arc::new(transport),
            memory,
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
        self.transport.interrupt()
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
}
