//! Pages of the guest's memory as one stretch of bytes.

use std::io::{self, ErrorKind};

use agent::protocol::WINDOW_PAGE;
use vmm::GuestMemory;

/// Pages that the guest has named, in the order of the bytes in them. What it says decides only which of its memory is read
/// and written.
#[derive(Debug)]
pub struct Pieces(Vec<Piece>);

/// Pages that follow each other in the guest's memory.
#[derive(Debug)]
struct Piece {
    start: u64,
    len: usize,
}

impl Pieces {
    /// The pages at these guest-physical addresses.
    pub fn of(pages: &[u64]) -> Self {
        let mut pieces: Vec<Piece> = Vec::new();
        for page in pages {
            match pieces.last_mut() {
                Some(last) if last.start.checked_add(last.len as u64) == Some(*page) => {
                    last.len += WINDOW_PAGE;
                }
                _ => pieces.push(Piece {
                    start: *page,
                    len: WINDOW_PAGE,
                }),
            }
        }
        Self(pieces)
    }

    /// Where the `len` bytes from `offset` on are: addresses, and how many bytes there; fewer where it ends before.
    pub fn parts(&self, offset: usize, len: usize) -> impl Iterator<Item = (u64, usize)> {
        let (mut skipped, mut wanted) = (offset, len);
        self.0.iter().filter_map(move |piece| {
            let skip = skipped.min(piece.len);
            let len = wanted.min(piece.len - skip);
            (skipped, wanted) = (skipped - skip, wanted - len);
            (len > 0).then_some((piece.start.saturating_add(skip as u64), len))
        })
    }

    /// Copies what is there from `offset` on.
    ///
    /// # Errors
    /// `InvalidData` where it ends before, or is no memory.
    pub fn read(&self, memory: &GuestMemory, offset: usize, into: &mut [u8]) -> io::Result<()> {
        let mut rest = into;
        for (start, len) in self.parts(offset, rest.len()) {
            let (part, behind) = rest.split_at_mut(len);
            memory.read(start, part).map_err(no_memory)?;
            rest = behind;
        }
        all(rest)
    }

    /// Puts `bytes` there from `offset` on.
    ///
    /// # Errors
    /// `InvalidData` where it ends before, or is no memory; a part may have been written then.
    pub fn write(&self, memory: &GuestMemory, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        for (start, len) in self.parts(offset, rest.len()) {
            let (part, behind) = rest.split_at(len);
            memory.write(start, part).map_err(no_memory)?;
            rest = behind;
        }
        all(rest)
    }
}

/// Nothing is left over.
fn all(rest: &[u8]) -> io::Result<()> {
    match rest.is_empty() {
        true => Ok(()),
        false => Err(nonsense("less memory than it says")),
    }
}

fn no_memory(error: vmm::MemoryError) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, error)
}

/// The error of a guest that says what cannot be.
pub fn nonsense(what: &str) -> io::Error {
    let sentence = format!("the guest shares folders through {what}");
    io::Error::new(ErrorKind::InvalidData, sentence)
}
