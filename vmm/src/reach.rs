//! The guest's memory, for whoever in this process exchanges data with programs of the guest.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::calls::Calls;
use crate::memory::MemoryError;

/// What a process that has a machine in it can do besides talking to the guest.
#[derive(Debug, Clone)]
pub struct Reach {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// Whom the guest can call.
    pub calls: Calls,
}

/// A machine's memory, which stays mapped for as long as this is kept.
///
/// The guest may change it at any time: what was read is a copy, and what is read again may differ.
#[derive(Debug, Clone)]
pub struct GuestMemory(GuestMemoryMmap);

impl From<GuestMemoryMmap> for GuestMemory {
    fn from(memory: GuestMemoryMmap) -> Self {
        Self(memory)
    }
}

impl GuestMemory {
    /// Fills `into` with what is at guest-physical address `start`.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] where not all of it is memory.
    pub fn read(&self, start: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let len = into.len() as u64;
        self.0
            .read_slice(into, GuestAddress(start))
            .map_err(|_| MemoryError::Outside { start, len })
    }

    /// Puts `bytes` at guest-physical address `start`.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] where not all of it is memory; a part may have been written then.
    pub fn write(&self, start: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let len = bytes.len() as u64;
        self.0
            .write_slice(bytes, GuestAddress(start))
            .map_err(|_| MemoryError::Outside { start, len })
    }

    /// Reads from `file`, from `offset` on, into `pieces` of memory, one after the other, as preadv(2) does: returns how
    /// many bytes, which are fewer at the file's end.
    ///
    /// # Errors
    /// `InvalidInput` where a piece is not memory, or there are more than a call takes; else the call's.
    pub fn read_file(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        pieces: impl Iterator<Item = (u64, usize)>,
    ) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let slices = pieces.map(|(start, len)| {
            self.0
                .get_slice(GuestAddress(start), len)
                .map_err(|_| io::ErrorKind::InvalidInput.into())
        });
        let slices = slices.collect::<io::Result<Vec<_>>>()?;
        let guards: Vec<_> = slices.iter().map(|slice| slice.ptr_guard_mut()).collect();
        let parts: Vec<_> = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
        let count = libc::c_int::try_from(parts.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: `parts` has `count` entries, each of which is a range of guest memory that was just checked to be mapped
        // for writing, and that stays mapped as long as `self` is borrowed. The guest may write there at the same time,
        // which is no concern of the kernel's; nothing here has a reference into it.
        let read = unsafe { libc::preadv(file.as_raw_fd(), parts.as_ptr(), count, offset) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_memory_is_neither_read_nor_written() {
        let mapped = GuestMemoryMmap::from_ranges(&[(GuestAddress(0x1000), 0x2000)]).unwrap();
        let memory = GuestMemory::from(mapped);
        memory.write(0x1ffe, b"data").unwrap();
        let mut read = [0; 4];
        memory.read(0x1ffe, &mut read).unwrap();
        assert_eq!(&read, b"data");
        for start in [0, 0xffe, 0x2ffd, 0x3000, u64::MAX - 1] {
            assert!(memory.write(start, b"data").is_err(), "{start:#x}");
            assert!(memory.read(start, &mut read).is_err(), "{start:#x}");
        }
    }
}
