//! Guest memory: one memfd, mapped shared, split around the hole below 4 GiB.
//!
//! Parts of it can be replaced by private mappings of files (a kernel, an initial RAM disk), so
//! that what the guest does not write is never copied. Such parts are visible to this process and
//! to KVM only: a device backend in another process that maps the memfd does not see them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

use crate::arch::layout;

/// The granule of mappings.
pub const PAGE_SIZE: u64 = 4096;

/// How much of a file is copied at a time.
const COPY_CHUNK: usize = 256 << 10;

/// Why guest memory could not be made or filled.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// More than the host has.
    #[error("{asked_mib} MiB of guest memory are more than this host's {host_mib} MiB")]
    MoreThanHost {
        /// Asked for, MiB.
        asked_mib: u64,
        /// The host's memory, MiB.
        host_mib: u64,
    },
    /// The memory file could not be made.
    #[error("a memory file of {mib} MiB for the guest could not be made")]
    Create {
        /// Its size, MiB.
        mib: u64,
        /// The system call's error.
        source: io::Error,
    },
    /// The memory file could not be mapped.
    #[error("{mib} MiB of guest memory could not be mapped")]
    Map {
        /// Its size, MiB.
        mib: u64,
        /// The mapping's error.
        source: MmapRegionError,
    },
    /// The regions do not form an address space.
    #[error("guest memory of {mib} MiB does not fit the address space")]
    Layout {
        /// Its size, MiB.
        mib: u64,
    },
    /// An address range that is not guest memory.
    #[error("guest addresses {start:#x}+{len:#x} are outside of the guest's memory")]
    Outside {
        /// First guest physical address.
        start: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A file could not be placed in guest memory.
    #[error("a file could not be brought into guest memory at {start:#x}")]
    Place {
        /// First guest physical address.
        start: u64,
        /// The system call's error.
        source: io::Error,
    },
}

/// Makes `size` bytes of guest memory, all zero, without touching its pages.
///
/// `size` must be a multiple of the page size. Huge pages are asked for and the memory is kept out
/// of core dumps; both are wishes that a kernel may lack the support for.
pub fn create(size: u64) -> Result<GuestMemoryMmap, MemoryError> {
    let mib = size >> 20;
    check_host(mib)?;
    let file = memory_file(size).map_err(|source| MemoryError::Create { mib, source })?;
    let mut regions = Vec::new();
    let mut offset = 0;
    for (base, len) in layout::memory_regions(size) {
        let len_usize = usize::try_from(len).map_err(|_| MemoryError::Layout { mib })?;
        let file = file
            .try_clone()
            .map_err(|source| MemoryError::Create { mib, source })?;
        let mapping = MmapRegion::build(
            Some(FileOffset::new(file, offset)),
            len_usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )
        .map_err(|source| MemoryError::Map { mib, source })?;
        advise(&mapping, libc::MADV_HUGEPAGE);
        advise(&mapping, libc::MADV_DONTDUMP);
        regions.push(
            GuestRegionMmap::new(mapping, GuestAddress(base)).ok_or(MemoryError::Layout { mib })?,
        );
        offset += len;
    }
    GuestMemoryMmap::from_regions(regions).map_err(|_| MemoryError::Layout { mib })
}

fn check_host(asked_mib: u64) -> Result<(), MemoryError> {
    let info = rustix::system::sysinfo();
    let host = u128::from(info.totalram) * u128::from(info.mem_unit);
    let host_mib = (host >> 20) as u64;
    if asked_mib > host_mib {
        return Err(MemoryError::MoreThanHost {
            asked_mib,
            host_mib,
        });
    }
    Ok(())
}

