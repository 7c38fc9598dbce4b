//! The probe guest: a hundred instructions that every Linux kernel executes, and the machine state
//! that they start in.
//!
//! The code is linked into this program's read-only data, copied into the guest, and runs there in
//! 64-bit mode at [`CODE`]. Before each step it stores the step's number at [`STEP_BYTE`], so that
//! whatever goes wrong, memory tells where. It ends with a byte on port [`REPORT_PORT`].

use std::arch::global_asm;

use kvm_bindings::{kvm_dtable, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// Bytes of guest memory, from address 0.
pub(super) const MEMORY_LEN: usize = 0x1_0000;
/// Where the guest begins.
pub(super) const CODE: u64 = 0x8000;
/// Where its stack ends.
pub(super) const STACK_TOP: u64 = 0x8000;
/// The byte that holds the number of the step that runs.
pub(super) const STEP_BYTE: u64 = 0xa000;
/// The port of its last word.
pub(super) const REPORT_PORT: u16 = 0xe9;
/// The last word when every step did what it should.
pub(super) const PASSED: u8 = 0;
/// The last word when an instruction had another result than it should have.
pub(super) const WRONG_RESULT: u8 = 1;
/// The last word when an exception came that no step asks for.
pub(super) const UNEXPECTED_EXCEPTION: u8 = 2;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT: u64 = 0x4000;
const TSS: u64 = 0x5000;
const IDT: u64 = 0x6000;
const SCRATCH: u64 = 0xa010;
const XSAVE_AREA: u64 = 0xb000;

const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
const TSS_SELECTOR: u16 = 0x18;

/// What each step is, by its number.
pub(super) const STEPS: [&str; 12] = [
    "entering the guest",
    "its first instruction",
    "wrmsr and rdmsr",
    "cpuid",
    "int3 through an interrupt descriptor table",
    "iretq",
    "swapgs",
    "flushing the TLB",
    "popcnt",
    "cmpxchg16b",
    "xsave and xrstor",
    "stac and clac",
];

global_asm!(
    ".pushsection .rodata.mvm_probe_guest, \"a\", @progbits",
    ".global mvm_probe_guest_start",
    ".hidden mvm_probe_guest_start",
    "mvm_probe_guest_start:",
    "    mov byte ptr [{step}], 1",
    "    cld",
    // MSR_LSTAR: what the kernel's syscall entry is written to.
    "    mov byte ptr [{step}], 2",
    "    mov ecx, 0xc0000082",
    "    mov eax, 0x12345678",
    "    xor edx, edx",
    "    wrmsr",
    "    xor eax, eax",
    "    rdmsr",
    "    cmp eax, 0x12345678",
    "    jne 90f",
    // Features go to r8 (leaf 1 ecx) and r9 (leaf 7 ebx).
    "    mov byte ptr [{step}], 3",
    "    xor r9d, r9d",
    "    xor eax, eax",
    "    cpuid",
    "    mov r11d, eax",
    "    mov eax, 1",
    "    xor ecx, ecx",
    "    cpuid",
    "    mov r8d, ecx",
    "    cmp r11d, 7",
    "    jb 20f",
    "    mov eax, 7",
    "    xor ecx, ecx",
    "    cpuid",
    "    mov r9d, ebx",
    "20:",
    "    mov byte ptr [{step}], 4",
    "    xor r10d, r10d",
    "    int3",
    "    cmp r10d, 3",
    "    jne 90f",
    "    mov byte ptr [{step}], 5",
    "    mov rax, rsp",
    "    push {data}",
    "    push rax",
    "    pushfq",
    "    push {code}",
    "    lea rax, [rip + 21f]",
    "    push rax",
    "    iretq",
    "21:",
    "    mov byte ptr [{step}], 6",
    "    swapgs",
    "    swapgs",
    "    mov byte ptr [{step}], 7",
    "    mov rax, cr3",
    "    mov cr3, rax",
    "    invlpg [{scratch}]",
    "    mov byte ptr [{step}], 8",
    "    bt r8d, 23",
    "    jnc 22f",
    "    mov eax, 0xf0f1",
    "    popcnt eax, eax",
    "    cmp eax, 9",
    "    jne 90f",
    "22:",
    "    mov byte ptr [{step}], 9",
    "    bt r8d, 13",
    "    jnc 23f",
    "    xor eax, eax",
    "    xor edx, edx",
    "    mov ebx, 1",
    "    mov ecx, 2",
    "    lock cmpxchg16b xmmword ptr [{scratch}]",
    "    jne 90f",
    "    cmp qword ptr [{scratch} + 8], 2",
    "    jne 90f",
    "23:",
    // CR4.OSXSAVE, all of x87, SSE and AVX that there is, out to memory and back.
    "    mov byte ptr [{step}], 10",
    "    bt r8d, 26",
    "    jnc 24f",
    "    mov rax, cr4",
    "    or eax, 0x40000",
    "    mov cr4, rax",
    "    mov eax, 0xd",
    "    xor ecx, ecx",
    "    cpuid",
    "    and eax, 7",
    "    xor edx, edx",
    "    xor ecx, ecx",
    "    xsetbv",
    "    xgetbv",
    "    xsave64 [{xsave}]",
    "    xrstor64 [{xsave}]",
    "24:",
    "    mov byte ptr [{step}], 11",
    "    bt r9d, 20",
    "    jnc 25f",
    "    mov rax, cr4",
    "    or eax, 0x200000",
    "    mov cr4, rax",
    "    stac",
    "    clac",
    "25:",
    "    mov al, {passed}",
    "    jmp 91f",
    "90:",
    "    mov al, {wrong}",
    "91:",
    "    out {port}, al",
    "92:",
    "    hlt",
    "    jmp 92b",
    ".global mvm_probe_guest_breakpoint",
    ".hidden mvm_probe_guest_breakpoint",
    "mvm_probe_guest_breakpoint:",
    "    mov r10d, 3",
    "    iretq",
    ".global mvm_probe_guest_exception",
    ".hidden mvm_probe_guest_exception",
    "mvm_probe_guest_exception:",
    "    mov al, {exception}",
    "    jmp 91b",
    ".global mvm_probe_guest_end",
    ".hidden mvm_probe_guest_end",
    "mvm_probe_guest_end:",
    ".popsection",
    step = const STEP_BYTE,
    scratch = const SCRATCH,
    xsave = const XSAVE_AREA,
    code = const CODE_SELECTOR,
    data = const DATA_SELECTOR,
    port = const REPORT_PORT,
    passed = const PASSED,
    wrong = const WRONG_RESULT,
    exception = const UNEXPECTED_EXCEPTION,
);

unsafe extern "C" {
    static mvm_probe_guest_start: u8;
    static mvm_probe_guest_breakpoint: u8;
    static mvm_probe_guest_exception: u8;
    static mvm_probe_guest_end: u8;
}

/// The guest's code, and the offsets in it of its breakpoint and exception handlers.
fn program() -> (&'static [u8], u64, u64) {
    let start = &raw const mvm_probe_guest_start;
    let offset = |label: *const u8| label.addr() - start.addr();
    let len = offset(&raw const mvm_probe_guest_end);
    // SAFETY: both labels stand in one read-only section that the assembler above fills, the end
    // after the start, so all bytes between them are initialized and never change.
    let code = unsafe { std::slice::from_raw_parts(start, len) };
    (
        code,
        offset(&raw const mvm_probe_guest_breakpoint) as u64,
        offset(&raw const mvm_probe_guest_exception) as u64,
    )
}

/// Writes page tables, descriptor tables and the program into guest memory.
pub(super) fn load(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0x3;
    const HUGE: u64 = 0x80;
    const BREAKPOINT: u64 = 3;
    const VECTORS: u64 = 32;

    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    memory.write_obj(PD | PRESENT_WRITABLE, GuestAddress(PDPT))?;
    memory.write_obj(PRESENT_WRITABLE | HUGE, GuestAddress(PD))?;

    // iretq and interrupts load these again, so the tables must agree with the segments of `sregs`.
    let gdt: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (at, descriptor) in (GDT..).step_by(8).zip(gdt) {
        memory.write_obj(descriptor, GuestAddress(at))?;
    }
    let (code, breakpoint, exception) = program();
    memory.write_slice(code, GuestAddress(CODE))?;
    for vector in 0..VECTORS {
        let handler = match vector {
            BREAKPOINT => CODE + breakpoint,
            _ => CODE + exception,
        };
        // A present 64-bit interrupt gate; its handler lies below 64 KiB.
        let gate = 0x8e00 << 32 | u64::from(CODE_SELECTOR) << 16 | handler;
        memory.write_obj(gate, GuestAddress(IDT + vector * 16))?;
    }
    Ok(())
}

/// Puts a vCPU into 64-bit mode with the tables that [`load`] wrote.
pub(super) fn set_long_mode(sregs: &mut kvm_sregs) {
    const CR0_PE_MP_ET_NE_WP_PG: u64 = 0x8001_0033;
    const CR4_PAE_OSFXSR_OSXMMEXCPT: u64 = 0x620;
    const EFER_SCE_LME_LMA: u64 = 0x501;

    let segment = |selector: u16, type_: u8, long: u8| kvm_segment {
        selector,
        limit: 0xffff_ffff,
        type_,
        present: 1,
        s: 1,
        l: long,
        db: 1 - long,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(CODE_SELECTOR, 0xb, 1);
    let data = segment(DATA_SELECTOR, 0x3, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: TSS,
        limit: 0x67,
        selector: TSS_SELECTOR,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    let table = |base, limit| kvm_dtable {
        base,
        limit,
        ..Default::default()
    };
    sregs.gdt = table(GDT, 0x17);
    sregs.idt = table(IDT, 0x1ff);
    sregs.cr0 = CR0_PE_MP_ET_NE_WP_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE_OSFXSR_OSXMMEXCPT;
    sregs.efer = EFER_SCE_LME_LMA;
}
