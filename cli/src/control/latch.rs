//! Something that happens once and that many wait for, each with a descriptor of its own to watch meanwhile.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::event::{EventfdFlags, eventfd};

use crate::store::Ending;

/// The end of a machine: announced once, seen by all.
#[derive(Debug)]
pub struct Latch {
    ending: OnceLock<Ending>,
    /// Readable from the announcement on, and never read.
    announced: OwnedFd,
}

impl Latch {
    /// One whose end is still to come.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            ending: OnceLock::new(),
            announced: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Announces the end; the first announcement counts.
    pub fn announce(&self, ending: Ending) {
        if self.ending.set(ending).is_ok() {
            // A counter of 0 takes 1 without failing.
            let _ = rustix::io::write(&self.announced, &1u64.to_ne_bytes());
        }
    }

    /// What was announced.
    pub fn ending(&self) -> Option<&Ending> {
        self.ending.get()
    }
}

impl AsFd for Latch {
    /// Readable once the end was announced.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.announced.as_fd()
    }
}
