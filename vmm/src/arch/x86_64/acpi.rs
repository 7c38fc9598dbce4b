//! ACPI tables: how a stock kernel finds CPUs, interrupts, devices and the power switch.
//!
//! Hardware-reduced ACPI 6.5: RSDP, XSDT, FADT, MADT and a DSDT with one `LNRO0005` device per
//! virtio-mmio transport, COM1, a power button, and a generic event device that announces it.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use devices::{power, serial};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{interrupts, layout};

const OEM_ID: [u8; 6] = *b"MVM   ";
const OEM_TABLE_ID: [u8; 8] = *b"MVMTABLE";
const OEM_REVISION: u32 = 1;
const TABLE_HEADER_LEN: u32 = 36;
const DSDT_REVISION: u8 = 2;

/// FADT IA-PC boot flags: what a PC would have and this machine has not (ACPI 6.5, table 5.10).
/// The 8042 bit stays clear, so a kernel does not look for a keyboard.
const IAPC_VGA_NOT_PRESENT: u16 = 1 << 2;
const IAPC_MSI_NOT_SUPPORTED: u16 = 1 << 3;
const IAPC_PCIE_ASPM_CONTROLS: u16 = 1 << 4;
const IAPC_CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

/// The MADT's id of the I/O APIC: past the APIC ids of all vCPUs.
const IOAPIC_ID: u8 = 0xff;

/// Device status: present, enabled, shown, working.
const STA_ALL: u8 = 0xf;

/// The notification that a power button sends when it is pressed.
const NOTIFY_PRESSED: u8 = 0x80;

/// A virtio-mmio device as the DSDT names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioNode {
    /// First address of its registers.
    pub address: u32,
    /// Length of its registers in bytes.
    pub len: u32,
    /// Its interrupt line, edge triggered.
    pub gsi: u32,
}

/// Why the tables could not be written.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AcpiError {
    /// They are longer than the room kept for them.
    #[error("the ACPI tables of {len} bytes do not fit the {room} bytes kept for them")]
    TooLong {
        /// Their length.
        len: u64,
        /// The room.
        room: u64,
    },
    /// The room is not guest memory.
    #[error("the ACPI tables do not fit the guest's memory")]
    Memory,
}

/// Writes the tables into guest memory at [`layout::ACPI_START`]; the RSDP is first.
pub fn write(memory: &GuestMemoryMmap, cpus: u8, virtio: &[VirtioNode]) -> Result<(), AcpiError> {
    let tables = build(layout::ACPI_START, cpus, virtio);
    let room = layout::ACPI_END - layout::ACPI_START;
    let len = tables.len() as u64;
    if len > room {
        return Err(AcpiError::TooLong { len, room });
    }
    memory
        .write_slice(&tables, GuestAddress(layout::ACPI_START))
        .map_err(|_| AcpiError::Memory)
}

/// All tables as they stand in memory from `base` on.
fn build(base: u64, cpus: u8, virtio: &[VirtioNode]) -> Vec<u8> {
    let mut blob = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut append = |bytes: &[u8]| {
        let address = base + blob.len() as u64;
        blob.extend_from_slice(bytes);
        blob.resize(blob.len().next_multiple_of(16), 0);
        address
    };
    let dsdt = append(dsdt(virtio).as_slice());
    let fadt = append(&to_bytes(&fadt(dsdt)));
    let madt = append(&to_bytes(&madt(cpus)));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = append(&to_bytes(&xsdt));
    let rsdp = to_bytes(&Rsdp::new(OEM_ID, xsdt));
    blob[..rsdp.len()].copy_from_slice(&rsdp);
    blob
}

fn to_bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn power_register(offset: u64) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        layout::POWER_PORT + offset,
    )
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (IAPC_VGA_NOT_PRESENT
        | IAPC_MSI_NOT_SUPPORTED
        | IAPC_PCIE_ASPM_CONTROLS
        | IAPC_CMOS_RTC_NOT_PRESENT)
        .into();
    fadt.reset_reg = power_register(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = power_register(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = power_register(power::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LAPIC_START),
    );
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(IOAPIC_ID, layout::IOAPIC_START, 0));
    madt
}

