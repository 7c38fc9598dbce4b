//! Reading an ELF vmlinux: its segments, its entry, and the PVH note; nothing in it is trusted.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD,
    PT_NOTE,
};
use vm_memory::ByteValued;

use super::kernel::KernelFault;

/// The program headers that are read; kernels have five or so.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// The most note bytes that are read; kernels have under a kilobyte.
const MAX_NOTES: u64 = 64 << 10;
/// Names and descriptors in a note are padded to this.
const NOTE_ALIGN: usize = 4;
/// The note that holds the PVH entry point, of owner "Xen" (Xen, `public/elfnote.h`).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

const EM_X86_64: u16 = 62;

/// The header's fields that matter.
#[derive(Debug)]
pub struct Elf {
    /// The 64-bit entry point, physical.
    pub entry: u64,
    /// The PVH entry point, physical.
    pub pvh_entry: Option<u64>,
    /// Loadable segments, by ascending physical address, that neither overlap nor reach past the
    /// end of the file.
    pub segments: Vec<Segment>,
}

/// A loadable segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Physical address.
    pub address: u64,
    /// Size in memory; what lies past `file_size` is zero.
    pub size: u64,
    /// Offset of its bytes in the file.
    pub offset: u64,
    /// How many bytes the file has of it.
    pub file_size: u64,
}

impl Segment {
    /// The first address past it.
    pub fn end(&self) -> u64 {
        self.address + self.size
    }
}

/// Reads the headers of `file`, which is `len` bytes long and starts with the ELF magic.
pub fn read(file: &File, len: u64) -> Result<Elf, KernelFault> {
    let header: Elf64_Ehdr = read_object(file, 0)?;
    check_machine(&header)?;
    let mut segments = Vec::new();
    let mut pvh_entry = None;
    for program in program_headers(file, &header)? {
        match program.p_type {
            PT_LOAD if program.p_memsz > 0 => segments.push(segment(&program, len)?),
            PT_NOTE if pvh_entry.is_none() => pvh_entry = pvh_note(file, &program)?,
            _ => {}
        }
    }
    segments.sort_by_key(|segment| segment.address);
    if let Some(pair) = segments.windows(2).find(|w| w[0].end() > w[1].address) {
        return Err(KernelFault::Overlap {
            address: pair[1].address,
        });
    }
    if segments.is_empty() {
        return Err(KernelFault::Malformed("it has nothing to load"));
    }
    Ok(Elf {
        entry: header.e_entry,
        pvh_entry,
        segments,
    })
}

fn read_object<T: ByteValued + Default>(file: &File, offset: u64) -> Result<T, KernelFault> {
    let mut object = T::default();
    file.read_exact_at(object.as_mut_slice(), offset)
        .map_err(KernelFault::read)?;
    Ok(object)
}

fn check_machine(header: &Elf64_Ehdr) -> Result<(), KernelFault> {
    if header.e_ident[EI_DATA] != ELFDATA2LSB {
        return Err(KernelFault::Architecture("a big-endian machine".to_owned()));
    }
    // The machine's field is at the same place in 32-bit files.
    if header.e_machine != EM_X86_64 {
        return Err(KernelFault::Architecture(machine_name(header.e_machine)));
    }
    if header.e_ident[EI_CLASS] != ELFCLASS64 {
        return Err(KernelFault::Architecture("32-bit x86".to_owned()));
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(KernelFault::Malformed(
            "its program headers have an odd size",
        ));
    }
    if header.e_phnum > MAX_PROGRAM_HEADERS {
        return Err(KernelFault::Malformed("it has too many program headers"));
    }
    Ok(())
}

/// `e_machine` in words (System V ABI, "ELF header").
fn machine_name(machine: u16) -> String {
    match machine {
        3 => "32-bit x86".to_owned(),
        8 => "MIPS".to_owned(),
        20 => "32-bit PowerPC".to_owned(),
        21 => "64-bit PowerPC".to_owned(),
        22 => "S390".to_owned(),
        40 => "32-bit ARM".to_owned(),
        183 => "aarch64".to_owned(),
        243 => "RISC-V".to_owned(),
        258 => "LoongArch".to_owned(),
        other => format!("an unknown machine (ELF number {other})"),
    }
}

fn program_headers(file: &File, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, KernelFault> {
    let size = size_of::<Elf64_Phdr>() as u64;
    (0..u64::from(header.e_phnum))
        .map(|index| {
            let offset = header
                .e_phoff
                .checked_add(index * size)
                .ok_or(KernelFault::Truncated)?;
            read_object(file, offset)
        })
        .collect()
}

fn segment(program: &Elf64_Phdr, len: u64) -> Result<Segment, KernelFault> {
    let segment = Segment {
        address: program.p_paddr,
        size: program.p_memsz,
        offset: program.p_offset,
        file_size: program.p_filesz,
    };
    if segment.file_size > segment.size {
        return Err(KernelFault::Malformed(
            "a segment is larger in the file than in memory",
        ));
    }
    if segment.address.checked_add(segment.size).is_none() {
        return Err(KernelFault::Malformed("a segment wraps around"));
    }
    match segment.offset.checked_add(segment.file_size) {
        Some(end) if end <= len => Ok(segment),
        _ => Err(KernelFault::Truncated),
    }
}

/// The PVH entry point of a note segment, if it has one.
fn pvh_note(file: &File, program: &Elf64_Phdr) -> Result<Option<u64>, KernelFault> {
    let mut notes = vec![0; program.p_filesz.min(MAX_NOTES) as usize];
    file.read_exact_at(&mut notes, program.p_offset)
        .map_err(KernelFault::read)?;
    let mut rest = notes.as_slice();
    while let Some((header, body)) = rest.split_at_checked(size_of::<Elf64_Nhdr>()) {
        let mut note = Elf64_Nhdr::default();
        note.as_mut_slice().copy_from_slice(header);
        let (name_len, desc_len) = (note.n_namesz as usize, note.n_descsz as usize);
        let desc_start = name_len.next_multiple_of(NOTE_ALIGN);
        let next = desc_start + desc_len.next_multiple_of(NOTE_ALIGN);
        let (Some(name), Some(desc)) = (
            body.get(..name_len),
            body.get(desc_start..desc_start + desc_len),
        ) else {
            break;
        };
        if name == b"Xen\0" && note.n_type == XEN_ELFNOTE_PHYS32_ENTRY {
            return Ok(desc
                .first_chunk::<4>()
                .map(|address| u32::from_le_bytes(*address).into()));
        }
        rest = body.get(next..).unwrap_or(&[]);
    }
    Ok(None)
}

impl KernelFault {
    fn read(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            // An offset past what the file system can address.
            io::ErrorKind::InvalidInput => Self::Truncated,
            _ => Self::Read(error),
        }
    }
}
