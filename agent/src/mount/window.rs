//! Memory through which long requests and replies go between the agent and a host that has the guest's memory before
//! it: on the stream there are only headers of them then, and the guest's vsock copies nothing in pieces of 4 KiB.
//!
//! The pages are buffers registered with io_uring, whose one use here that is: they keep their places in the guest's
//! memory, which the host is told once. A slot has one user at a time: who carries requests, the host from when
//! the slot is lent until the answer, or who carries replies. What is lent when a mount is given up is never used for
//! anything else: the host may be about to write there, or to read what it then believes to be a request.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use agent::protocol::{SLOT_PAGES, WINDOW_PAGE, WINDOW_SLOTS};

/// The size of a slot, bytes.
pub const SLOT: usize = SLOT_PAGES * WINDOW_PAGE;

/// All slots.
const SIZE: usize = SLOT * WINDOW_SLOTS;

/// Machines with less memory, bytes, have better uses for so much of it.
const LEAST_MEMORY: u64 = 400 << 20;

/// `IORING_REGISTER_BUFFERS` of the kernel's include/uapi/linux/io_uring.h, and the size of `struct io_uring_params`.
const REGISTER_BUFFERS: libc::c_uint = 0;
const PARAMS: usize = 120;

/// An entry of /proc/PID/pagemap: the page is in memory, and the number of its frame.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

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
    memory: NonNull<u8>,
    /// The guest-physical address of each page.
    addresses: Vec<u64>,
    owners: [AtomicU64; WINDOW_SLOTS],
    /// Has the pages keep their places, for as long as it is open.
    ring: Option<OwnedFd>,
}

// SAFETY: the memory belongs to the window for as long as it lives, and a part of it is reached only through the one
// [`Slot`] that there is of it, which `owners` sees to.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

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
        let memory = map()?;
        let made = pin(memory).and_then(|ring| Ok((ring, addresses(memory)?)));
        match made {
            Ok((ring, addresses)) => Ok(Self {
                memory,
                addresses,
                owners: Default::default(),
                ring: Some(ring),
            }),
            Err(error) => {
                unmap(memory);
                Err(error)
            }
        }
    }

    /// The guest-physical addresses of all pages, slot after slot.
    pub fn addresses(&self) -> &[u64] {
        &self.addresses
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
        match self.owners.iter().any(is_lent) {
            true => {
                LEFT.fetch_add(1, Ordering::Relaxed);
                std::mem::forget(self.ring.take());
            }
            false => unmap(self.memory),
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
        unsafe { self.window.memory.as_ptr().add(self.index * SLOT) }
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

fn map() -> io::Result<NonNull<u8>> {
    // SAFETY: a fresh anonymous mapping at a place of the kernel's choice.
    let memory = unsafe {
        libc::mmap(
            ptr::null_mut(),
            SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    let memory = match NonNull::new(memory.cast::<u8>()) {
        Some(start) if memory != libc::MAP_FAILED => start,
        _ => return Err(io::Error::last_os_error()),
    };
    // A child would be given a copy of what is pinned.
    // SAFETY: the range that was just mapped; the advice changes nothing in this process.
    match unsafe { libc::madvise(memory.as_ptr().cast(), SIZE, libc::MADV_DONTFORK) } {
        0 => Ok(memory),
        _ => {
            let error = io::Error::last_os_error();
            unmap(memory);
            Err(error)
        }
    }
}

fn unmap(memory: NonNull<u8>) {
    // SAFETY: the whole mapping, which nobody has a reference to any more: its owner is being dropped, or was never made.
    unsafe { libc::munmap(memory.as_ptr().cast(), SIZE) };
}

/// Has the mapping's pages there, and keeps them at their places until the descriptor is closed.
fn pin(memory: NonNull<u8>) -> io::Result<OwnedFd> {
    let mut params = MaybeUninit::<[u8; PARAMS]>::zeroed();
    // SAFETY: the parameters are zero, which asks for nothing special, and the kernel writes into PARAMS bytes of them.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1_u32, params.as_mut_ptr()) };
    let ring = i32::try_from(ring).map_err(|_| ErrorKind::InvalidData)?;
    if ring < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that was just opened, which nobody else knows.
    let owned = unsafe { OwnedFd::from_raw_fd(ring) };
    let buffer = libc::iovec {
        iov_base: memory.as_ptr().cast(),
        iov_len: SIZE,
    };
    // SAFETY: the kernel reads one iovec, which names a live mapping. No operation is ever submitted to the ring, so that
    // the kernel does nothing to the memory.
    let registered = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            ring,
            REGISTER_BUFFERS,
            &raw const buffer,
            1_u32,
        )
    };
    match registered {
        0 => Ok(owned),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where the mapping's pages are in the machine's memory.
fn addresses(memory: NonNull<u8>) -> io::Result<Vec<u64>> {
    let mut entries = vec![0; SIZE / WINDOW_PAGE * size_of::<u64>()];
    let first = memory.as_ptr().addr() / WINDOW_PAGE * size_of::<u64>();
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entries, first as u64)?;
    let (entries, _) = entries.as_chunks::<8>();
    let address = |entry: &[u8; 8]| {
        let entry = u64::from_ne_bytes(*entry);
        let frame = entry & FRAME;
        (entry & PRESENT != 0 && frame != 0).then_some(frame * WINDOW_PAGE as u64)
    };
    let addresses: Option<Vec<u64>> = entries.iter().map(address).collect();
    addresses.ok_or_else(|| ErrorKind::PermissionDenied.into())
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
        let memory = window.memory;
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