fn memory_file(size: u64) -> io::Result<File> {
    let fd = rustix::fs::memfd_create(
        "guest-memory",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    rustix::fs::ftruncate(&fd, size)?;
    // Nobody who is handed the file can shrink it under the mappings (SIGBUS).
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(File::from(fd))
}

/// Bytes that the host has allocated for guest memory, from the file's own count of its blocks:
/// what a mapping of any size costs to ask. Parts that [`place_file`] mapped are not among them.
pub fn resident(memory: &GuestMemoryMmap) -> io::Result<u64> {
    /// What `st_blocks` counts in, whatever the filesystem's block size is.
    const BLOCK: u64 = 512;
    // All regions are parts of one file.
    let region = memory.iter().next();
    let Some(offset) = region.and_then(GuestMemoryRegion::file_offset) else {
        return Ok(0);
    };
    Ok(offset.file().metadata()?.blocks() * BLOCK)
}

fn advise(mapping: &MmapRegion, advice: libc::c_int) {
    // SAFETY: the range is exactly one live mapping of ours, and neither advice changes contents.
    let result = unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
    if result != 0 {
        tracing::debug!(
            "madvise({advice}) on guest memory: {}",
            io::Error::last_os_error()
        );
    }
}

/// Brings `len` bytes of `file` from `offset` to guest address `start`.
///
/// Whole pages that are aligned alike in the file and in the guest are mapped privately, so that
/// they are read when touched and copied when written; the rest is copied. The file must keep
/// these bytes while the machine runs. The caller checks that the file is long enough.
pub fn place_file(
    memory: &GuestMemoryMmap,
    file: &File,
    offset: u64,
    len: u64,
    start: u64,
) -> Result<(), MemoryError> {
    let outside = || MemoryError::Outside { start, len };
    let end = start.checked_add(len).ok_or_else(outside)?;
    offset.checked_add(len).ok_or_else(outside)?;
    let first_page = start
        .checked_next_multiple_of(PAGE_SIZE)
        .ok_or_else(outside)?;
    let last_page = end - end % PAGE_SIZE;
    if offset % PAGE_SIZE != start % PAGE_SIZE || first_page >= last_page {
        return copy_file(memory, file, offset, len, start);
    }
    let head = first_page - start;
    copy_file(memory, file, offset, head, start)?;
    map_file(
        memory,
        file,
        offset + head,
        last_page - first_page,
        first_page,
    )?;
    let done = last_page - start;
    copy_file(memory, file, offset + done, end - last_page, last_page)
}

/// Maps whole pages of `file` over guest memory. All arguments are multiples of the page size.
fn map_file(
    memory: &GuestMemoryMmap,
    file: &File,
    offset: u64,
    len: u64,
    start: u64,
) -> Result<(), MemoryError> {
    let outside = || MemoryError::Outside { start, len };
    let len_usize = usize::try_from(len).map_err(|_| outside())?;
    let region = memory
        .find_region(GuestAddress(start))
        .ok_or_else(outside)?;
    let within = start - region.start_addr().0;
    if within.checked_add(len).is_none_or(|end| end > region.len()) {
        return Err(outside());
    }
    let offset = libc::off_t::try_from(offset).map_err(|_| outside())?;
    // SAFETY: the target range was just checked to lie inside one live mapping that we own, and it
    // is page aligned, so MAP_FIXED replaces guest pages only. References into guest memory are
    // never held across this call: it runs before any device or vCPU starts, and vm-memory hands out
    // volatile accesses only. The region's munmap on drop covers the replaced part.
    let mapped = unsafe {
        libc::mmap(
            region.as_ptr().add(within as usize).cast(),
            len_usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        let source = io::Error::last_os_error();
        return Err(MemoryError::Place { start, source });
    }
    // SAFETY: exactly the range mapped above; the advice changes no contents.
    unsafe { libc::madvise(mapped, len_usize, libc::MADV_DONTDUMP) };
    // All pages mapped (not copied) in one call: cheaper than a fault for each of them while the
    // guest waits, and a file that cannot be read is found out now.
    // SAFETY: as above.
    let populated = unsafe { libc::madvise(mapped, len_usize, libc::MADV_POPULATE_READ) };
    match io::Error::last_os_error() {
        source if populated != 0 && source.raw_os_error() != Some(libc::EINVAL) => {
            Err(MemoryError::Place { start, source })
        }
        // Linux before 5.14 does not know the advice; the guest's faults do it then.
        _ => Ok(()),
    }
}

/// Copies `len` bytes of `file` from `offset` to guest address `start`.
pub fn copy_file(
    memory: &GuestMemoryMmap,
    file: &File,
    offset: u64,
    len: u64,
    start: u64,
) -> Result<(), MemoryError> {
    let mut buffer = vec![0; COPY_CHUNK.min(usize::try_from(len).unwrap_or(COPY_CHUNK))];
    let mut done = 0;
    while done < len {
        let chunk = buffer
            .len()
            .min(usize::try_from(len - done).unwrap_or(COPY_CHUNK));
        let part = &mut buffer[..chunk];
        file.read_exact_at(part, offset + done)
            .map_err(|source| MemoryError::Place { start, source })?;
        memory
            .write_slice(part, GuestAddress(start + done))
            .map_err(|_| MemoryError::Outside { start, len })?;
        done += chunk as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn read(memory: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn patterned_file(len: usize) -> (File, Vec<u8>) {
        let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + i / 4096) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        (file, bytes)
    }

    #[test]
    fn memory_above_three_gib_continues_at_four_gib() {
        if rustix::system::sysinfo().totalram < 5 << 30 {
            println!("skipped: this host has less than 5 GiB");
            return;
        }
        let memory = create(4 << 30).unwrap();
        let last = GuestAddress((5 << 30) - 8);
        memory.write_obj(0x1122_3344_5566_7788u64, last).unwrap();
        assert!(
            memory
                .write_obj(1u8, GuestAddress(layout::HOLE_START))
                .is_err()
        );
        assert!(memory.write_obj(1u8, GuestAddress(5 << 30)).is_err());
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused_with_both_sizes() {
        let error = create(1 << 50).unwrap_err().to_string();
        assert!(error.contains("1073741824 MiB"), "{error}");
    }

    #[test]
    fn memory_is_resident_when_it_was_touched_and_not_after_it_was_given_back() {
        let memory = create(64 << 20).unwrap();
        assert_eq!(resident(&memory).unwrap(), 0);
        let touched: Vec<u8> = vec![1; 8 << 20];
        memory
            .write_slice(&touched, GuestAddress(16 << 20))
            .unwrap();
        let some = resident(&memory).unwrap();
        assert!((8 << 20..=12 << 20).contains(&some), "{some} bytes");
        let region = memory.iter().next().unwrap();
        rustix::fs::fallocate(
            region.file_offset().unwrap().file(),
            rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
            0,
            64 << 20,
        )
        .unwrap();
        assert_eq!(resident(&memory).unwrap(), 0);
    }

    #[test]
    fn a_placed_file_reads_back_whatever_its_alignment() {
        let (file, bytes) = patterned_file(5 * 4096 + 123);
        for (offset, start) in [
            (0, 0x10_0000),
            (0x80, 0x10_0080),
            (0x80, 0x10_0000),
            (4096, 0x10_0000),
        ] {
            let memory = create(32 << 20).unwrap();
            let len = bytes.len() as u64 - offset;
            place_file(&memory, &file, offset, len, start).unwrap();
            assert!(
                read(&memory, start, len as usize) == bytes[offset as usize..],
                "offset {offset:#x} at {start:#x}"
            );
            assert_eq!(read(&memory, start + len, 4096), [0; 4096], "bytes after");
            assert_eq!(read(&memory, start - 64, 64), [0; 64], "bytes before");
        }
    }

    #[test]
    fn what_the_guest_writes_into_a_placed_file_stays_out_of_the_file() {
        let (file, bytes) = patterned_file(4096);
        let memory = create(32 << 20).unwrap();
        place_file(&memory, &file, 0, 4096, 0x10_0000).unwrap();
        memory
            .write_obj(!bytes[0], GuestAddress(0x10_0000))
            .unwrap();
        let mut first = [0];
        file.read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first[0], bytes[0]);
        assert_eq!(read(&memory, 0x10_0000, 1), [!bytes[0]]);
    }

    #[test]
    fn a_file_does_not_fit_outside_of_memory() {
        let (file, _) = patterned_file(4 * 4096);
        let memory = create(32 << 20).unwrap();
        for start in [(32 << 20) - 4096, 32 << 20, u64::MAX - 4095, u64::MAX - 100] {
            let result = place_file(&memory, &file, 0, 4 * 4096, start);
            assert!(
                matches!(result, Err(MemoryError::Outside { .. })),
                "{start:#x}: {result:?}"
            );
        }
    }
}
