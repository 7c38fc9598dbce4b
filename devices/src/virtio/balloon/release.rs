//! Giving guest pages back to the host, whatever they are mapped from.
//!
//! Guest memory is one shared mapping of a memfd, parts of which may be covered by private mappings
//! of files (a kernel image, copied where it is written). What each kind needs:
//!
//! | mapping | call | the guest reads afterwards |
//! | --- | --- | --- |
//! | shared memfd | MADV_REMOVE, which punches a hole; dropping the mapping alone frees nothing | zeros |
//! | private file | MADV_DONTNEED; MADV_REMOVE is refused (EACCES), for it would change the file | the file |
//! | anonymous (tests) | MADV_DONTNEED; MADV_REMOVE is refused (EINVAL) | zeros |
//!
//! A driver may assume nothing of what it reads from a page that it gave away (Virtio 1.2, sections
//! 5.5.6.3 and 5.5.6.7), so all three are right.

use std::io;
use std::sync::LazyLock;

static PAGE_SIZE: LazyLock<usize> = LazyLock::new(rustix::param::page_size);

/// Releases the whole pages of a piece of guest memory; gives how many bytes that were.
///
/// A piece that the host does not let go (locked, huge pages) stays as it is.
///
/// # Safety
/// The `len` bytes at `base` are mapped, belong to guest memory, and no Rust reference points into
/// them: their content changes.
pub(super) unsafe fn release(base: *mut u8, len: usize) -> usize {
    let lead = base.align_offset(*PAGE_SIZE);
    let whole = len.saturating_sub(lead) / *PAGE_SIZE * *PAGE_SIZE;
    if lead == usize::MAX || whole == 0 {
        return 0;
    }
    // SAFETY: `lead + whole` is no more than `len`, so this is a part of the caller's range.
    unsafe { release_pages(base.wrapping_add(lead), whole) }
}

/// # Safety
/// As [`release`]; `base` and `len` are multiples of the page size.
unsafe fn release_pages(base: *mut u8, len: usize) -> usize {
    // SAFETY: the caller's.
    match unsafe { advise(base, len, libc::MADV_REMOVE) } {
        Ok(()) => return len,
        Err(error) if error.raw_os_error() == Some(libc::EACCES) && len > *PAGE_SIZE => {
            // Some of it is private: halved until each part is of one kind.
            let half = len / 2 / *PAGE_SIZE * *PAGE_SIZE;
            // SAFETY: both halves are parts of the caller's range.
            return unsafe {
                release_pages(base, half) + release_pages(base.wrapping_add(half), len - half)
            };
        }
        Err(_) => {}
    }
    // SAFETY: the caller's.
    match unsafe { advise(base, len, libc::MADV_DONTNEED) } {
        Ok(()) => len,
        Err(error) => {
            tracing::debug!("{len} bytes of guest memory cannot be released: {error}");
            0
        }
    }
}

/// # Safety
/// As [`release_pages`].
unsafe fn advise(base: *mut u8, len: usize, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the caller's: the range is guest memory without references into it.
    match unsafe { libc::madvise(base.cast(), len, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;

    const MIB: usize = 1 << 20;

    /// A mapping that the test owns.
    struct Mapping(*mut u8, usize);

    impl Mapping {
        fn new(at: *mut u8, len: usize, flags: i32, file: &File) -> Self {
            // SAFETY: a new mapping, or (MAP_FIXED) one over a part of a mapping of the test's.
            let base = unsafe {
                let protection = libc::PROT_READ | libc::PROT_WRITE;
                libc::mmap(at.cast(), len, protection, flags, file.as_raw_fd(), 0)
            };
            assert_ne!(base, libc::MAP_FAILED);
            Self(base.cast(), len)
        }

        fn set(&self, at: usize, value: u8) {
            assert!(at < self.1);
            // SAFETY: inside the mapping.
            unsafe { self.0.add(at).write_volatile(value) }
        }

        fn get(&self, at: usize) -> u8 {
            assert!(at < self.1);
            // SAFETY: inside the mapping.
            unsafe { self.0.add(at).read_volatile() }
        }
    }

    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: the test made it and uses it no more.
            unsafe { libc::munmap(self.0.cast(), self.1) };
        }
    }

    #[test]
    fn shared_pages_leave_the_memfd_and_private_ones_fall_back_to_their_file() {
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let memfd = File::from(fd);
        memfd.set_len(8 * MIB as u64).unwrap();
        let mut image = tempfile::tempfile().unwrap();
        image.write_all(&vec![7; MIB]).unwrap();
        let guest = Mapping::new(std::ptr::null_mut(), 8 * MIB, libc::MAP_SHARED, &memfd);
        for at in (0..8 * MIB).step_by(4096) {
            guest.set(at, 1);
        }
        let before = memfd.metadata().unwrap().blocks();
        // The kernel image covers the third MiB, and the guest has written to it.
        let covered = guest.0.wrapping_add(2 * MIB);
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
        std::mem::forget(Mapping::new(covered, MIB, flags, &image));
        assert_eq!(guest.get(2 * MIB), 7);
        guest.set(2 * MIB, 9);

        // SAFETY: the test's own mapping, to which there are no references.
        let released = unsafe { release(guest.0.wrapping_add(MIB), 6 * MIB) };
        assert_eq!(released, 6 * MIB);
        assert_eq!(guest.get(0), 1, "before the range");
        assert_eq!(guest.get(7 * MIB), 1, "after the range");
        for at in [MIB, 2 * MIB - 4096, 3 * MIB, 7 * MIB - 4096] {
            assert_eq!(guest.get(at), 0, "shared page at {at:#x}");
        }
        assert_eq!(
            guest.get(2 * MIB),
            7,
            "the private page is the file's again"
        );
        assert_eq!(image.metadata().unwrap().len(), MIB as u64);
        let freed = (before - memfd.metadata().unwrap().blocks()) * 512;
        assert!(freed >= 4 * MIB as u64, "only {freed} bytes left the memfd");
    }

    #[test]
    fn only_whole_pages_are_released() {
        let memfd =
            File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        memfd.set_len(16384).unwrap();
        let guest = Mapping::new(std::ptr::null_mut(), 16384, libc::MAP_SHARED, &memfd);
        for at in [0, 4095, 4096, 8191, 8192] {
            guest.set(at, 1);
        }
        let part = |at: usize, len| {
            // SAFETY: the test's own mapping, to which there are no references.
            unsafe { release(guest.0.wrapping_add(at), len) }
        };
        for (at, len) in [(0, 0), (1, 4095), (1, 8190), (4095, 1), (8191, 4096)] {
            assert_eq!(part(at, len), 0, "{at}+{len}");
        }
        assert_eq!(guest.get(4096), 1);
        assert_eq!(part(1, 8191), 4096);
        assert_eq!(
            [0, 4095, 4096, 8191, 8192].map(|at| guest.get(at)),
            [1, 1, 0, 0, 1]
        );
    }
}
