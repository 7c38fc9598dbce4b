//! How a virtio device tells its driver that something happened: an eventfd and a status word.
//!
//! `vmm` registers the eventfd as a KVM irqfd, so raising the interrupt is one `write` that
//! enters no lock of ours. Virtio 1.2, section 4.2.2 (InterruptStatus) and 2.1 (DEVICE_NEEDS_RESET).

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

/// The interrupt line of one virtio device, shared by its transport and its workers.
#[derive(Debug)]
pub struct Interrupt {
    line: EventFd,
    status: AtomicU32,
    config_generation: AtomicU32,
    needs_reset: AtomicBool,
}

impl Interrupt {
    /// An idle interrupt that is raised by writing to `line`.
    pub fn new(line: EventFd) -> Self {
        Self {
            line,
            status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        }
    }

    /// The eventfd to be registered with the hypervisor.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Tells the driver that buffers were used.
    pub fn signal_queue(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells the driver that the configuration space changed.
    pub fn signal_config(&self) {
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Declares the device broken until the driver resets it: what a worker does with a ring that
    /// cannot be right.
    pub fn signal_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.signal_config();
    }

    /// Whether DEVICE_NEEDS_RESET is to be shown in the device status.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// The InterruptStatus register.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// The ConfigGeneration register: changes whenever the configuration space did. It wraps, and
    /// a reset leaves it alone, so a driver never sees an old value for a new configuration.
    pub fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::Acquire)
    }

    /// Clears the bits that the driver wrote to InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Back to idle, as at device reset.
    pub fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        // A write fails only when the counter would overflow: then the line is raised already.
        let _ = self.line.write(1);
    }
}
