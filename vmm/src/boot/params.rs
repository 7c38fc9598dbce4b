//! What a kernel is told at its entry: PVH's `hvm_start_info`, or Linux's `boot_params`.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{LOADED_HIGH, boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::initrd::InitrdRange;
use super::kernel::LoadedKernel;
use crate::arch::Entry;
use crate::arch::layout::{self, MapEntry};

/// `boot_params.hdr.boot_flag` and `header`, which a kernel checks.
const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = 0x5372_6448;
/// A boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// PVH: the version of `hvm_start_info` that has a memory map.
const START_INFO_VERSION: u32 = 1;

/// Why the kernel could not be told what the machine is.
#[derive(Debug, Error)]
pub enum ParamsError {
    /// They do not fit.
    #[error("the kernel's boot parameters could not be written")]
    Write(#[source] linux_loader::configurator::Error),
    /// More memory ranges than the protocol has room for.
    #[error("the memory map has more ranges than the boot protocol has room for")]
    TooManyRanges,
}

/// Writes what `kernel` expects at its entry.
pub fn write(
    memory: &GuestMemoryMmap,
    kernel: &LoadedKernel,
    map: &[MapEntry],
    initrd: Option<InitrdRange>,
) -> Result<(), ParamsError> {
    match kernel.entry {
        Entry::Pvh { .. } => write_pvh(memory, map, initrd),
        Entry::Linux64 { .. } => write_linux(memory, kernel.setup_header, map, initrd),
    }
}

fn write_pvh(
    memory: &GuestMemoryMmap,
    map: &[MapEntry],
    initrd: Option<InitrdRange>,
) -> Result<(), ParamsError> {
    let memmap: Vec<_> = map
        .iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.len,
            type_: entry.kind,
            reserved: 0,
        })
        .collect();
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: START_INFO_VERSION,
        cmdline_paddr: layout::CMDLINE_START,
        rsdp_paddr: layout::ACPI_START,
        memmap_paddr: layout::PVH_MEMMAP,
        memmap_entries: memmap.len() as u32,
        ..Default::default()
    };
    if initrd.is_some() {
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODLIST;
    }
    let mut params = BootParams::new(&info, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&memmap, GuestAddress(layout::PVH_MEMMAP));
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.size,
            ..Default::default()
        };
        params.set_modules(&[module], GuestAddress(layout::PVH_MODLIST));
    }
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(ParamsError::Write)
}

fn write_linux(
    memory: &GuestMemoryMmap,
    header: Option<setup_header>,
    map: &[MapEntry],
    initrd: Option<InitrdRange>,
) -> Result<(), ParamsError> {
    let mut params = boot_params {
        hdr: header.unwrap_or_default(),
        acpi_rsdp_addr: layout::ACPI_START,
        ..Default::default()
    };
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HDRS;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags |= LOADED_HIGH;
    params.hdr.cmd_line_ptr = layout::CMDLINE_START as u32;
    params.hdr.cmdline_size = (layout::CMDLINE_MAX - 1) as u32;
    if let Some(initrd) = initrd {
        // Below the hole, so 32 bits hold both.
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
    }
    let mut table = params.e820_table;
    if map.len() > table.len() {
        return Err(ParamsError::TooManyRanges);
    }
    for (slot, entry) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.len,
            r#type: entry.kind,
        };
    }
    params.e820_table = table;
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(layout::ZERO_PAGE)),
        memory,
    )
    .map_err(ParamsError::Write)
}
