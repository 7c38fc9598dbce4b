//! Loading a kernel: an ELF vmlinux, mapped copy-on-write, or a bzImage, copied.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{XLF_KERNEL_64, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::elf::{self, Elf};
use crate::arch::{Entry, layout};
use crate::memory::{self, MemoryError};

const ELF_MAGIC: &[u8] = b"\x7fELF";
/// Where a bzImage has "HdrS" (Linux, `boot.rst`, "The Real-Mode Kernel Header").
const HDRS_OFFSET: usize = 0x202;
/// Where the setup header of the boot protocol's latest version ends.
const SETUP_HEADER_END: u64 = 0x26c;
/// Where an arm64 Image has its magic (Linux, `arm64/booting.rst`).
const ARM64_OFFSET: usize = 0x38;
/// How much of the file is enough to tell what it is.
const MAGIC_LEN: usize = 0x210;
/// The 64-bit entry point's offset in the loaded part of a bzImage.
const ENTRY_64_OFFSET: u64 = 0x200;
/// The first boot protocol whose header has `xloadflags` (2.12).
const PROTOCOL_XLOADFLAGS: u16 = 0x020c;

/// A kernel that could not be loaded.
#[derive(Debug, Error)]
#[error("the kernel {} cannot be started: {fault}", path.display())]
pub struct KernelError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub fault: KernelFault,
}

/// What is wrong with a kernel.
#[derive(Debug, Error)]
pub enum KernelFault {
    /// It cannot be opened.
    #[error("the file cannot be opened: {0}")]
    Open(io::Error),
    /// It cannot be read.
    #[error("the file cannot be read: {0}")]
    Read(io::Error),
    /// Nothing that this program knows.
    #[error("it is no kernel (neither an ELF vmlinux nor a bzImage)")]
    NotAKernel,
    /// It ends too early.
    #[error("the file is truncated")]
    Truncated,
    /// For another processor.
    #[error("it is for {0}, and this machine is x86_64")]
    Architecture(String),
    /// It contradicts itself.
    #[error("it is malformed: {0}")]
    Malformed(&'static str),
    /// Two parts go to one place.
    #[error("it is malformed: two of its segments overlap at {address:#x}")]
    Overlap {
        /// Where.
        address: u64,
    },
    /// Memory below the hole does not reach.
    #[error(
        "it needs memory at {start:#x} to {end:#x}, and the guest's reaches from {:#x} to {ram_end:#x}; \
         give it more memory",
        layout::HIGH_RAM_START
    )]
    OutsideMemory {
        /// First address needed.
        start: u64,
        /// End of what is needed.
        end: u64,
        /// End of RAM below the hole.
        ram_end: u64,
    },
    /// It could not be brought into memory.
    #[error("it could not be loaded: {0}")]
    Place(#[from] MemoryError),
}

/// A kernel in guest memory.
#[derive(Debug)]
pub struct LoadedKernel {
    /// How to start it.
    pub entry: Entry,
    /// The first address past what it needs until it manages its memory.
    pub end: u64,
    /// The setup header of a bzImage, to be passed on in `boot_params`.
    pub setup_header: Option<setup_header>,
    /// Where an initial RAM disk must end at the latest.
    pub initrd_ceiling: u64,
}

/// Loads the kernel at `path`; RAM below the hole ends at `ram_end`.
pub fn load(
    memory: &GuestMemoryMmap,
    path: &Path,
    ram_end: u64,
) -> Result<LoadedKernel, KernelError> {
    load_file(memory, path, ram_end).map_err(|fault| KernelError {
        path: path.to_owned(),
        fault,
    })
}

fn load_file(
    memory: &GuestMemoryMmap,
    path: &Path,
    ram_end: u64,
) -> Result<LoadedKernel, KernelFault> {
    let (file, len) = open_regular(path).map_err(KernelFault::Open)?;
    let mut start = [0; MAGIC_LEN];
    let have = read_start(&file, &mut start).map_err(KernelFault::Read)?;
    let start = &start[..have];
    if start.starts_with(ELF_MAGIC) {
        load_elf(memory, &file, len, ram_end)
    } else if start
        .get(HDRS_OFFSET..)
        .is_some_and(|s| s.starts_with(b"HdrS"))
    {
        load_bzimage(memory, file, len, ram_end)
    } else if start
        .get(ARM64_OFFSET..)
        .is_some_and(|s| s.starts_with(b"ARM\x64"))
    {
        Err(KernelFault::Architecture("aarch64".to_owned()))
    } else {
        Err(KernelFault::NotAKernel)
    }
}

