//! The guest's physical address space and its ports.
//!
//! ```text
//! 0x0000_0000  RAM: GDT, boot data, page tables, command line; ends at the EBDA's old place
//! 0x000e_0000  ACPI tables, RSDP first
//! 0x0010_0000  RAM: kernel, and the initial RAM disk at its upper end
//! 0xc000_0000  hole: virtio-mmio registers, IOAPIC, local APICs, KVM's own pages
//! 0x1_0000_0000  RAM above 3 GiB
//! ```

use devices::virtio::mmio::{PAGE_OFFSET, PAGE_SIZE};

/// The GDT that the boot processor starts with.
pub const GDT_START: u64 = 0x500;
/// The (empty) IDT that the boot processor starts with.
pub const IDT_START: u64 = 0x520;
/// PVH: `hvm_start_info`.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH: the list of modules, one entry.
pub const PVH_MODLIST: u64 = 0x6040;
/// PVH: the memory map.
pub const PVH_MEMMAP: u64 = 0x6100;
/// 64-bit boot protocol: `boot_params`, one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// 64-bit boot protocol: the first stack grows down from here.
pub const BOOT_STACK: u64 = 0x8ff0;
/// 64-bit boot protocol: page tables (PML4, PDPT, four page directories).
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Linux's COMMAND_LINE_SIZE on x86: the command line with its final NUL.
pub const CMDLINE_MAX: usize = 2048;
/// Where low RAM ends and the EBDA of a PC would begin.
pub const EBDA_START: u64 = 0x9_fc00;

/// ACPI tables, the RSDP first: in the range that kernels search for it.
pub const ACPI_START: u64 = 0xe_0000;
/// End of the room for ACPI tables.
pub const ACPI_END: u64 = 0x10_0000;

/// RAM from here on is the kernel's.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// Start of the hole below 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Where the virtio-mmio devices begin, each with two pages: its registers end the first, which can
/// be read-only memory, and its configuration space begins the second, which never is.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// The I/O APIC's registers.
pub const IOAPIC_START: u32 = 0xfec0_0000;
/// The local APICs' registers.
pub const LAPIC_START: u32 = 0xfee0_0000;
/// One page for KVM on Intel hosts without unrestricted guests.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM on Intel hosts, right after the identity map.
pub const KVM_TSS: usize = 0xfffb_d000;

/// The port of the ACPI power registers (`devices::power::Power`).
pub const POWER_PORT: u64 = 0x600;

/// The port that calls are written to, as four bytes ([`crate::Calls`]). Few are below it: Linux copies the permissions for
/// all of those when it switches to a program that may write there.
pub const CALL_PORT: u16 = 0x620;

/// How many ports there are for it.
pub const CALL_PORTS: u64 = 4;

/// The regions of `size` bytes of RAM as (address, length).
pub fn memory_regions(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(HOLE_START);
    let mut regions = vec![(0, low)];
    if size > low {
        regions.push((HOLE_END, size - low));
    }
    regions
}

/// Where the registers of virtio-mmio device `index` begin.
pub fn virtio_mmio(index: u32) -> u64 {
    VIRTIO_MMIO_START + u64::from(index) * 2 * PAGE_SIZE + PAGE_OFFSET
}

/// Where RAM below the hole ends, for `size` bytes of RAM.
pub fn low_ram_end(size: u64) -> u64 {
    size.min(HOLE_START)
}

/// A range of the memory map that the guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// E820 type: [`E820_RAM`] or [`E820_RESERVED`].
    pub kind: u32,
}

/// Usable memory.
pub const E820_RAM: u32 = 1;
/// Memory that the guest leaves alone.
pub const E820_RESERVED: u32 = 2;

/// The memory map of `size` bytes of RAM, ascending.
pub fn memory_map(size: u64) -> Vec<MapEntry> {
    let ram = |start, end| MapEntry {
        start,
        len: end - start,
        kind: E820_RAM,
    };
    let mut map = vec![
        ram(0, EBDA_START),
        MapEntry {
            start: ACPI_START,
            len: ACPI_END - ACPI_START,
            kind: E820_RESERVED,
        },
        ram(HIGH_RAM_START, low_ram_end(size)),
    ];
    if size > HOLE_START {
        map.push(ram(HOLE_END, HOLE_END + (size - HOLE_START)));
    }
    map
}

#[cfg(test)]
mod tests {
    use devices::virtio::mmio::MMIO_SIZE;

    use super::*;

    #[test]
    fn regions_hold_all_memory_and_leave_the_hole_free() {
        for size in [32 << 20, HOLE_START, HOLE_START + 4096, 300 << 30] {
            let regions = memory_regions(size);
            assert_eq!(regions.iter().map(|r| r.1).sum::<u64>(), size);
            for (start, len) in regions {
                assert!(
                    start + len <= HOLE_START || start >= HOLE_END,
                    "{start:#x}+{len:#x} of {size:#x}"
                );
            }
        }
    }

    #[test]
    fn no_virtio_device_reaches_into_the_pages_of_another() {
        for index in 0..32 {
            assert_eq!(virtio_mmio(index) % PAGE_SIZE, PAGE_OFFSET);
            let end = virtio_mmio(index) + MMIO_SIZE;
            assert!(end <= virtio_mmio(index + 1) / PAGE_SIZE * PAGE_SIZE);
        }
        assert!(virtio_mmio(32) < u64::from(IOAPIC_START));
    }

    #[test]
    fn the_memory_map_ascends_and_names_no_memory_that_is_not_there() {
        for size in [32 << 20, HOLE_START, 6 << 30] {
            let regions = memory_regions(size);
            let map = memory_map(size);
            let mut end = 0;
            for entry in map {
                assert!(entry.start >= end, "{entry:x?}");
                end = entry.start + entry.len;
                assert!(
                    regions
                        .iter()
                        .any(|(start, len)| *start <= entry.start && end <= start + len),
                    "{entry:x?} of {size:#x}"
                );
            }
        }
    }
}