fn dsdt(virtio: &[VirtioNode]) -> Sdt {
    let mut sdt = Sdt::new(
        *b"DSDT",
        TABLE_HEADER_LEN,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    let mut body = Vec::new();
    for (uid, node) in virtio.iter().enumerate() {
        virtio_device(uid, *node, &mut body);
    }
    com1(&mut body);
    power_button(&mut body);
    event_device(&mut body);
    // The first element is the SLP_TYP value that power off writes.
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&power::SLP_TYP_S5]))
        .to_aml_bytes(&mut body);
    sdt.append_slice(&body);
    sdt
}

fn virtio_device(uid: usize, node: VirtioNode, body: &mut Vec<u8>) {
    aml::Device::new(
        format!("\\_SB_.V{uid:03X}").as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &uid),
            // The guest's caches see what the device writes.
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, node.address, node.len),
                    &aml::Interrupt::new(true, true, false, false, node.gsi),
                ]),
            ),
        ],
    )
    .to_aml_bytes(body);
}

fn com1(body: &mut Vec<u8>) {
    let port = serial::COM1_PORT as u16;
    aml::Device::new(
        "\\_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Interrupt::new(true, true, false, false, serial::COM1_IRQ),
                    &aml::IO::new(port, port, 1, serial::COM1_LEN as u8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(body);
}

fn power_button(body: &mut Vec<u8>) {
    aml::Device::new(
        "\\_SB_.PWRB".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C0C")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_STA".into(), &STA_ALL),
        ],
    )
    .to_aml_bytes(body);
}

