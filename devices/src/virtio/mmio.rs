//! The virtio-mmio transport, register layout version 2 (Virtio 1.2, section 4.2.2).
//!
//! Owns the registers of one device and its way from reset to DRIVER_OK and back. It is the
//! control path only: queue notifications reach the workers through eventfds
//! ([`MmioTransport::kicks`]), and what a driver reads are the words of a [`RegisterPage`], which
//! the guest may have as memory; workers raise their [`Interrupt`] there. What a driver writes
//! stands behind one mutex, and after each write the page shows what came of it.
//!
//! Architecture invariant: a queue exists in one place. Here it is only a description
//! ([`QueueSetup`]); the ring itself is made at DRIVER_OK and moves into the device.

mod page;

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::interrupt::Interrupt;
use crate::virtio::{Activation, ActiveQueue, VirtioDevice};

pub use self::page::{PAGE_OFFSET, PAGE_SIZE, RegisterPage};

/// Bytes of address space that one transport takes. It is to begin [`PAGE_OFFSET`] bytes into a
/// page, where the guest is to have its registers as memory.
pub const MMIO_SIZE: u64 = 0x1000;

/// The QueueNotify register: a KVM ioeventfd goes here, four bytes wide, its datamatch the index
/// of the queue.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// The InterruptACK register: a KVM ioeventfd that nobody reads may go here, four bytes wide, its
/// datamatch [`INT_VRING`].
///
/// The bit then stays in InterruptStatus from the first used buffer to the next reset or change of
/// the configuration. It says that buffers may have been used in any queue (sections 4.2.2 and
/// 4.2.3.4), so a driver looks at its rings and finds, now and then, nothing: as after an
/// interrupt that two events share. Linux reads it once for each interrupt, and never waits for it
/// to become zero.
///
/// No event is lost, as the line is triggered by edges and gets one for each event, whatever the
/// bits are. A line that is triggered by its level would have to be up while a bit is set; then
/// every write would have to come here, and there could be no ioeventfd.
///
/// A write with the configuration's bit has another value, and comes here.
pub const INTERRUPT_ACK: u64 = VIRTIO_MMIO_INTERRUPT_ACK as u64;

/// What a driver writes to InterruptACK when nothing but buffers were used.
pub const INT_VRING: u32 = VIRTIO_MMIO_INT_VRING;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"MVM\0");
const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;

/// The status bits that a driver sets, in the only order in which it may (section 3.1.1).
const STATUS_ORDER: [u32; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const TRANSPORT_FEATURES: u64 =
    VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The registers of one virtio device.
pub struct MmioTransport {
    page: Arc<RegisterPage>,
    interrupt: Arc<Interrupt>,
    kicks: Vec<EventFd>,
    registers: Mutex<Registers>,
}

impl fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioTransport")
            .field("queues", &self.kicks.len())
            .finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// Puts `device` behind registers; it works on `memory` and raises `line`.
    ///
    /// Fails when an eventfd cannot be made, or when the device asks for a queue size that is no
    /// power of two up to 32,768.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap,
        line: EventFd,
    ) -> io::Result<Self> {
        let sizes = device.queue_max_sizes().to_vec();
        let mut kicks = Vec::with_capacity(sizes.len());
        for &size in &sizes {
            Queue::new(size).map_err(|error| {
                io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("a virtqueue cannot have {size} entries: {error}"),
                )
            })?;
            kicks.push(EventFd::new(EFD_NONBLOCK)?);
        }
        let page = Arc::new(RegisterPage::default());
        let interrupt = Arc::new(Interrupt::new(line, page.clone()));
        let registers = Registers {
            device,
            memory,
            page: page.clone(),
            interrupt: interrupt.clone(),
            queues: sizes.into_iter().map(QueueSetup::new).collect(),
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
        };
        registers.publish_identity();
        registers.publish_selected();
        Ok(Self {
            page,
            interrupt,
            kicks,
            registers: Mutex::new(registers),
        })
    }

    /// What a driver reads at offsets 0x000 to 0x0ff: memory that the guest may be shown.
    pub fn page(&self) -> &Arc<RegisterPage> {
        &self.page
    }

    /// The eventfds of the queues, in order; each is to be registered at [`QUEUE_NOTIFY`].
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// The device's interrupt.
    pub fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// Stops the device: when this returns, no worker touches guest memory. The device then reads
    /// as after a reset.
    pub fn shutdown(&self) {
        self.lock().reset();
    }

    /// Registers stay usable after a panic on another thread: every change to them is complete
    /// before anything that could panic.
    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self, queue: u32) {
        if let Some(kick) = usize::try_from(queue).ok().and_then(|q| self.kicks.get(q)) {
            // Fails only on an overflowing counter: then the worker has been told already.
            let _ = kick.write(1);
        }
    }
}