/// Opens a regular file for reading and tells its length; anything else (a directory, a FIFO that
/// would block) is an error.
pub fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        ));
    }
    Ok((file, metadata.len()))
}

fn read_start(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match file.read_at(&mut buffer[have..], have as u64) {
            Ok(0) => break,
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}

fn load_elf(
    memory: &GuestMemoryMmap,
    file: &File,
    len: u64,
    ram_end: u64,
) -> Result<LoadedKernel, KernelFault> {
    let elf = elf::read(file, len)?;
    let (first, last) = match (elf.segments.first(), elf.segments.last()) {
        (Some(first), Some(last)) => (first.address, last.end()),
        _ => return Err(KernelFault::Malformed("it has nothing to load")),
    };
    check_range(first, last, ram_end)?;
    let entry = elf_entry(&elf)?;
    for segment in &elf.segments {
        // The rest of the segment is zero already: it is memory that nothing has touched.
        memory::place_file(
            memory,
            file,
            segment.offset,
            segment.file_size,
            segment.address,
        )?;
    }
    Ok(LoadedKernel {
        entry,
        end: last,
        setup_header: None,
        initrd_ceiling: ram_end,
    })
}

fn elf_entry(elf: &Elf) -> Result<Entry, KernelFault> {
    let (entry, address) = match elf.pvh_entry {
        Some(address) => (Entry::Pvh { address }, address),
        None => {
            let address = elf.entry;
            (Entry::Linux64 { address }, address)
        }
    };
    let inside = |s: &elf::Segment| (s.address..s.end()).contains(&address);
    if !elf.segments.iter().any(inside) {
        return Err(KernelFault::Malformed(
            "its entry is outside of its segments",
        ));
    }
    Ok(entry)
}

fn check_range(start: u64, end: u64, ram_end: u64) -> Result<(), KernelFault> {
    if start < layout::HIGH_RAM_START || end > ram_end {
        return Err(KernelFault::OutsideMemory {
            start,
            end,
            ram_end,
        });
    }
    Ok(())
}

fn load_bzimage(
    memory: &GuestMemoryMmap,
    mut file: File,
    len: u64,
    ram_end: u64,
) -> Result<LoadedKernel, KernelFault> {
    if len < SETUP_HEADER_END {
        return Err(KernelFault::Truncated);
    }
    let start = layout::HIGH_RAM_START;
    check_range(start, start.saturating_add(len), ram_end)?;
    let loaded =
        BzImage::load(memory, Some(GuestAddress(start)), &mut file, None).map_err(|error| {
            match error {
                linux_loader::loader::Error::Bzimage(
                    linux_loader::loader::bzimage::Error::Underflow,
                ) => KernelFault::Truncated,
                _ => KernelFault::Malformed("its setup header is not one of a bzImage"),
            }
        })?;
    let header = loaded
        .setup_header
        .ok_or(KernelFault::Malformed("it has no setup header"))?;
    let version = header.version;
    if version < PROTOCOL_XLOADFLAGS || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelFault::Architecture("32-bit x86".to_owned()));
    }
    // `syssize` is the protected-mode part in units of 16 bytes: less of it means a cut file.
    if loaded.kernel_end - start < u64::from(header.syssize) * 16 {
        return Err(KernelFault::Truncated);
    }
    // It unpacks itself at its preferred address, or here where that is lower, and needs
    // `init_size` bytes there before it looks at the memory map.
    let end = header
        .pref_address
        .max(start)
        .saturating_add(header.init_size.into())
        .max(loaded.kernel_end);
    check_range(start, end, ram_end)?;
    Ok(LoadedKernel {
        entry: Entry::Linux64 {
            address: start + ENTRY_64_OFFSET,
        },
        end,
        setup_header: Some(header),
        initrd_ceiling: ram_end.min(u64::from(header.initrd_addr_max) + 1),
    })
}
