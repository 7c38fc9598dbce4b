//! Interrupt lines, and the local APIC's two pins.

use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;

use super::ProcessorError;

/// The line of the generic event device.
pub const GED_GSI: u32 = 5;
/// The first line for virtio devices; lines below 16 also reach the (masked) PIC.
pub const VIRTIO_GSI_FIRST: u32 = 6;
/// The last input of the I/O APIC.
pub const GSI_LAST: u32 = 23;

/// Local vector table registers (Intel SDM volume 3, table "Local APIC Register Address Map").
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;

const DELIVERY_MODE_SHIFT: u32 = 8;
const DELIVERY_NMI: u32 = 0x4;
const DELIVERY_EXTINT: u32 = 0x7;

/// Sets LINT0 to external interrupts and LINT1 to NMI, as firmware does.
pub fn set_lint(vcpu: &VcpuFd) -> Result<(), ProcessorError> {
    let mut lapic = vcpu
        .get_lapic()
        .map_err(|source| ProcessorError::set("local APIC", source))?;
    set_delivery_mode(&mut lapic, APIC_LVT_LINT0, DELIVERY_EXTINT);
    set_delivery_mode(&mut lapic, APIC_LVT_LINT1, DELIVERY_NMI);
    vcpu.set_lapic(&lapic)
        .map_err(|source| ProcessorError::set("local APIC", source))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let bytes = &mut lapic.regs[register..register + 4];
    let mut value = [0; 4];
    for (to, from) in value.iter_mut().zip(bytes.iter()) {
        *to = *from as u8;
    }
    let value =
        u32::from_le_bytes(value) & !(0x7 << DELIVERY_MODE_SHIFT) | mode << DELIVERY_MODE_SHIFT;
    for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
        *to = from as i8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delivery_mode_replaces_only_its_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[APIC_LVT_LINT0..APIC_LVT_LINT0 + 4].copy_from_slice(&[-1; 4]);
        set_delivery_mode(&mut lapic, APIC_LVT_LINT0, DELIVERY_NMI);
        assert_eq!(
            lapic.regs[APIC_LVT_LINT0..APIC_LVT_LINT0 + 4],
            [-1, 0xfcu8 as i8, -1, -1]
        );
        assert_eq!(lapic.regs[APIC_LVT_LINT1], 0);
    }
}