impl Drop for MmioTransport {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(config_offset) = offset.checked_sub(CONFIG) {
            self.lock().device.read_config(config_offset, data);
        } else {
            self.page.read(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(config_offset) = offset.checked_sub(CONFIG) {
            let mut registers = self.lock();
            if registers.status() & DRIVER != 0 {
                registers.device.write_config(config_offset, data);
            }
            return;
        }
        // Registers are 32 bits wide and aligned (section 4.2.2.2).
        let (Ok(data), 0) = (<[u8; 4]>::try_from(data), offset % 4) else {
            return;
        };
        let value = u32::from_le_bytes(data);
        match offset as u32 {
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.lock().write_status(value, &self.kicks),
            register => self.lock().write(register, value),
        }
    }
}

/// What stands behind the mutex.
struct Registers {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemoryMmap,
    /// Holds the device status, of which NEEDS_RESET is the [`Interrupt`]'s.
    page: Arc<RegisterPage>,
    interrupt: Arc<Interrupt>,
    queues: Vec<QueueSetup>,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
}

impl Registers {
    /// Shows what never changes.
    fn publish_identity(&self) {
        let page = &self.page;
        page.set(VIRTIO_MMIO_MAGIC_VALUE, MAGIC);
        page.set(VIRTIO_MMIO_VERSION, VERSION);
        page.set(VIRTIO_MMIO_DEVICE_ID, self.device.device_type());
        page.set(VIRTIO_MMIO_VENDOR_ID, VENDOR);
        // No shared memory region exists: length and base read as all ones (section 4.2.2).
        for register in [
            VIRTIO_MMIO_SHM_LEN_LOW,
            VIRTIO_MMIO_SHM_LEN_HIGH,
            VIRTIO_MMIO_SHM_BASE_LOW,
            VIRTIO_MMIO_SHM_BASE_HIGH,
        ] {
            page.set(register, u32::MAX);
        }
    }

    /// Shows what the driver selected.
    fn publish_selected(&self) {
        let features = match self.device_features_sel {
            0 => self.offered() as u32,
            1 => (self.offered() >> 32) as u32,
            _ => 0,
        };
        let queue = self.queue();
        let max_size = queue.map_or(0, |q| q.max_size.into());
        let ready = queue.map_or(0, |q| q.ready.into());
        self.page.set(VIRTIO_MMIO_DEVICE_FEATURES, features);
        self.page.set(VIRTIO_MMIO_QUEUE_NUM_MAX, max_size);
        self.page.set(VIRTIO_MMIO_QUEUE_READY, ready);
    }

    fn write(&mut self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            _ => self.write_queue(register, value),
        }
        self.publish_selected();
    }

    fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn status(&self) -> u32 {
        self.page.get(VIRTIO_MMIO_STATUS)
    }

    fn queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    /// Features change only between DRIVER and FEATURES_OK.
    fn write_driver_features(&mut self, value: u32) {
        if self.status() & (DRIVER | FEATURES_OK) != DRIVER {
            return;
        }
        let shift = match self.driver_features_sel {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let mask = u64::from(u32::MAX) << shift;
        self.driver_features = self.driver_features & !mask | u64::from(value) << shift;
    }

    /// Queues change only between FEATURES_OK and DRIVER_OK.
    fn write_queue(&mut self, register: u32, value: u32) {
        if self.status() & (FEATURES_OK | DRIVER_OK | FAILED) != FEATURES_OK {
            return;
        }
        let selected = usize::try_from(self.queue_sel).ok();
        let Some(queue) = selected.and_then(|q| self.queues.get_mut(q)) else {
            return;
        };
        if register == VIRTIO_MMIO_QUEUE_READY {
            queue.ready = value == 1 && queue.build().is_some();
            return;
        }
        // A queue's parameters may change only while it is not ready (section 4.2.2.2).
        if queue.ready {
            return;
        }
        match register {
            VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.desc_table, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.desc_table, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.avail_ring, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.avail_ring, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used_ring, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used_ring, value),
            _ => {}
        }
    }

