//! A PC without its legacy: local APICs and an I/O APIC, COM1, ACPI, and virtio-mmio in the hole.

pub mod acpi;
mod cpuid;
pub mod interrupts;
pub mod layout;
mod msr;
mod regs;
mod tsc;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

pub use regs::Entry;
pub use tsc::tsc_khz;

/// What this architecture needs of KVM.
pub const REQUIRED_CAPABILITIES: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

/// Why a vCPU could not be set up.
#[derive(Debug, Error)]
pub enum ProcessorError {
    /// KVM does not tell what CPUID can show.
    #[error("KVM does not say which CPU features it supports")]
    SupportedCpuid(#[source] kvm_ioctls::Error),
    /// The guest's memory needs more address bits than the CPU has.
    #[error("guest memory up to {end:#x} needs more than this CPU's {bits} physical address bits")]
    AddressBits {
        /// End of guest memory.
        end: u64,
        /// Physical address bits.
        bits: u32,
    },
    /// More leaves than KVM takes.
    #[error("this host's CPU has more CPUID leaves than KVM takes")]
    TooManyLeaves,
    /// More registers than KVM takes.
    #[error("more model specific registers are to be set than KVM takes")]
    TooManyMsrs,
    /// KVM refused a register.
    #[error("KVM refused the model specific register {0:#x}")]
    Msr(u32),
    /// KVM refused a part of the state.
    #[error("KVM refused to set a vCPU's {what}")]
    Set {
        /// Which part.
        what: &'static str,
        /// The ioctl's error.
        source: kvm_ioctls::Error,
    },
    /// The first page of guest memory is not there.
    #[error("descriptor and page tables do not fit the guest's memory")]
    Tables,
}

impl ProcessorError {
    fn set(what: &'static str, source: kvm_ioctls::Error) -> Self {
        Self::Set { what, source }
    }
}

/// Sets up what belongs to the machine as a whole; before any vCPU is made.
pub fn set_up_vm(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)?;
    vm.set_tss_address(layout::KVM_TSS)?;
    vm.create_irq_chip()
}

/// What all vCPUs of a machine have in common.
#[derive(Debug)]
pub struct Processor {
    leaves: Vec<kvm_cpuid_entry2>,
}

impl Processor {
    /// The processor of a machine with `cpus` vCPUs and guest memory that ends at `memory_end`.
    ///
    /// `first` is its first vCPU: its TSC tells the frequency of all.
    pub fn new(
        kvm: &Kvm,
        first: Option<&VcpuFd>,
        cpus: u8,
        memory_end: u64,
    ) -> Result<Self, ProcessorError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ProcessorError::SupportedCpuid)?;
        let bits = cpuid::physical_address_bits(&supported);
        if bits < 64 && memory_end > 1 << bits {
            return Err(ProcessorError::AddressBits {
                end: memory_end,
                bits,
            });
        }
        let topology = cpuid::Topology {
            cpus,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            cmpxchg16b: is_x86_feature_detected!("cmpxchg16b"),
            tsc_khz: first.and_then(|vcpu| vcpu.get_tsc_khz().ok()),
        };
        Ok(Self {
            leaves: cpuid::shape(&supported, topology),
        })
    }

    /// Sets up a vCPU; `entry` is where the boot processor (id 0) starts. The others wait for it.
    pub fn set_up_vcpu(&self, vcpu: &VcpuFd, id: u8, entry: Entry) -> Result<(), ProcessorError> {
        let leaves = cpuid::for_vcpu(&self.leaves, id);
        let cpuid = CpuId::from_entries(&leaves).map_err(|_| ProcessorError::TooManyLeaves)?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(|source| ProcessorError::set("CPUID", source))?;
        msr::set_boot_msrs(vcpu)?;
        regs::set_fpu(vcpu)?;
        if id == 0 {
            regs::set_entry(vcpu, entry)?;
        }
        interrupts::set_lint(vcpu)
    }
}

/// Writes what the boot processor's registers point at.
pub fn write_boot_tables(memory: &GuestMemoryMmap, entry: Entry) -> Result<(), ProcessorError> {
    regs::write_tables(memory, entry)
}

/// A vCPU's instruction pointer, for messages.
pub fn instruction_pointer(vcpu: &VcpuFd) -> Option<u64> {
    vcpu.get_regs().ok().map(|regs| regs.rip)
}
