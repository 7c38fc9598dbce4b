//! Model specific registers as a kernel expects them at its entry.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::ProcessorError;

const IA32_TSC: u32 = 0x10;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const IA32_STAR: u32 = 0xc000_0081;
const IA32_LSTAR: u32 = 0xc000_0082;
const IA32_CSTAR: u32 = 0xc000_0083;
const IA32_FMASK: u32 = 0xc000_0084;
const IA32_KERNEL_GS_BASE: u32 = 0xc000_0102;

/// IA32_MISC_ENABLE: fast string operations.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// IA32_MTRR_DEF_TYPE: MTRRs on, memory is write-back unless they say otherwise.
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Boot values; a register that is not here starts as KVM resets it.
const BOOT_MSRS: [(u32, u64); 11] = [
    (IA32_SYSENTER_CS, 0),
    (IA32_SYSENTER_ESP, 0),
    (IA32_SYSENTER_EIP, 0),
    (IA32_STAR, 0),
    (IA32_LSTAR, 0),
    (IA32_CSTAR, 0),
    (IA32_FMASK, 0),
    (IA32_KERNEL_GS_BASE, 0),
    (IA32_TSC, 0),
    (IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    (IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
];

/// Sets a vCPU's registers to their boot values.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), ProcessorError> {
    let entries = BOOT_MSRS.map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).map_err(|_| ProcessorError::TooManyMsrs)?;
    let written = vcpu
        .set_msrs(&msrs)
        .map_err(|source| ProcessorError::set("model specific registers", source))?;
    // KVM stops at the first register that it refuses.
    match entries.get(written) {
        None => Ok(()),
        Some(refused) => Err(ProcessorError::Msr(refused.index)),
    }
}
