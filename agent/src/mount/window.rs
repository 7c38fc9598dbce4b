//! Memory through which long requests and replies go between the agent and a host that has the guest's memory before
//! it: on the stream there are only headers of them then, and the guest's vsock copies nothing in pieces of 4 KiB.
//!
//! A slot has one user at a time: who carries requests, the host from when the slot is lent until the answer, or who
//! carries replies. What is lent when a mount is given up is never used for anything else: the host may be about to write
//! there, or to read what it then believes to be a request.

use std::io::{self, ErrorKind};
use std::mem::ManuallyDrop;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use agent::protocol::{SLOT_PAGES, WINDOW_PAGE, WINDOW_SLOTS};

use super::pinned::Pinned;

/// The size of a slot, bytes.
pub const SLOT: usize = SLOT_PAGES * WINDOW_PAGE;

/// All slots.
const SIZE: usize = SLOT * WINDOW_SLOTS;

/// Machines with less memory, bytes, have better uses for so much of it.
const LEAST_MEMORY: u64 = 400 << 20;

/// Who a slot belongs to: nobody, somebody here, or else the request with this `unique`. The kernel counts those from 2
/// on, by two.
const FREE: u64 = 0;
const TAKEN: u64 = u64::MAX;

/// How many windows were left to the host, and how many may be before there are no more.
static LEFT: AtomicUsize = AtomicUsize::new(0);
const MAX_LEFT: usize = 8;

/// The slots of one queue.
#[derive(Debug)]
pub struct Window {
    /// [`SIZE`] bytes.
    memory: Pinned,
    owners: [AtomicU64; WINDOW_SLOTS],
}

impl Window {
    /// Memory that stays where it is.
    ///
    /// # Errors
    /// Where there is little memory, or the kernel has no io_uring or keeps it from the agent.
    pub fn new() -> io::Result<Self> {
        let is_little = rustix::system::sysinfo().totalram < LEAST_MEMORY;
        if is_little || LEFT.load(Ordering::Relaxed) >= MAX_LEFT {
            return Err(ErrorKind::OutOfMemory.into());
        }
        Ok(Self {
            memory: Pinned::new(SIZE)?,
            owners: Default::default(),
        })
    }

    /// The guest-physical addresses of all pages, slot after slot.
    pub fn addresses(&self) -> &[u64] {
        self.memory.addresses()
    }

    /// A slot that nobody has.
    pub fn take(&self) -> Option<Slot<'_>> {
        self.take_from(FREE)
    }

    /// The slot that was lent for this request, which has been answered.
    pub fn take_back(&self, unique: u64) -> Option<Slot<'_>> {
        match unique {
            FREE | TAKEN => None,
            unique => self.take_from(unique),
        }
    }

    fn take_from(&self, owner: u64) -> Option<Slot<'_>> {
        // Acquire: what the owner before did to the slot is done.
        let taken = |slot: &AtomicU64| {
            slot.compare_exchange(owner, TAKEN, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        };
        let index = self.owners.iter().position(taken)?;
        Some(Slot {
            window: self,
            index,
        })
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let is_lent = |slot: &AtomicU64| !matches!(slot.load(Ordering::Relaxed), FREE | TAKEN);
        if self.owners.iter().any(is_lent) {
            LEFT.fetch_add(1, Ordering::Relaxed);
            self.memory.leave();
        }
    }
}

/// A slot that whoever has this may use.
#[derive(Debug)]
pub struct Slot<'a> {
    window: &'a Window,
    index: usize,
}

