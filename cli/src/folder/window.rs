//! The guest's memory beside a queue's stream: where long requests are taken from, and long replies put.
//!
//! What the guest says of its memory decides only which of it is read and written. A request is copied before anything
//! in it is looked at.

use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, OnceLock, PoisonError};

use agent::protocol::{PLACED_FROM, SLOT_PAGES, WINDOW_PAGE, WINDOW_SLOTS};
use rustix::io::Errno;
use vmm::GuestMemory;

/// How long a message in a slot may be.
const SLOT: usize = SLOT_PAGES * WINDOW_PAGE;

/// The length of the kernel's `fuse_out_header`.
const OUT_HEADER: usize = 16;

/// One of a slot's parts that is in one piece in the guest's memory.
#[derive(Debug, Clone, Copy)]
struct Piece {
    start: u64,
    len: usize,
}

/// The window of a queue, which the guest opens or does not.
#[derive(Debug)]
pub struct Window {
    memory: GuestMemory,
    /// The pieces of each slot.
    slots: OnceLock<Vec<Vec<Piece>>>,
    /// Which slot was lent for the reply to which request.
    lent: Mutex<Vec<(u64, usize)>>,
}

impl Window {
    /// A window to `memory` that is not open yet.
    pub fn new(memory: GuestMemory) -> Self {
        Self {
            memory,
            slots: OnceLock::new(),
            lent: Mutex::default(),
        }
    }

    /// Opens it at these pages.
    ///
    /// # Errors
    /// `InvalidData` for another number of pages, and where it is open.
    pub fn open(&self, pages: &[u64]) -> io::Result<()> {
        if pages.len() != WINDOW_SLOTS * SLOT_PAGES {
            return Err(nonsense("a window of another size"));
        }
        let slots = pages.chunks(SLOT_PAGES).map(pieces).collect();
        self.slots
            .set(slots)
            .map_err(|_| nonsense("a second window"))
    }

    /// Remembers the slot for the reply to the request `unique`.
    ///
    /// # Errors
    /// `InvalidData` where there is no such slot, and for more than there are.
    pub fn lend(&self, unique: u64, slot: u64) -> io::Result<()> {
        let index = self.index(slot)?;
        let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        if lent.len() >= WINDOW_SLOTS {
            return Err(nonsense("more slots than there are"));
        }
        lent.push((unique, index));
        Ok(())
    }

    /// Takes a request of `length` bytes from a slot into `message`.
    ///
    /// # Errors
    /// `InvalidData` where there is no such slot, for a length that makes no sense, and where its pages are no memory.
    pub fn fetch(&self, slot: u64, length: u64, message: &mut [u8]) -> io::Result<usize> {
        let index = self.index(slot)?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let mut rest = message
            .get_mut(..length)
            .filter(|_| (PLACED_FROM..=SLOT).contains(&length))
            .ok_or_else(|| nonsense("a request that is too short or too long"))?;
        for piece in self.slot(index) {
            let (part, behind) = rest.split_at_mut(piece.len.min(rest.len()));
            self.memory.read(piece.start, part).map_err(no_memory)?;
            rest = behind;
        }
        Ok(length)
    }

    /// Reads up to `length` bytes of `file` to behind where the header of the reply to request `unique` will be; None
    /// where no slot was lent for that.
    pub fn read(
        &self,
        unique: u64,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
    ) -> Option<Result<usize, Errno>> {
        let index = {
            let lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
            lent.iter().find(|(request, _)| *request == unique)?.1
        };
        let mut skipped = OUT_HEADER;
        let mut wanted = length.min(SLOT - OUT_HEADER);
        let pieces = self.slot(index).iter().filter_map(|piece| {
            let skip = skipped.min(piece.len);
            let len = wanted.min(piece.len - skip);
            (skipped, wanted) = (skipped - skip, wanted - len);
            (len > 0).then_some((piece.start.saturating_add(skip as u64), len))
        });
        let read = self.memory.read_file(file, offset, pieces);
        Some(read.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)))
    }

    /// Puts the reply to request `unique`, of `length` bytes in all, into the slot that was lent for it, where that is worth
    /// it or what is behind `reply` is there already; returns whether it did. The slot is not lent any more in any
    /// case.
    ///
    /// # Errors
    /// `InvalidData` where the slot's pages are no memory.
    pub fn place(&self, unique: u64, reply: &[IoSlice<'_>], length: usize) -> io::Result<bool> {
        let lent = {
            let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
            let found = lent.iter().position(|(request, _)| *request == unique);
            found.map(|at| lent.swap_remove(at))
        };
        let here: usize = reply.iter().map(|part| part.len()).sum();
        let is_worth_it = here < length || (PLACED_FROM..=SLOT).contains(&here);
        let Some((_, index)) = lent.filter(|_| is_worth_it) else {
            return match here < length {
                true => Err(nonsense("a slot that was lent for two requests")),
                false => Ok(false),
            };
        };
        let mut pieces = self.slot(index).iter().copied();
        let mut room = Piece { start: 0, len: 0 };
        for mut part in reply.iter().map(|part| &**part) {
            while !part.is_empty() {
                if room.len == 0 {
                    room = pieces.next().ok_or(ErrorKind::WriteZero)?;
                }
                let (now, later) = part.split_at(room.len.min(part.len()));
                self.memory.write(room.start, now).map_err(no_memory)?;
                room.start = room.start.saturating_add(now.len() as u64);
                room.len -= now.len();
                part = later;
            }
        }
        Ok(true)
    }

    fn index(&self, slot: u64) -> io::Result<usize> {
        let index = usize::try_from(slot).unwrap_or(usize::MAX);
        match self.slots.get().is_some_and(|slots| index < slots.len()) {
            true => Ok(index),
            false => Err(nonsense("a slot that there is not")),
        }
    }

    fn slot(&self, index: usize) -> &[Piece] {
        let slots = self.slots.get();
        slots
            .and_then(|slots| slots.get(index))
            .map_or(&[], |pieces| pieces)
    }
}

/// Pages that follow each other, as one.
fn pieces(pages: &[u64]) -> Vec<Piece> {
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
    pieces
}

fn no_memory(error: vmm::MemoryError) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, error)
}

fn nonsense(what: &str) -> io::Error {
    let sentence = format!("the guest shares folders through {what}");
    io::Error::new(ErrorKind::InvalidData, sentence)
}

#[cfg(test)]
#[path = "window_tests.rs"]
mod tests;
