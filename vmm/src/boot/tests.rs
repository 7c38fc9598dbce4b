//! Kernels that are whole, hostile and broken, against guest memory without KVM.

use std::io::Write;

use proptest::prelude::*;
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::kernel::{self, KernelFault, LoadedKernel};
use crate::arch::Entry;
use crate::memory;

const MIB: u64 = 1 << 20;
const RAM: u64 = 64 * MIB;

/// A program header: type, offset, physical address, size in the file, size in memory.
type Header = (u32, u64, u64, u64, u64);

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

struct Elf {
    class: u8,
    data: u8,
    machine: u16,
    entry: u64,
    headers: Vec<Header>,
    phnum: Option<u16>,
    phoff: u64,
    phentsize: u16,
    len: usize,
    note: Option<Vec<u8>>,
}

/// Where [`Elf::bytes`] puts notes.
const NOTES: u64 = 0x800;

impl Default for Elf {
    /// Text of two pages and a bit at 16 MiB, data with a bss behind it.
    fn default() -> Self {
        Self {
            class: 2,
            data: 1,
            machine: 62,
            entry: 16 * MIB + 0x40,
            headers: vec![
                (PT_LOAD, 0x1000, 16 * MIB, 0x2100, 0x2100),
                (PT_LOAD, 0x3200, 18 * MIB + 0x200, 0x80, 0x10000),
            ],
            phnum: None,
            phoff: 64,
            phentsize: 56,
            len: 0x4000,
            note: None,
        }
    }
}

impl Elf {
    fn with_note(mut self, kind: u32, name: &[u8], desc: &[u8]) -> Self {
        let mut note = Vec::new();
        for word in [name.len() as u32, desc.len() as u32, kind] {
            note.extend(word.to_le_bytes());
        }
        for part in [name, desc] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        self.headers
            .push((PT_NOTE, NOTES, 0, note.len() as u64, note.len() as u64));
        self.note = Some(note);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..self.len).map(|i| (i % 253) as u8 | 1).collect();
        let mut header = vec![0x7f, b'E', b'L', b'F', self.class, self.data, 1];
        header.resize(16, 0);
        header.extend(2u16.to_le_bytes());
        header.extend(self.machine.to_le_bytes());
        header.extend(1u32.to_le_bytes());
        header.extend(self.entry.to_le_bytes());
        header.extend(self.phoff.to_le_bytes());
        header.extend([0; 12]);
        header.extend(64u16.to_le_bytes());
        header.extend(self.phentsize.to_le_bytes());
        let phnum = self.phnum.unwrap_or(self.headers.len() as u16);
        header.extend(phnum.to_le_bytes());
        header.extend([0; 6]);
        for (kind, offset, address, file_size, size) in &self.headers {
            header.extend(kind.to_le_bytes());
            header.extend(7u32.to_le_bytes());
            for word in [*offset, *address, *address, *file_size, *size, 0x1000] {
                header.extend(word.to_le_bytes());
            }
        }
        bytes[..header.len()].copy_from_slice(&header);
        if let Some(note) = &self.note {
            let at = NOTES as usize;
            bytes[at..at + note.len()].copy_from_slice(note);
        }
        bytes
    }
}

fn ram() -> GuestMemoryMmap {
    memory::create(RAM).unwrap()
}

fn load_into(memory: &GuestMemoryMmap, bytes: &[u8]) -> Result<LoadedKernel, KernelFault> {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    kernel::load(memory, file.path(), RAM).map_err(|error| error.fault)
}

fn load(bytes: &[u8]) -> Result<LoadedKernel, KernelFault> {
    load_into(&ram(), bytes)
}

fn message(bytes: &[u8]) -> String {
    load(bytes).unwrap_err().to_string()
}

#[test]
fn the_segments_of_an_elf_are_in_memory_and_the_rest_is_zero() {
    let bytes = Elf::default().bytes();
    let memory = ram();
    let kernel = load_into(&memory, &bytes).unwrap();
    assert_eq!(
        kernel.entry,
        Entry::Linux64 {
            address: 16 * MIB + 0x40
        }
    );
    assert_eq!(kernel.end, 18 * MIB + 0x200 + 0x10000);
    let read = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    };
    assert!(read(16 * MIB, 0x2100) == bytes[0x1000..0x3100], "text");
    assert_eq!(read(16 * MIB + 0x2100, 0x1000), vec![0; 0x1000]);
    assert!(
        read(18 * MIB + 0x200, 0x80) == bytes[0x3200..0x3280],
        "data"
    );
    assert_eq!(read(18 * MIB + 0x280, 0x10000), vec![0; 0x10000], "bss");
    assert_eq!(read(18 * MIB, 0x200), vec![0; 0x200], "before data");
}