    /// Zero resets; otherwise the new bits take effect one after the other, each only when those
    /// before it are set. A driver cannot clear a bit (section 2.1.1): those that are missing in
    /// `value` stay.
    fn write_status(&mut self, value: u32, kicks: &[EventFd]) {
        if value == 0 {
            self.reset();
            return;
        }
        self.page.set_bits(VIRTIO_MMIO_STATUS, value & FAILED);
        for (at, &bit) in STATUS_ORDER.iter().enumerate() {
            if value & bit == 0 || self.status() & bit != 0 {
                continue;
            }
            let before: u32 = STATUS_ORDER[..at].iter().sum();
            if self.status() & (before | FAILED) != before {
                return;
            }
            if bit == FEATURES_OK && !self.features_acceptable() {
                return;
            }
            self.page.set_bits(VIRTIO_MMIO_STATUS, bit);
            if bit == DRIVER_OK {
                self.activate(kicks);
            }
        }
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered() == 0 && self.driver_features & VERSION_1 != 0
    }

    /// Hands the queues to the device; where it cannot work with them it asks for a reset.
    fn activate(&mut self, kicks: &[EventFd]) {
        let device_type = self.device.device_type();
        let Some(activation) = self.build_activation(kicks) else {
            tracing::warn!("a queue of virtio device type {device_type} is not usable");
            self.interrupt.signal_needs_reset();
            return;
        };
        if let Err(error) = self.device.activate(activation) {
            tracing::warn!("virtio device type {device_type} did not start: {error}");
            self.device.reset();
            self.interrupt.signal_needs_reset();
        }
    }

    /// None when a ring that is marked ready does not lie in guest memory, or (logged) when the
    /// process is out of file descriptors.
    fn build_activation(&self, kicks: &[EventFd]) -> Option<Activation> {
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::with_capacity(self.queues.len());
        for (setup, kick) in self.queues.iter().zip(kicks) {
            let queue = if setup.ready {
                let mut queue = setup.build()?;
                queue.set_event_idx(event_idx);
                queue.is_valid(&self.memory).then_some(queue)?
            } else {
                Queue::new(setup.max_size).ok()?
            };
            let kick = kick
                .try_clone()
                .inspect_err(|error| tracing::error!("an eventfd cannot be cloned: {error}"))
                .ok()?;
            queues.push(ActiveQueue { queue, kick });
        }
        Some(Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features: self.driver_features,
        })
    }

    fn reset(&mut self) {
        if self.status() & DRIVER_OK != 0 {
            self.device.reset();
        }
        // After the workers are gone: none can raise it again.
        self.interrupt.reset();
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.max_size);
        }
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.publish_selected();
        // Last, as it tells the driver that the reset is complete (section 2.4).
        self.page.set(VIRTIO_MMIO_STATUS, 0);
    }
}

/// One queue as the driver described it: not yet a ring.
#[derive(Debug)]
struct QueueSetup {
    max_size: u16,
    /// 0 until the driver wrote a size that fits into 16 bits.
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: 0,
            ready: false,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
        }
    }

    /// The ring, or None where its size or an alignment is not allowed (section 2.7).
    fn build(&self) -> Option<Queue> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(self.size).ok()?;
        let address = GuestAddress;
        queue
            .try_set_desc_table_address(address(self.desc_table))
            .ok()?;
        queue
            .try_set_avail_ring_address(address(self.avail_ring))
            .ok()?;
        queue
            .try_set_used_ring_address(address(self.used_ring))
            .ok()?;
        queue.set_ready(true);
        Some(queue)
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests;