/// The generic event device: its interrupt runs `_EVT`, which reads (and so clears) the pending
/// events and passes a press on to the button.
fn event_device(body: &mut Vec<u8>) {
    let register = (layout::POWER_PORT + power::GED_EVENT) as u16;
    let pressed = power::GED_POWER_BUTTON;
    aml::Device::new(
        "\\_SB_.GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    interrupts::GED_GSI,
                )]),
            ),
            &aml::OpRegion::new(
                "EREG".into(),
                aml::OpRegionSpace::SystemIO,
                &register,
                &aml::ONE,
            ),
            &aml::Field::new(
                "EREG".into(),
                aml::FieldAccessType::Byte,
                aml::FieldLockRule::NoLock,
                aml::FieldUpdateRule::WriteAsZeroes,
                vec![aml::FieldEntry::Named(*b"EVNT", 8)],
            ),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &aml::Store::new(&aml::Local(0), &aml::Path::new("EVNT")),
                    &aml::And::new(&aml::Local(1), &aml::Local(0), &pressed),
                    &aml::If::new(
                        &aml::Equal::new(&aml::Local(1), &pressed),
                        vec![&aml::Notify::new(
                            &aml::Path::new("\\_SB_.PWRB"),
                            &NOTIFY_PRESSED,
                        )],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = layout::ACPI_START;

    fn nodes(count: u32) -> Vec<VirtioNode> {
        (0..count)
            .map(|i| VirtioNode {
                address: layout::virtio_mmio(i) as u32,
                len: 0x1000,
                gsi: 6 + i,
            })
            .collect()
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Follows the pointers as a kernel does: RSDP, XSDT, its tables, and the FADT's DSDT.
    fn tables(blob: &[u8]) -> Vec<&[u8]> {
        assert_eq!(&blob[..8], b"RSD PTR ");
        assert_eq!(sum(&blob[..20]), 0, "RSDP checksum");
        assert_eq!(sum(&blob[..36]), 0, "RSDP extended checksum");
        let table = |address: u64| {
            let at = (address - BASE) as usize;
            let len = u32_at(blob, at + 4) as usize;
            &blob[at..at + len]
        };
        let xsdt = table(u64_at(blob, 24));
        let mut found = vec![xsdt];
        for entry in xsdt[36..].chunks(8) {
            found.push(table(u64_at(entry, 0)));
        }
        let fadt = found.iter().find(|t| &t[..4] == b"FACP").unwrap();
        found.push(table(u64_at(fadt, 140)));
        found
    }

    fn named<'a>(tables: &[&'a [u8]], signature: &[u8; 4]) -> &'a [u8] {
        tables.iter().find(|t| &t[..4] == signature).unwrap()
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        for (cpus, devices) in [(1, 0), (4, 5), (255, 18)] {
            let blob = build(BASE, cpus, &nodes(devices));
            let tables = tables(&blob);
            assert_eq!(tables.len(), 4);
            for table in tables {
                let name = String::from_utf8_lossy(&table[..4]).into_owned();
                assert_eq!(sum(table), 0, "checksum of {name}");
            }
            assert!(blob.len() as u64 <= layout::ACPI_END - layout::ACPI_START);
        }
    }

    #[test]
    fn the_madt_lists_each_cpu_and_the_ioapic() {
        let blob = build(BASE, 255, &[]);
        let tables = tables(&blob);
        let mut rest = &named(&tables, b"APIC")[44..];
        let mut ids = Vec::new();
        let mut ioapics = 0;
        while let [kind, len, ..] = *rest {
            match kind {
                0 => {
                    ids.push(rest[3]);
                    assert_eq!(u32_at(rest, 4), 1, "enabled");
                }
                1 => {
                    ioapics += 1;
                    assert_eq!(u32_at(rest, 4), layout::IOAPIC_START);
                }
                _ => panic!("structure {kind}"),
            }
            rest = &rest[usize::from(len)..];
        }
        assert_eq!(ids, (0..255).collect::<Vec<u8>>());
        assert_eq!(ioapics, 1);
    }

    #[test]
    fn the_fadt_is_hardware_reduced_and_names_the_power_registers() {
        let blob = build(BASE, 1, &[]);
        let tables = tables(&blob);
        let fadt = named(&tables, b"FACP");
        assert_ne!(u32_at(fadt, 112) & 1 << 20, 0, "HW_REDUCED_ACPI");
        assert_ne!(u32_at(fadt, 112) & 1 << 10, 0, "RESET_REG_SUP");
        for (at, register) in [
            (116, power::RESET),
            (244, power::SLEEP_CONTROL),
            (256, power::SLEEP_STATUS),
        ] {
            assert_eq!(
                fadt[at..at + 4],
                [1, 8, 0, 1],
                "space, width, offset, access"
            );
            assert_eq!(u64_at(fadt, at + 4), layout::POWER_PORT + register);
        }
        assert_eq!(fadt[128], power::RESET_VALUE);
        assert_eq!(fadt[109] & 0x2, 0, "no 8042");
    }

    #[test]
    fn the_dsdt_gives_each_virtio_device_its_registers_and_its_line() {
        let nodes = nodes(3);
        let blob = build(BASE, 1, &nodes);
        let tables = tables(&blob);
        let dsdt = named(&tables, b"DSDT");
        for (uid, node) in nodes.iter().enumerate() {
            let name = format!("V{uid:03X}");
            let at = dsdt
                .windows(4)
                .position(|w| w == name.as_bytes())
                .unwrap_or_else(|| panic!("no {name}"));
            let mut crs = vec![0x86, 9, 0, 1];
            crs.extend(node.address.to_le_bytes());
            crs.extend(node.len.to_le_bytes());
            crs.extend([0x89, 6, 0, 0b0011, 1]);
            crs.extend(node.gsi.to_le_bytes());
            assert!(
                dsdt[at..at + 100].windows(crs.len()).any(|w| w == crs),
                "resources of {name}"
            );
        }
        for name in [b"COM1", b"PWRB", b"GED_", b"_EVT", b"_S5_"] {
            assert!(dsdt.windows(4).any(|w| w == name), "{name:?}");
        }
    }
}