#[test]
fn a_pvh_note_is_preferred_wherever_it_stands_among_the_notes() {
    let address = (16 * MIB + 0x100) as u32;
    let elf = Elf::default().with_note(1, b"GNU\0", &[1; 20]).with_note(
        18,
        b"Xen\0",
        &address.to_le_bytes(),
    );
    // Both note segments point at the second note; the first is skipped by its type in the next.
    let kernel = load(&elf.bytes()).unwrap();
    assert_eq!(
        kernel.entry,
        Entry::Pvh {
            address: address.into()
        }
    );
}

#[test]
fn a_note_of_another_owner_or_without_an_address_is_no_pvh_entry() {
    let address = (16 * MIB + 0x100) as u32;
    for elf in [
        Elf::default().with_note(18, b"Abc\0", &address.to_le_bytes()),
        Elf::default().with_note(18, b"Xen\0", &[1, 2]),
        Elf::default().with_note(17, b"Xen\0", &address.to_le_bytes()),
    ] {
        let kernel = load(&elf.bytes()).unwrap();
        assert!(
            matches!(kernel.entry, Entry::Linux64 { .. }),
            "{:?}",
            kernel.entry
        );
    }
}

#[test]
fn what_is_no_kernel_is_told_to_be_none() {
    for bytes in [
        &b""[..],
        b"\x7f",
        b"#!/bin/sh\n",
        &[0; 4096],
        &[0xff; 100_000],
    ] {
        assert!(matches!(load(bytes), Err(KernelFault::NotAKernel)));
    }
}

#[test]
fn a_kernel_for_another_machine_is_named() {
    let elf = |machine, class, data| {
        Elf {
            machine,
            class,
            data,
            ..Elf::default()
        }
        .bytes()
    };
    for (bytes, name) in [
        (elf(183, 2, 1), "aarch64"),
        (elf(243, 2, 1), "RISC-V"),
        (elf(3, 1, 1), "32-bit x86"),
        (elf(62, 1, 1), "32-bit x86"),
        (elf(22, 2, 2), "big-endian"),
        (elf(9999, 2, 1), "9999"),
    ] {
        let message = message(&bytes);
        assert!(message.contains(name), "{message}");
    }
    let mut arm_image = vec![0; 4096];
    arm_image[0x38..0x3c].copy_from_slice(b"ARM\x64");
    assert!(message(&arm_image).contains("aarch64"));
}

#[test]
fn an_elf_cut_anywhere_is_truncated_or_no_kernel() {
    let bytes = Elf::default().bytes();
    for len in (0..0x3280).step_by(61) {
        let result = load(&bytes[..len]);
        assert!(
            matches!(
                result,
                Err(KernelFault::Truncated | KernelFault::NotAKernel)
            ),
            "{len}: {result:?}"
        );
    }
}

#[test]
fn segments_outside_of_memory_are_refused_with_the_addresses() {
    for (address, size) in [
        (0, 0x1000),
        (MIB - 1, 0x1000),
        (RAM - 0x1000, 0x1001),
        (RAM, 0x1000),
        (0xd000_0000, 0x1000),
        (1 << 40, 0x1000),
        (16 * MIB, 1 << 50),
    ] {
        let elf = Elf {
            headers: vec![(PT_LOAD, 0x1000, address, 0x100, size)],
            entry: address,
            ..Elf::default()
        };
        let result = load(&elf.bytes());
        assert!(
            matches!(result, Err(KernelFault::OutsideMemory { start, .. }) if start == address),
            "{address:#x}+{size:#x}: {result:?}"
        );
    }
}

