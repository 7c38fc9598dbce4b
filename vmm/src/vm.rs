//! The KVM side of a machine: the VM, its memory slots, its interrupt controller and its vCPUs.

use kvm_bindings::{KVM_API_VERSION, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::arch;

/// Why KVM could not be given a machine.
#[derive(Debug, Error)]
pub enum VmError {
    /// The device cannot be opened.
    #[error("/dev/kvm could not be opened; is KVM enabled, and may this user use it?")]
    Open(#[source] kvm_ioctls::Error),
    /// Not the KVM interface that has been stable since Linux 2.6.22.
    #[error("KVM speaks version {0} of its interface; version 12 is needed")]
    Version(i32),
    /// The host's KVM is too old or too small.
    #[error("this host's KVM lacks {0}, which a machine needs")]
    Capability(&'static str),
    /// More vCPUs than KVM allows.
    #[error("{asked} CPUs are more than the {max} that this host's KVM allows")]
    TooManyCpus {
        /// Asked for.
        asked: u8,
        /// Allowed.
        max: usize,
    },
    /// An ioctl failed.
    #[error("KVM could not {what}")]
    Ioctl {
        /// What it was asked for, as a verb phrase.
        what: &'static str,
        /// The ioctl's error.
        source: kvm_ioctls::Error,
    },
}

impl VmError {
    fn ioctl(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Ioctl { what, source }
    }
}

/// A VM with memory and an interrupt controller in the kernel.
#[derive(Debug)]
pub struct Vm {
    kvm: Kvm,
    fd: VmFd,
    /// Held so that the slots' mappings outlive the VM.
    memory: GuestMemoryMmap,
}

impl Vm {
    /// A VM for `cpus` vCPUs that sees `memory`.
    pub fn new(cpus: u8, memory: &GuestMemoryMmap) -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(VmError::Open)?;
        check_host(&kvm, cpus)?;
        let fd = kvm.create_vm().map_err(VmError::ioctl("create a VM"))?;
        arch::set_up_vm(&fd).map_err(VmError::ioctl("create its interrupt controller"))?;
        for (slot, region) in (0..).zip(memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is one live mapping of that length. `memory` keeps it mapped for
            // as long as the VM exists, and nothing else in this process relies on its contents:
            // guest memory is only accessed through vm-memory's volatile accessors.
            unsafe { fd.set_user_memory_region(slot) }
                .map_err(VmError::ioctl("map guest memory"))?;
        }
        Ok(Self {
            kvm,
            fd,
            memory: memory.clone(),
        })
    }

    /// The system-wide handle.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The VM's handle, for eventfds.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Makes `cpus` vCPUs, numbered from 0.
    pub fn create_vcpus(&self, cpus: u8) -> Result<Vec<VcpuFd>, VmError> {
        (0..cpus)
            .map(|id| {
                self.fd
                    .create_vcpu(id.into())
                    .map_err(VmError::ioctl("create a vCPU"))
            })
            .collect()
    }
}

fn check_host(kvm: &Kvm, cpus: u8) -> Result<(), VmError> {
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(VmError::Version(version));
    }
    for (capability, name) in arch::REQUIRED_CAPABILITIES {
        if !kvm.check_extension(*capability) {
            return Err(VmError::Capability(name));
        }
    }
    let max = kvm.get_max_vcpus();
    if usize::from(cpus) > max {
        return Err(VmError::TooManyCpus { asked: cpus, max });
    }
    Ok(())
}