impl Slot<'_> {
    /// Its number.
    pub fn index(&self) -> usize {
        self.index
    }

    /// What is in it.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: [`SLOT`] bytes from here on are in the window's mapping, which lives as long as the borrow, and are
        // initialized. There is one [`Slot`] of this index while `owners` says [`TAKEN`], and the host writes to it only
        // while that says a request, so nobody writes as long as this is borrowed.
        unsafe { std::slice::from_raw_parts(self.start(), SLOT) }
    }

    /// Room for a message.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `self` is borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.start(), SLOT) }
    }

    /// Leaves it to the host until the request is answered.
    pub fn lend(self, unique: u64) {
        let slot = ManuallyDrop::new(self);
        slot.give_to(unique);
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: the index is below [`WINDOW_SLOTS`], so that the offset is inside the mapping.
        unsafe { self.window.memory.start().as_ptr().add(self.index * SLOT) }
    }

    fn give_to(&self, owner: u64) {
        if let Some(slot) = self.window.owners.get(self.index) {
            slot.store(owner, Ordering::Release);
        }
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.give_to(FREE);
    }
}

/// A queue's window, once there is use for it.
#[derive(Debug)]
pub struct Lending {
    is_offered: bool,
    window: OnceLock<Option<Window>>,
}

impl Lending {
    /// One to a host that reaches the guest's memory, or does not.
    pub fn new(is_offered: bool) -> Self {
        Self {
            is_offered,
            window: OnceLock::new(),
        }
    }

    /// The window, where there is one by now.
    pub fn window(&self) -> Option<&Window> {
        self.window.get()?.as_ref()
    }

    /// The window, which is made first and shown to `announce`; None where there can be none.
    ///
    /// # Errors
    /// Those of `announce`.
    pub fn open(
        &self,
        announce: impl FnOnce(&Window) -> io::Result<()>,
    ) -> io::Result<Option<&Window>> {
        if self.is_offered && self.window.get().is_none() {
            // Without one, all goes over the stream.
            let made = Window::new().ok();
            if let Some(window) = &made {
                announce(window)?;
            }
            // Only the thread that carries requests opens it.
            let _ = self.window.set(made);
        }
        Ok(self.window())
    }

    /// Frees the slot of a request that was answered over the stream.
    pub fn answered(&self, unique: u64) {
        drop(self.window().and_then(|window| window.take_back(unique)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A window where this machine's kernel allows one.
    fn window() -> Option<Window> {
        match Window::new() {
            Ok(window) => Some(window),
            Err(error) => {
                eprintln!("no window here: {error}");
                None
            }
        }
    }

    #[test]
    fn each_page_has_a_place_of_its_own() {
        let Some(window) = window() else { return };
        let mut addresses = window.addresses().to_vec();
        assert_eq!(addresses.len(), WINDOW_SLOTS * SLOT_PAGES);
        addresses.sort_unstable();
        addresses.dedup();
        assert_eq!(addresses.len(), WINDOW_SLOTS * SLOT_PAGES);
    }

    #[test]
    fn a_slot_has_one_user_at_a_time() {
        let Some(window) = window() else { return };
        let mut first = window.take().unwrap();
        first.bytes_mut().fill(1);
        let mut second = window.take().unwrap();
        second.bytes_mut().fill(2);
        assert!(window.take().is_none());
        assert!(first.bytes().iter().all(|byte| *byte == 1));
        let index = first.index();
        first.lend(6);
        assert!(window.take().is_none() && window.take_back(8).is_none());
        assert_eq!(window.take_back(6).map(|slot| slot.index()), Some(index));
        assert!(window.take_back(6).is_none());
        assert!(window.take().is_some());
        for nobody in [FREE, TAKEN] {
            assert!(window.take_back(nobody).is_none());
        }
    }

    #[test]
    fn what_the_host_may_still_use_is_left_to_it() {
        let Some(window) = window() else { return };
        let memory = window.memory.start();
        let mut slot = window.take().unwrap();
        slot.bytes_mut().fill(7);
        let offset = slot.index() * SLOT;
        slot.lend(6);
        drop(window);
        // SAFETY: inside the mapping, which is there for good.
        assert_eq!(unsafe { memory.as_ptr().add(offset).read() }, 7);
        assert!(LEFT.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn a_host_that_does_not_reach_memory_is_shown_none() {
        let lending = Lending::new(false);
        let opened = lending.open(|_| panic!("there is nothing to announce"));
        assert!(opened.unwrap().is_none() && lending.window().is_none());
    }
}
