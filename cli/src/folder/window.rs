//! The guest's memory beside a queue's stream: where long requests are taken from, and long replies put.
//!
//! What the guest says of its memory decides only which of it is read and written. A request is copied before anything
//! in it is looked at.

use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, OnceLock, PoisonError};

use agent::protocol::{PLACED_FROM, SLOT_PAGES, WINDOW_PAGE, WINDOW_SLOTS};
use rustix::io::Errno;
use share::wire::OUT_HEADER_LEN as OUT_HEADER;
use vmm::GuestMemory;

use super::pieces::{Pieces, nonsense};

/// How long a message in a slot may be.
const SLOT: usize = SLOT_PAGES * WINDOW_PAGE;

/// The window of a queue, which the guest opens or does not.
#[derive(Debug)]
pub struct Window {
    memory: GuestMemory,
    slots: OnceLock<Vec<Pieces>>,
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
        let slots = pages.chunks(SLOT_PAGES).map(Pieces::of).collect();
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
        let slot = self.slot(self.index(slot)?)?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let message = message
            .get_mut(..length)
            .filter(|_| (PLACED_FROM..=SLOT).contains(&length))
            .ok_or_else(|| nonsense("a request that is too short or too long"))?;
        slot.read(&self.memory, 0, message)?;
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
        let slot = self.slot(index).ok()?;
        let pieces = slot.parts(OUT_HEADER, length.min(SLOT - OUT_HEADER));
        let read = self.memory.read_file(file, offset, pieces);
        Some(read.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)))
    }

    /// Puts the reply to request `unique`, which is `length` bytes with what is in its slot already, before that; returns
    /// whether there is something. The slot is not lent any more in any case.
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
        if here == length {
            return Ok(false);
        }
        let (_, index) = lent.ok_or_else(|| nonsense("a slot that was lent for two requests"))?;
        let mut at = 0;
        for part in reply {
            self.slot(index)?.write(&self.memory, at, part)?;
            at += part.len();
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

    fn slot(&self, index: usize) -> io::Result<&Pieces> {
        let slots = self.slots.get();
        slots
            .and_then(|slots| slots.get(index))
            .ok_or_else(|| nonsense("a slot that there is not"))
    }
}

#[cfg(test)]
#[path = "window_tests.rs"]
mod tests;
