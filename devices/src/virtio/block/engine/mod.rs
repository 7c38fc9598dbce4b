//! How a queue's worker does I/O on the host without waiting for it.
//!
//! [`uring`] is the engine of choice; [`pool`] serves where io_uring is refused (old kernels,
//! sysctl, seccomp). A queue owns its engine.

pub mod pool;
pub mod uring;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::disk::Disk;

/// The most operations that an engine has in flight at a time: the largest queue.
pub const MAX_IN_FLIGHT: u16 = super::QUEUE_SIZE;

/// Zeroes to be written where the filesystem cannot make them otherwise.
pub(super) static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// One system call's worth of work. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read into the iovecs.
    Read {
        /// From the start of the image.
        offset: u64,
    },
    /// Write the iovecs.
    Write {
        /// From the start of the image.
        offset: u64,
        /// Whether the data has to be durable at completion (RWF_DSYNC).
        durable: bool,
    },
    /// Write at most `len` zeroes.
    WriteZeroes {
        /// From the start of the image.
        offset: u64,
        /// Bytes wanted; fewer may be written at once.
        len: u64,
    },
    /// Make completed writes durable (fdatasync).
    Flush,
    /// Call fallocate.
    Allocate {
        /// `FALLOC_FL_*`.
        mode: i32,
        /// From the start of the image.
        offset: u64,
        /// Length, not zero.
        len: u64,
    },
}

/// An operation that has ended.
#[derive(Debug)]
pub struct Completion {
    /// What [`Engine::push`] was given.
    pub token: u16,
    /// Bytes moved, or why not.
    pub result: io::Result<u32>,
}

/// I/O in flight on one disk.
pub trait Engine: Send {
    /// Readable while there are completions to reap.
    fn completion_fd(&self) -> RawFd;

    /// Queues an operation; at most [`MAX_IN_FLIGHT`] are in flight at a time.
    ///
    /// # Safety
    /// The array behind `iovecs`, and the memory its entries point to, must stay valid until the
    /// completion with `token` was reaped or [`Self::drain`] returned Ok.
    unsafe fn push(
        &mut self,
        token: u16,
        operation: Operation,
        iovecs: &[libc::iovec],
    ) -> io::Result<()>;

    /// Starts what was pushed since the last call.
    fn submit(&mut self) -> io::Result<()>;

    /// Appends what has ended to `completions`; does not wait.
    fn reap(&mut self, completions: &mut Vec<Completion>);

    /// Waits until nothing is in flight and forgets the completions. After an error something may
    /// still be, and the memory in question must not be given back.
    fn drain(&mut self) -> io::Result<()>;
}

/// Which engine a device uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// io_uring where it works, threads elsewhere.
    #[default]
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// A few threads with blocking system calls.
    Threads,
}

impl EngineKind {
    /// Which engine works on this host: [`Self::Auto`] becomes one of the others.
    pub fn probe(self, disk: &Arc<Disk>) -> io::Result<Self> {
        match self {
            Self::Auto => match uring::Uring::new(disk.clone()) {
                Ok(_) => Ok(Self::IoUring),
                Err(error) => {
                    tracing::info!("io_uring is refused ({error}): disk I/O runs on threads");
                    Ok(Self::Threads)
                }
            },
            Self::IoUring => uring::Uring::new(disk.clone()).map(|_| self),
            Self::Threads => Ok(self),
        }
    }

    /// Makes an engine for `disk`. For [`Self::Auto`] that is threads where a ring cannot be had.
    pub fn open(self, disk: &Arc<Disk>) -> io::Result<Box<dyn Engine>> {
        if self != Self::Threads {
            match uring::Uring::new(disk.clone()) {
                Ok(uring) => return Ok(Box::new(uring)),
                Err(error) if self == Self::IoUring => return Err(error),
                Err(_) => {}
            }
        }
        Ok(Box::new(pool::Pool::new(disk.clone())?))
    }
}
