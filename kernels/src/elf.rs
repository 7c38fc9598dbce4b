//! ELF files as far as kernels and modules need them: is this a kernel a machine can run, and
//! what does a section hold.

use std::fs::File;
use std::io::{self, Read};

use memchr::memmem;
use object::LittleEndian;
use object::elf::{
    ELFCLASS64, ELFDATA2LSB, EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PT_DYNAMIC, PT_GNU_RELRO,
    PT_INTERP, PT_LOAD,
};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use object::read::{ReadCache, ReadRef};
use thiserror::Error;

type Header = FileHeader64<LittleEndian>;

/// First bytes of an ELF file that name its class, byte order and machine.
const IDENT_LEN: usize = 20;
/// What the kernel's banner begins with.
const BANNER: &[u8] = b"Linux version ";

/// Why an ELF file is no kernel for a machine.
#[derive(Debug, Error)]
pub enum ElfError {
    /// It is for another architecture.
    #[error("it is for {0}; a machine needs a kernel for x86_64")]
    Foreign(String),
    /// It is an object file, a core dump or the like.
    #[error("it is an ELF file but no kernel: it cannot be started (ELF type {0})")]
    NotExecutable(u16),
    /// It is a program that runs on a kernel.
    #[error("it is a program, not a kernel")]
    Program,
    /// It ends before its headers or its segments do.
    #[error("it is truncated: a segment ends at byte {end} and the file has {len}")]
    Truncated {
        /// Where the segment that reaches farthest ends.
        end: u64,
        /// Bytes in the file.
        len: u64,
    },
    /// It holds nothing to load.
    #[error("it is an ELF file but no kernel: nothing in it is to be loaded")]
    NothingToLoad,
    /// Its headers contradict each other.
    #[error("its ELF headers are damaged: {0}")]
    Damaged(String),
}

/// Checks that the file is an x86_64 kernel that is all there.
///
/// # Errors
/// An [`ElfError`] that says why it is not.
pub fn check_kernel(file: &File, len: u64) -> Result<(), ElfError> {
    check_kernel_in(&ReadCache::new(file), len)
}

/// As [`check_kernel`], for the first `len` bytes of anything that can be read in pieces.
///
/// # Errors
/// As [`check_kernel`].
pub fn check_kernel_in<'a>(data: impl ReadRef<'a>, len: u64) -> Result<(), ElfError> {
    let ident: Vec<u8> = data
        .read_bytes_at(0, IDENT_LEN as u64)
        .map_err(|()| ElfError::Truncated { end: 64, len })?
        .to_vec();
    check_machine(&ident)?;
    let damaged = |error: object::Error| ElfError::Damaged(error.to_string());
    let header = Header::parse(data).map_err(damaged)?;
    let kind = header.e_type.get(LittleEndian);
    if kind != ET_EXEC && kind != ET_DYN {
        return Err(ElfError::NotExecutable(kind));
    }
    let table_end = header.e_phoff.get(LittleEndian).saturating_add(
        u64::from(header.e_phnum.get(LittleEndian))
            * u64::from(header.e_phentsize.get(LittleEndian)),
    );
    if table_end > len {
        return Err(ElfError::Truncated {
            end: table_end,
            len,
        });
    }
    let segments = header
        .program_headers(LittleEndian, data)
        .map_err(damaged)?;
    // What only a program's loader reads.
    if segments.iter().any(|segment| {
        let kind = segment.p_type(LittleEndian);
        [PT_INTERP, PT_DYNAMIC, PT_GNU_RELRO].contains(&kind)
    }) {
        return Err(ElfError::Program);
    }
    let ends = segments
        .iter()
        .filter(|segment| segment.p_type(LittleEndian) == PT_LOAD)
        .map(|segment| {
            segment
                .p_offset(LittleEndian)
                .saturating_add(segment.p_filesz(LittleEndian))
        });
    match ends.max() {
        None => Err(ElfError::NothingToLoad),
        Some(end) if end > len => Err(ElfError::Truncated { end, len }),
        Some(_) => Ok(()),
    }
}

fn check_machine(ident: &[u8]) -> Result<(), ElfError> {
    let byte = |at: usize| ident.get(at).copied().unwrap_or(0);
    let (class, order) = (byte(4), byte(5));
    let machine = if order == ELFDATA2LSB {
        u16::from_le_bytes([byte(18), byte(19)])
    } else {
        u16::from_be_bytes([byte(18), byte(19)])
    };
    if machine == EM_X86_64 && class == ELFCLASS64 && order == ELFDATA2LSB {
        return Ok(());
    }
    Err(ElfError::Foreign(machine_name(machine)))
}

fn machine_name(machine: u16) -> String {
    use object::elf;
    match machine {
        elf::EM_386 => "32-bit x86".to_owned(),
        elf::EM_X86_64 => "x86_64's 32-bit interface".to_owned(),
        elf::EM_ARM => "32-bit Arm".to_owned(),
        elf::EM_AARCH64 => "aarch64".to_owned(),
        elf::EM_RISCV => "RISC-V".to_owned(),
        elf::EM_PPC | elf::EM_PPC64 => "PowerPC".to_owned(),
        elf::EM_S390 => "s390x".to_owned(),
        elf::EM_LOONGARCH => "LoongArch".to_owned(),
        elf::EM_MIPS => "MIPS".to_owned(),
        other => format!("another architecture (ELF machine {other})"),
    }
}

