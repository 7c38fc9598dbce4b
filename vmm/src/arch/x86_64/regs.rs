//! The boot processor's registers at a kernel's entry, and the descriptor and page tables they
//! point at.
//!
//! PVH: 32-bit protected mode without paging, EBX at `hvm_start_info` (Xen, `x86-pvh.txt`).
//! 64-bit: long mode with low memory mapped one to one, RSI at `boot_params` (Linux, `boot.rst`).

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{ProcessorError, layout};

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Present and writable page table entries, and those that map 2 MiB.
const PTE_TABLE: u64 = 0x3;
const PTE_HUGE: u64 = 0x83;

/// RFLAGS with no flag but the one that is always set.
const RFLAGS_NONE: u64 = 0x2;

/// GDT entries: null, null, code, data, task state; selectors are index times 8.
const CODE_INDEX: u16 = 2;
const DATA_INDEX: u16 = 3;
const TSS_INDEX: u16 = 4;

/// The state the x87 and SSE units reset to.
const FCW_RESET: u16 = 0x37f;
const MXCSR_RESET: u32 = 0x1f80;

/// How a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// The PVH entry point, 32-bit.
    Pvh {
        /// Guest physical address of the first instruction.
        address: u64,
    },
    /// The 64-bit entry point of the Linux boot protocol.
    Linux64 {
        /// Guest physical address of the first instruction.
        address: u64,
    },
}

/// Sets floating point state as after a reset.
pub fn set_fpu(vcpu: &VcpuFd) -> Result<(), ProcessorError> {
    let fpu = kvm_fpu {
        fcw: FCW_RESET,
        mxcsr: MXCSR_RESET,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu)
        .map_err(|source| ProcessorError::set("floating point state", source))
}

/// Writes the tables that [`set_entry`] points the boot processor at.
pub fn write_tables(memory: &GuestMemoryMmap, entry: Entry) -> Result<(), ProcessorError> {
    let write = |bytes: &[u64], at: u64| {
        for (address, value) in (at..).step_by(8).zip(bytes) {
            memory
                .write_obj(*value, GuestAddress(address))
                .map_err(|_| ProcessorError::Tables)?;
        }
        Ok(())
    };
    let is_64_bit = matches!(entry, Entry::Linux64 { .. });
    write(&gdt(is_64_bit), layout::GDT_START)?;
    write(&[0], layout::IDT_START)?;
    if is_64_bit {
        let pdpt = layout::PAGE_TABLES + 0x1000;
        let directories = layout::PAGE_TABLES + 0x2000;
        write(&[pdpt | PTE_TABLE], layout::PAGE_TABLES)?;
        let pdpt_entries: Vec<u64> = (0..4)
            .map(|gib| (directories + gib * 0x1000) | PTE_TABLE)
            .collect();
        write(&pdpt_entries, pdpt)?;
        let pages: Vec<u64> = (0..4 * 512).map(|page| page << 21 | PTE_HUGE).collect();
        write(&pages, directories)?;
    }
    Ok(())
}

/// Sets the boot processor's registers to enter the kernel.
pub fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), ProcessorError> {
    let mut sregs = vcpu
        .get_sregs()
        .map_err(|source| ProcessorError::set("segment registers", source))?;
    let regs = match entry {
        Entry::Pvh { address } => {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            kvm_regs {
                rflags: RFLAGS_NONE,
                rip: address,
                rbx: layout::PVH_START_INFO,
                ..Default::default()
            }
        }
        Entry::Linux64 { address } => {
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            kvm_regs {
                rflags: RFLAGS_NONE,
                rip: address,
                rsi: layout::ZERO_PAGE,
                rsp: layout::BOOT_STACK,
                rbp: layout::BOOT_STACK,
                ..Default::default()
            }
        }
    };
    set_segments(&mut sregs, matches!(entry, Entry::Linux64 { .. }));
    vcpu.set_sregs(&sregs)
        .map_err(|source| ProcessorError::set("segment registers", source))?;
    vcpu.set_regs(&regs)
        .map_err(|source| ProcessorError::set("general registers", source))
}

fn set_segments(sregs: &mut kvm_sregs, is_64_bit: bool) {
    let flat = |index: u16, type_: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    };
    let mut code = flat(CODE_INDEX, 0xb);
    if is_64_bit {
        (code.db, code.l) = (0, 1);
    }
    let data = flat(DATA_INDEX, 0x3);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: TSS_INDEX * 8,
        s: 0,
        db: 0,
        g: 0,
        ..flat(TSS_INDEX, 0xb)
    };
    sregs.gdt.base = layout::GDT_START;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = layout::IDT_START;
    sregs.idt.limit = 7;
}

/// Flat code and data segments and a task state segment, as [`set_segments`] loads them.
fn gdt(is_64_bit: bool) -> [u64; 5] {
    let code = if is_64_bit {
        0x00af_9b00_0000_ffff
    } else {
        0x00cf_9b00_0000_ffff
    };
    [0, 0, code, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]
}
