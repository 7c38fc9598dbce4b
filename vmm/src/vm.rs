//! The KVM side of a machine: the VM, its memory slots, its interrupt controller and its vCPUs.

use std::ptr;
use std::sync::Arc;

use devices::virtio::mmio::{PAGE_SIZE, RegisterPage};
use kvm_bindings::{KVM_API_VERSION, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
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
    /// Held as `memory` is: each has the slot after those before it.
    shown: Vec<Arc<RegisterPage>>,
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
            shown: Vec::new(),
        })
    }

    /// Shows the guest `page` at `address`: it reads there without an exit, and writes exit all the
    /// same. Where this KVM has no such memory, reads exit too, to whom the bus has there: that
    /// takes longer, and nothing else changes.
    pub fn show(&mut self, address: u64, page: Arc<RegisterPage>) {
        if !self.kvm.check_extension(Cap::ReadonlyMem) {
            return;
        }
        let slot = kvm_userspace_memory_region {
            slot: (self.memory.num_regions() + self.shown.len()) as u32,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: address,
            memory_size: PAGE_SIZE,
            userspace_addr: ptr::from_ref(&*page).expose_provenance() as u64,
        };
        // SAFETY: `page` is PAGE_SIZE bytes, aligned to as many, with nothing else in it. `shown` holds it
        // from here on, so it is neither freed nor moved while the slot exists, which is as long as
        // the VM does: its handle is dropped before `shown`, and those of vCPUs before this. The
        // guest and KVM only read a slot with KVM_MEM_READONLY; what is read while this process writes
        // it are atomics.
        match unsafe { self.fd.set_user_memory_region(slot) } {
            Ok(()) => self.shown.push(page),
            Err(error) => {
                tracing::debug!("the registers at {address:#x} are read by exits: {error}")
            }
        }
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

#[cfg(test)]
mod tests {
    use devices::virtio::mmio::{INTERRUPT_ACK, MmioTransport, PAGE_OFFSET, QUEUE_NOTIFY};
    use devices::virtio::rng::Rng;
    use kvm_bindings::kvm_regs;
    use kvm_ioctls::VcpuExit;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::notify;

    const CODE: u16 = 0x1000;
    const MEMORY: usize = 0x8000;
    /// Where a transport begins, in what a processor in real mode reaches.
    const TRANSPORT: u16 = 0xe000 + PAGE_OFFSET as u16;
    const STATUS: u16 = 0x70;
    const CONFIGURATION: u16 = 0x100;

    /// 16-bit machine code.
    #[derive(Default)]
    struct Code(Vec<u8>);

    impl Code {
        /// `mov eax, [TRANSPORT + register]`
        fn load(mut self, register: u16) -> Self {
            self.0.extend([0x66, 0xa1]);
            self.0.extend((TRANSPORT + register).to_le_bytes());
            self
        }

        /// `mov [TRANSPORT + register], eax`
        fn store(mut self, register: u16) -> Self {
            self.0.extend([0x66, 0xa3]);
            self.0.extend((TRANSPORT + register).to_le_bytes());
            self
        }

        /// `mov eax, value`
        fn value(mut self, value: u32) -> Self {
            self.0.extend([0x66, 0xb8]);
            self.0.extend(value.to_le_bytes());
            self
        }
    }

    /// An entropy device on a VM whose vCPU is about to run `code`; None, and why is said, where there
    /// is no KVM or it has no read-only memory. In the order in which they are to be dropped.
    fn machine(code: &Code) -> Option<(VcpuFd, Vm, MmioTransport)> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        memory
            .write_slice(&code.0, GuestAddress(CODE.into()))
            .unwrap();
        let mut vm = match Vm::new(1, &memory) {
            Ok(vm) if vm.kvm.check_extension(Cap::ReadonlyMem) => vm,
            unusable => {
                println!("skipped: {unusable:?}");
                return None;
            }
        };
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let transport = MmioTransport::new(Box::new(Rng::new()), memory, line).unwrap();
        vm.show(u64::from(TRANSPORT) - PAGE_OFFSET, transport.page().clone());
        assert_eq!(vm.shown.len(), 1, "KVM has no slot for the page");
        notify::queue_notifications(&vm.fd, TRANSPORT.into(), transport.kicks()).unwrap();
        notify::acknowledgements(&vm.fd, TRANSPORT.into()).unwrap();
        let vcpu = vm.create_vcpus(1).unwrap().remove(0);
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        let regs = kvm_regs {
            rip: CODE.into(),
            rflags: 2,
            ..Default::default()
        };
        vcpu.set_regs(&regs).unwrap();
        Some((vcpu, vm, transport))
    }

    fn assert_writes(vcpu: &mut VcpuFd, register: u16, value: u32) {
        match vcpu.run().unwrap() {
            VcpuExit::MmioWrite(address, data) => {
                assert_eq!(address, u64::from(TRANSPORT + register));
                assert_eq!(data, value.to_le_bytes());
            }
            exit => panic!("{exit:?}"),
        }
    }

    #[test]
    fn registers_are_read_without_an_exit_and_the_configuration_space_is_not() {
        let code = Code::default()
            .load(0)
            .store(STATUS)
            .load(STATUS)
            .store(STATUS)
            .load(CONFIGURATION);
        let Some((mut vcpu, _vm, _transport)) = machine(&code) else {
            return;
        };
        let magic = u32::from_le_bytes(*b"virt");
        assert_writes(&mut vcpu, STATUS, magic);
        // What was written is for the device to take, and this one was not told.
        assert_writes(&mut vcpu, STATUS, 0);
        match vcpu.run().unwrap() {
            VcpuExit::MmioRead(address, _) => {
                assert_eq!(address, u64::from(TRANSPORT + CONFIGURATION));
            }
            exit => panic!("{exit:?}"),
        }
    }

    #[test]
    fn notifications_and_acknowledged_buffers_stay_in_the_kernel_and_other_writes_do_not() {
        let ack = INTERRUPT_ACK as u16;
        let code = Code::default()
            .value(1)
            .store(ack)
            .value(0)
            .store(QUEUE_NOTIFY as u16)
            .value(3)
            .store(ack)
            .value(7)
            .store(QUEUE_NOTIFY as u16);
        let Some((mut vcpu, _vm, transport)) = machine(&code) else {
            return;
        };
        assert_writes(&mut vcpu, ack, 3);
        assert_eq!(transport.kicks()[0].read().unwrap(), 1);
        assert_writes(&mut vcpu, QUEUE_NOTIFY as u16, 7);
        assert!(transport.kicks()[0].read().is_err());
    }
}