/// The bytes of the section `name` of a 64-bit little-endian ELF file; None where it has none or
/// its headers are damaged.
pub fn section<'a>(data: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let header = Header::parse(data).ok()?;
    let sections = header.sections(LittleEndian, data).ok()?;
    let (_, section) = sections.section_by_name(LittleEndian, name)?;
    section.data(LittleEndian, data).ok()
}

/// The release in a kernel's banner ("Linux version 6.1.0 (…"), where there is one.
///
/// # Errors
/// When `kernel` cannot be read.
pub fn kernel_release(mut kernel: impl Read) -> io::Result<Option<String>> {
    const CHUNK: usize = 1 << 20;
    /// A banner that begins in one chunk may end in the next.
    const OVERLAP: usize = 128;
    let finder = memmem::Finder::new(BANNER);
    let mut window = Vec::with_capacity(CHUNK + OVERLAP);
    loop {
        let fresh = (&mut kernel).take(CHUNK as u64).read_to_end(&mut window)?;
        let last = fresh == 0;
        let searched = if last {
            window.len()
        } else {
            window.len().saturating_sub(OVERLAP)
        };
        for at in finder.find_iter(&window) {
            let text = window.get(at + BANNER.len()..).unwrap_or_default();
            let word = text.split(|&b| b == b' ' || b == 0).next();
            // "Linux version %s" is a format, not the banner.
            if at < searched
                && let Some(release) = word.and_then(crate::version::release)
            {
                return Ok(Some(release));
            }
        }
        if last {
            return Ok(None);
        }
        window.drain(..searched);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use super::*;

    /// A small ELF kernel with one segment that holds a banner.
    pub(crate) fn kernel(release: &str) -> Vec<u8> {
        let banner = format!("Linux version %s\0Linux version {release} (a@b) #1 SMP\0");
        let mut elf = vec![0; 64 + 56];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[16..18].copy_from_slice(&ET_EXEC.to_le_bytes());
        elf[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
        elf[20..24].copy_from_slice(&1u32.to_le_bytes());
        elf[24..32].copy_from_slice(&0x100_0000u64.to_le_bytes());
        elf[32..40].copy_from_slice(&64u64.to_le_bytes());
        elf[52..54].copy_from_slice(&64u16.to_le_bytes());
        elf[54..56].copy_from_slice(&56u16.to_le_bytes());
        elf[56..58].copy_from_slice(&1u16.to_le_bytes());
        elf[58..60].copy_from_slice(&64u16.to_le_bytes());
        elf[64..68].copy_from_slice(&PT_LOAD.to_le_bytes());
        elf[72..80].copy_from_slice(&120u64.to_le_bytes());
        elf[96..104].copy_from_slice(&(banner.len() as u64).to_le_bytes());
        elf.extend_from_slice(banner.as_bytes());
        elf
    }

    fn check(bytes: &[u8]) -> Result<(), ElfError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        check_kernel(&file, bytes.len() as u64)
    }

    #[test]
    fn a_whole_kernel_passes_and_every_truncation_is_refused() {
        let elf = kernel("6.1.0");
        check(&elf).unwrap();
        for len in 0..elf.len() {
            assert!(check(&elf[..len]).is_err(), "{len} of {} passed", elf.len());
        }
    }

    #[test]
    fn another_architecture_is_named() {
        let mut elf = kernel("6.1.0");
        elf[18..20].copy_from_slice(&183u16.to_le_bytes());
        let error = check(&elf).unwrap_err();
        assert!(error.to_string().contains("aarch64"), "{error}");
        let mut elf = kernel("6.1.0");
        elf[18..20].copy_from_slice(&22u16.to_be_bytes());
        elf[5] = 2;
        let error = check(&elf).unwrap_err();
        assert!(error.to_string().contains("s390x"), "{error}");
    }

    #[test]
    fn an_object_file_and_an_empty_program_are_no_kernels() {
        let mut elf = kernel("6.1.0");
        elf[16] = 1;
        assert!(matches!(check(&elf), Err(ElfError::NotExecutable(1))));
        let mut elf = kernel("6.1.0");
        elf[64] = 4;
        assert!(matches!(check(&elf), Err(ElfError::NothingToLoad)));
    }

    #[test]
    fn a_program_is_no_kernel() {
        let this_test = File::open("/proc/self/exe").unwrap();
        let len = this_test.metadata().unwrap().len();
        assert!(matches!(
            check_kernel(&this_test, len),
            Err(ElfError::Program)
        ));
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        let mut elf = kernel("6.1.0");
        elf[72..80].fill(0xff);
        assert!(matches!(check(&elf), Err(ElfError::Truncated { .. })));
        let mut elf = kernel("6.1.0");
        elf[32..40].fill(0xff);
        assert!(check(&elf).is_err());
    }

    #[test]
    fn the_banner_is_found_wherever_it_lies() {
        let banner = b"Linux version 6.12.1+x (me@there) #1";
        for at in [0, 5, (1 << 20) - 20, (1 << 20) - 1, 1 << 20, 3 << 20] {
            let mut bytes = vec![b'.'; at];
            bytes.extend_from_slice(banner);
            bytes.resize(bytes.len() + 1000, 0);
            let release = kernel_release(&*bytes).unwrap();
            assert_eq!(release.as_deref(), Some("6.12.1+x"), "banner at {at}");
        }
        assert_eq!(kernel_release(&b"Linux version %s"[..]).unwrap(), None);
        assert_eq!(
            kernel_release(&*kernel("6.1.0-x")).unwrap().as_deref(),
            Some("6.1.0-x")
        );
    }
}