#[test]
fn contradictory_headers_are_refused() {
    let malformed = |elf: Elf| {
        let result = load(&elf.bytes());
        assert!(
            matches!(
                result,
                Err(KernelFault::Malformed(_)
                    | KernelFault::Truncated
                    | KernelFault::Overlap { .. })
            ),
            "{result:?}"
        );
    };
    let headers = |headers: Vec<Header>| Elf {
        headers,
        ..Elf::default()
    };
    malformed(headers(vec![]));
    malformed(headers(vec![(PT_LOAD, 0x1000, 16 * MIB, 0x200, 0x100)]));
    malformed(headers(vec![(PT_LOAD, 0x1000, u64::MAX - 4095, 0, 8192)]));
    malformed(headers(vec![(PT_LOAD, u64::MAX, 16 * MIB, 0x100, 0x100)]));
    malformed(headers(vec![
        (PT_LOAD, 0x1000, 16 * MIB, 0x100, 0x2000),
        (PT_LOAD, 0x1000, 16 * MIB + 0x1000, 0x100, 0x100),
    ]));
    malformed(Elf {
        entry: 17 * MIB,
        ..Elf::default()
    });
    malformed(Elf {
        phnum: Some(u16::MAX),
        ..Elf::default()
    });
    malformed(Elf {
        phoff: u64::MAX - 8,
        ..Elf::default()
    });
    malformed(Elf {
        phentsize: 32,
        ..Elf::default()
    });
}

#[test]
fn a_directory_and_a_missing_file_are_told_apart_from_kernels() {
    for path in ["/", "/nonexistent/vmlinux", "/dev/null"] {
        let error = kernel::load(&ram(), path.as_ref(), RAM).unwrap_err();
        assert!(matches!(error.fault, KernelFault::Open(_)), "{error}");
        assert!(error.to_string().contains(path), "{error}");
    }
}

/// A bzImage: setup of five sectors, then `payload` bytes.
fn bzimage(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let payload = 0x8000usize;
    let mut bytes = vec![0; 5 * 512 + payload];
    bytes[0x1f1] = 4;
    bytes[0x1f4..0x1f8].copy_from_slice(&((payload / 16) as u32).to_le_bytes());
    bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    bytes[0x211] = 1;
    bytes[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    bytes[0x236..0x238].copy_from_slice(&1u16.to_le_bytes());
    bytes[0x258..0x260].copy_from_slice(&(16 * MIB).to_le_bytes());
    bytes[0x260..0x264].copy_from_slice(&(8 * MIB as u32).to_le_bytes());
    for (i, byte) in bytes[5 * 512..].iter_mut().enumerate() {
        *byte = (i % 251) as u8;
    }
    change(&mut bytes);
    bytes
}

#[test]
fn a_bzimage_is_loaded_at_one_mib_and_reserves_what_it_unpacks_to() {
    let bytes = bzimage(|_| ());
    let memory = ram();
    let kernel = load_into(&memory, &bytes).unwrap();
    assert_eq!(
        kernel.entry,
        Entry::Linux64 {
            address: MIB + 0x200
        }
    );
    assert_eq!(kernel.end, 24 * MIB);
    assert!(kernel.setup_header.is_some());
    let mut loaded = vec![0; 0x8000];
    memory.read_slice(&mut loaded, GuestAddress(MIB)).unwrap();
    assert!(loaded == bytes[5 * 512..]);
}

#[test]
fn broken_bzimages_are_refused() {
    let truncated = |bytes: &[u8]| {
        let result = load(bytes);
        assert!(
            matches!(result, Err(KernelFault::Truncated)),
            "{} bytes: {result:?}",
            bytes.len()
        );
    };
    let whole = bzimage(|_| ());
    truncated(&whole[..whole.len() - 16]);
    truncated(&whole[..5 * 512]);
    truncated(&whole[..0x210]);
    assert!(message(&bzimage(|b| b[0x236] = 0)).contains("32-bit"));
    assert!(message(&bzimage(|b| b[0x206] = 1)).contains("32-bit"));
    assert!(matches!(
        load(&bzimage(|b| b[0x211] = 0)),
        Err(KernelFault::Malformed(_))
    ));
    for at in [0x260, 0x258] {
        let huge = bzimage(|b| b[at..at + 4].copy_from_slice(&[0xff; 4]));
        assert!(matches!(
            load(&huge),
            Err(KernelFault::OutsideMemory { .. })
        ));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Whatever is in the headers: an error or a kernel inside of memory, and no panic.
    #[test]
    fn mutated_kernels_never_panic_and_never_leave_memory(
        is_elf in any::<bool>(),
        mutations in prop::collection::vec((0usize..0x280, any::<u8>()), 1..12),
    ) {
        let mut bytes = if is_elf {
            Elf::default().with_note(18, b"Xen\0", &[0, 1, 0, 1]).bytes()
        } else {
            bzimage(|_| ())
        };
        for (at, value) in mutations {
            bytes[at] = value;
        }
        if let Ok(kernel) = load(&bytes) {
            prop_assert!(kernel.end <= RAM);
            prop_assert!(kernel.initrd_ceiling <= RAM);
        }
    }
}
