//! Memory of the agent's that keeps its places in the guest's memory, so that the host can be told where it is.
//!
//! It is a buffer registered with io_uring, whose one use here that is.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};

use agent::protocol::WINDOW_PAGE;

/// `IORING_REGISTER_BUFFERS` of the kernel's include/uapi/linux/io_uring.h, and the size of `struct io_uring_params`.
const REGISTER_BUFFERS: libc::c_uint = 0;
const PARAMS: usize = 120;

/// An entry of /proc/PID/pagemap: the page is in memory, and the number of its frame.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// Pages that stay where they are until this is dropped. What is in them may be changed by the host at any time, so
/// nothing here makes a reference to it.
#[derive(Debug)]
pub struct Pinned {
    start: NonNull<u8>,
    size: usize,
    addresses: Vec<u64>,
    /// Has the pages keep their places, for as long as it is open. None once they were left to the host.
    ring: Option<OwnedFd>,
}

// SAFETY: it owns its mapping, and hands out nothing but where that is.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// So many bytes, all zero: a multiple of a page's size.
    ///
    /// # Errors
    /// Where there is no memory, or the kernel has no io_uring or keeps it from the agent.
    pub fn new(size: usize) -> io::Result<Self> {
        let start = map(size)?;
        // From here on the mapping is freed whatever fails.
        let mut pinned = Self {
            start,
            size,
            addresses: Vec::new(),
            ring: Some(open_ring().inspect_err(|_| unmap(start, size))?),
        };
        pinned.pin()?;
        pinned.addresses = addresses(start, size)?;
        Ok(pinned)
    }

    /// Where it is in this process.
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// The guest-physical address of each page.
    pub fn addresses(&self) -> &[u64] {
        &self.addresses
    }

    /// Leaves it where it is for good.
    pub fn leave(&mut self) {
        std::mem::forget(self.ring.take());
    }

    /// Has the pages there, and keeps them at their places.
    fn pin(&self) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        let Some(ring) = &self.ring else {
            return Ok(());
        };
        let buffer = libc::iovec {
            iov_base: self.start.as_ptr().cast(),
            iov_len: self.size,
        };
        // SAFETY: the kernel reads one iovec, which names a live mapping. No operation is ever submitted to the ring, so that
        // the kernel does nothing to the memory.
        let registered = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                ring.as_raw_fd(),
                REGISTER_BUFFERS,
                &raw const buffer,
                1_u32,
            )
        };
        match registered {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.ring.is_some() {
            unmap(self.start, self.size);
        }
    }
}

fn map(size: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: a fresh anonymous mapping at a place of the kernel's choice.
    let memory = unsafe {
        libc::mmap(
            ptr::null_mut(),
            size,
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
    match unsafe { libc::madvise(memory.as_ptr().cast(), size, libc::MADV_DONTFORK) } {
        0 => Ok(memory),
        _ => {
            let error = io::Error::last_os_error();
            unmap(memory, size);
            Err(error)
        }
    }
}

fn unmap(memory: NonNull<u8>, size: usize) {
    // SAFETY: the whole mapping, which nobody has a reference to any more: its owner is being dropped, or was never made.
    unsafe { libc::munmap(memory.as_ptr().cast(), size) };
}

fn open_ring() -> io::Result<OwnedFd> {
    let mut params = MaybeUninit::<[u8; PARAMS]>::zeroed();
    // SAFETY: the parameters are zero, which asks for nothing special, and the kernel writes into PARAMS bytes of them.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1_u32, params.as_mut_ptr()) };
    let ring = i32::try_from(ring).map_err(|_| ErrorKind::InvalidData)?;
    if ring < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that was just opened, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(ring) })
}

/// Where the mapping's pages are in the machine's memory.
fn addresses(memory: NonNull<u8>, size: usize) -> io::Result<Vec<u64>> {
    let mut entries = vec![0; size / WINDOW_PAGE * size_of::<u64>()];
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
