//! The end of a mount: whoever comes upon it says so once, and everybody else learns of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::event::{EventfdFlags, eventfd};

/// Why a mount ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// The kernel let go of it: it was unmounted, and nothing uses it.
    Unmounted,
    /// It cannot go on; one sentence.
    Failed(String),
}

/// Ends a mount, and tells that it has ended.
#[derive(Debug)]
pub struct Ending {
    /// A file of fusectl: whatever is written to it ends the kernel's connection.
    abort: OwnedFd,
    why: OnceLock<Why>,
    event: OwnedFd,
}

impl Ending {
    /// For the mount that a write to `abort` ends.
    pub fn new(abort: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            abort,
            why: OnceLock::new(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// The mount has ended, or cannot go on. Only the first reason counts.
    pub fn announce(&self, why: Why) {
        let is_mounted = matches!(why, Why::Failed(_));
        if self.why.set(why).is_ok() {
            if is_mounted {
                self.abort();
            }
            // The counter is 0 before its only write, so the write neither blocks nor fails.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// Has the kernel give up the mount: all that wait for it get errors, now and later.
    pub fn abort(&self) {
        // The file is without effect where the kernel has let go of the mount already.
        let _ = rustix::io::write(&self.abort, b"1");
    }

    /// Why it ended; None while it has not.
    pub fn why(&self) -> Option<&Why> {
        self.why.get()
    }
}

/// Readable from the end on (and never read, so that every waiter sees it).
impl AsFd for Ending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
