//! Eventfds joined to KVM: a queue notification reaches a worker, and an interrupt reaches the
//! guest and is acknowledged, without an exit to user space.

use devices::virtio::mmio::{INT_VRING, INTERRUPT_ACK, QUEUE_NOTIFY};
use kvm_ioctls::{IoEventAddress, VmFd};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Why an eventfd could not be joined to KVM.
#[derive(Debug, Error)]
pub enum NotifyError {
    /// No descriptor.
    #[error("an eventfd could not be made")]
    EventFd(#[source] std::io::Error),
    /// The interrupt line.
    #[error("KVM refused an eventfd for interrupt line {gsi}")]
    Irqfd {
        /// The line.
        gsi: u32,
        /// The ioctl's error.
        source: kvm_ioctls::Error,
    },
    /// A register.
    #[error("KVM refused an eventfd for the register at {address:#x}")]
    Ioeventfd {
        /// Its guest physical address.
        address: u64,
        /// The ioctl's error.
        source: kvm_ioctls::Error,
    },
}

/// A new eventfd that raises line `gsi` (edge triggered) when it is written.
pub fn interrupt_line(vm: &VmFd, gsi: u32) -> Result<EventFd, NotifyError> {
    let line = EventFd::new(EFD_NONBLOCK).map_err(NotifyError::EventFd)?;
    vm.register_irqfd(&line, gsi)
        .map_err(|source| NotifyError::Irqfd { gsi, source })?;
    Ok(line)
}

/// Has KVM write `kicks[n]` when the driver writes n to the QueueNotify register of the transport
/// at `base`.
pub fn queue_notifications<'a>(
    vm: &VmFd,
    base: u64,
    kicks: impl IntoIterator<Item = &'a EventFd>,
) -> Result<(), NotifyError> {
    let address = base + QUEUE_NOTIFY;
    for (queue, kick) in (0u32..).zip(kicks) {
        vm.register_ioevent(kick, &IoEventAddress::Mmio(address), queue)
            .map_err(|source| NotifyError::Ioeventfd { address, source })?;
    }
    Ok(())
}

/// Has KVM take it when the driver of the transport at `base` acknowledges an interrupt for used
/// buffers, so that nobody leaves the guest for that.
pub fn acknowledgements(vm: &VmFd, base: u64) -> Result<(), NotifyError> {
    let address = base + INTERRUPT_ACK;
    // KVM keeps what it needs of an eventfd that is closed here. Nobody reads its counter, which
    // stays at its largest value should it ever get there.
    let nobody = EventFd::new(EFD_NONBLOCK).map_err(NotifyError::EventFd)?;
    vm.register_ioevent(&nobody, &IoEventAddress::Mmio(address), INT_VRING)
        .map_err(|source| NotifyError::Ioeventfd { address, source })
}
