//! Placing the initial RAM disk: as high as possible below the hole, so that nothing is in its way.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::boot::kernel::open_regular;
use crate::config::Initrd;
use crate::memory::{self, MemoryError, PAGE_SIZE};

/// Why the initial RAM disk could not be placed.
#[derive(Debug, Error)]
pub enum InitrdError {
    /// The file cannot be read.
    #[error("the initial RAM disk {} cannot be opened", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not fit.
    #[error(
        "the initial RAM disk of {size} bytes does not fit: the guest has {room} bytes left beside \
         its kernel; give it more memory"
    )]
    TooLarge {
        /// Its size in bytes.
        size: u64,
        /// What is free, in bytes.
        room: u64,
    },
    /// It could not be brought into memory.
    #[error("the initial RAM disk could not be placed at {address:#x}")]
    Place {
        /// Guest physical address.
        address: u64,
        /// Why.
        source: MemoryError,
    },
}

/// Where an initial RAM disk is in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitrdRange {
    /// Guest physical address, page aligned.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
}

/// Places `initrd` at the upper end of `floor..ceiling`. An empty one is none.
pub fn place(
    memory: &GuestMemoryMmap,
    initrd: &Initrd,
    floor: u64,
    ceiling: u64,
) -> Result<Option<InitrdRange>, InitrdError> {
    match initrd {
        Initrd::Bytes(bytes) => {
            let size = bytes.len() as u64;
            let address = address_for(size, floor, ceiling)?;
            memory
                .write_slice(bytes, GuestAddress(address))
                .map_err(|_| InitrdError::Place {
                    address,
                    source: MemoryError::Outside {
                        start: address,
                        len: size,
                    },
                })?;
            Ok((size > 0).then_some(InitrdRange { address, size }))
        }
        Initrd::File(path) => {
            let open = |source| InitrdError::Open {
                path: path.clone(),
                source,
            };
            let (file, size): (File, u64) = open_regular(path).map_err(open)?;
            let address = address_for(size, floor, ceiling)?;
            memory::place_file(memory, &file, 0, size, address)
                .map_err(|source| InitrdError::Place { address, source })?;
            Ok((size > 0).then_some(InitrdRange { address, size }))
        }
    }
}

fn address_for(size: u64, floor: u64, ceiling: u64) -> Result<u64, InitrdError> {
    let floor = floor.next_multiple_of(PAGE_SIZE);
    let room = ceiling.saturating_sub(floor);
    ceiling
        .checked_sub(size)
        .map(|address| address - address % PAGE_SIZE)
        .filter(|address| *address >= floor)
        .ok_or(InitrdError::TooLarge { size, room })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const MIB: u64 = 1 << 20;

    fn ram() -> GuestMemoryMmap {
        memory::create(64 * MIB).unwrap()
    }

    fn read(memory: &GuestMemoryMmap, range: InitrdRange) -> Vec<u8> {
        let mut bytes = vec![0; range.size as usize];
        memory
            .read_slice(&mut bytes, GuestAddress(range.address))
            .unwrap();
        bytes
    }

    #[test]
    fn file_and_bytes_end_up_at_the_same_place_with_the_same_contents() {
        let bytes: Vec<u8> = (0..10_000u32).map(|i| (i % 251) as u8).collect();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        for initrd in [
            Initrd::File(file.path().to_owned()),
            Initrd::Bytes(bytes.clone()),
        ] {
            let memory = ram();
            let range = place(&memory, &initrd, 2 * MIB, 64 * MIB).unwrap().unwrap();
            assert_eq!(range.address, 64 * MIB - 3 * 4096);
            assert!(read(&memory, range) == bytes, "{initrd:?}");
        }
    }

    #[test]
    fn one_that_is_larger_than_memory_is_refused_with_both_sizes() {
        let initrd = Initrd::Bytes(vec![0; (10 * MIB) as usize]);
        let error = place(&ram(), &initrd, 60 * MIB, 64 * MIB)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("10485760") && error.contains("4194304"),
            "{error}"
        );
    }

    #[test]
    fn an_empty_one_is_none_and_a_directory_is_an_error() {
        let empty = Initrd::Bytes(Vec::new());
        assert_eq!(place(&ram(), &empty, MIB, 64 * MIB).unwrap(), None);
        let directory = Initrd::File("/".into());
        assert!(matches!(
            place(&ram(), &directory, MIB, 64 * MIB),
            Err(InitrdError::Open { .. })
        ));
    }
}
