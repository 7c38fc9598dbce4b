//! Virtio 1.2 devices and what they share.
//!
//! A device is split in three: the transport ([`mmio`]) owns the registers, the device owns its
//! host resource while it is inactive, and at DRIVER_OK queues and resource move together into a
//! worker thread that owns them until reset.

pub mod balloon;
pub mod block;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod ring;
pub mod rng;
pub mod vsock;

use std::io;
use std::sync::Arc;

use thiserror::Error;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::Interrupt;

/// A virtqueue on its way into a worker.
#[derive(Debug)]
pub struct ActiveQueue {
    /// The ring. `queue.ready()` is false where the driver left this queue unused; otherwise the
    /// transport has checked `queue.is_valid()`.
    pub queue: Queue,
    /// Becomes readable when the driver notifies this queue (a KVM ioeventfd).
    pub kick: EventFd,
}

/// All that a device gets when its driver sets DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory; clones share the mappings.
    pub memory: GuestMemoryMmap,
    /// One entry per queue of [`VirtioDevice::queue_max_sizes`], in that order.
    pub queues: Vec<ActiveQueue>,
    /// The device's interrupt.
    pub interrupt: Arc<Interrupt>,
    /// The feature bits that both sides accepted.
    pub features: u64,
}

impl Activation {
    /// Whether feature bit number `bit` was accepted.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }
}

/// Why a device could not start working.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The driver left a queue unused that the device cannot do without.
    #[error("the driver did not set up queue {0}")]
    QueueMissing(usize),
    /// A worker thread or one of its descriptors could not be made.
    #[error("a device worker could not be started")]
    Worker(#[from] io::Error),
}

/// A device behind a virtio transport.
///
/// The transport calls these one at a time. None may block for longer than it takes to stop a
/// worker, and none may panic on anything that the guest wrote.
pub trait VirtioDevice: Send {
    /// The device type (Virtio 1.2, section 5): `VIRTIO_ID_*`.
    fn device_type(&self) -> u32;

    /// The feature bits on offer. The transport adds VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX and
    /// VIRTIO_RING_F_INDIRECT_DESC.
    fn features(&self) -> u64;

    /// The largest size of each queue, powers of two up to 32,768.
    fn queue_max_sizes(&self) -> &[u16];

    /// Reads the configuration space at `offset`; what lies past its end reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space at `offset`; most devices have no writable field.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Starts work on the queues. Called at DRIVER_OK, never twice without a reset between.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops all work and drops the queues. When it returns, no worker touches guest memory.
    fn reset(&mut self);
}

/// Copies the part of `config` that starts at `offset` into `data`, as far as both reach.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let tail = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or(&[]);
    let len = tail.len().min(data.len());
    data[..len].copy_from_slice(&tail[..len]);
}
