//! How a virtio device tells its driver that something happened: an eventfd and some registers.
//!
//! `vmm` registers the eventfd as a KVM irqfd, so raising the interrupt is one `write` that
//! enters no lock of ours. Virtio 1.2, section 4.2.2 (InterruptStatus, ConfigGeneration) and 2.1
//! (DEVICE_NEEDS_RESET).

use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_STATUS,
};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::mmio::RegisterPage;

/// The interrupt line of one virtio device, shared by its transport and its workers.
#[derive(Debug)]
pub struct Interrupt {
    line: EventFd,
    registers: Arc<RegisterPage>,
}

impl Interrupt {
    /// An idle interrupt that is raised by writing to `line`, and shows in `registers` why.
    pub fn new(line: EventFd, registers: Arc<RegisterPage>) -> Self {
        Self { line, registers }
    }

    /// The eventfd to be registered with the hypervisor.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Tells the driver that buffers were used.
    pub fn signal_queue(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells the driver that the configuration space changed. ConfigGeneration wraps, and a reset
    /// leaves it alone, so a driver never sees an old value for a new configuration.
    pub fn signal_config(&self) {
        self.registers.increment(VIRTIO_MMIO_CONFIG_GENERATION);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Declares the device broken until the driver resets it: what a worker does with a ring that
    /// cannot be right.
    pub fn signal_needs_reset(&self) {
        self.registers
            .set_bits(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_NEEDS_RESET);
        self.signal_config();
    }

    /// The InterruptStatus register.
    pub fn status(&self) -> u32 {
        self.registers.get(VIRTIO_MMIO_INTERRUPT_STATUS)
    }

    /// Clears the bits that the driver wrote to InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.registers
            .clear_bits(VIRTIO_MMIO_INTERRUPT_STATUS, bits);
    }

    /// Back to idle, as at device reset.
    pub fn reset(&self) {
        self.registers.set(VIRTIO_MMIO_INTERRUPT_STATUS, 0);
        self.registers
            .clear_bits(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_NEEDS_RESET);
    }

    fn raise(&self, bit: u32) {
        // Also where the bit is set already: a driver that clears it at this moment has then seen
        // all that was done before, so the interrupt that finds no bit missed nothing.
        self.registers.set_bits(VIRTIO_MMIO_INTERRUPT_STATUS, bit);
        // A write fails only when the counter would overflow: then the line is raised already.
        let _ = self.line.write(1);
    }
}
