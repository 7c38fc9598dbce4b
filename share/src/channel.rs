//! The way between a guest's kernel and the server.

use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use crate::wire::AttrOut;

/// What the other end may do, or leave, of its own accord: nothing depends on it but speed.
#[derive(Debug, Clone, Copy)]
pub enum Advice {
    /// The entries of directory `dir` are looked up one by one: so many of them are better listed.
    List {
        /// The directory's node.
        dir: u64,
        /// How many entries, from the first one on.
        entries: u32,
    },
    /// A file was made just now: it has no extended attributes but those that it was made with, and no
    /// `security.capability`.
    New {
        /// The file's node.
        node: u64,
    },
    /// A directory was made just now, and is empty. Notifications tell what the host changes in there.
    Empty {
        /// The directory's node.
        node: u64,
        /// For how many seconds a guest may believe that a name is not there: `fuse_entry_out.entry_valid`.
        validity: u64,
    },
    /// A directory was changed by the request that the reply is to, so that the kernel does not know its attributes
    /// any more: these are what it would be told.
    Attributes {
        /// The directory's node.
        node: u64,
        /// Which of all of these it is: one with a lower number may say less.
        number: u64,
        /// The reply to a `FUSE_GETATTR`: `struct fuse_attr_out`.
        attributes: [u8; size_of::<AttrOut>()],
    },
}

/// Carries whole FUSE messages to and from one guest.
///
/// A share may be served over several channels at once, and one channel by several threads, so all
/// that is here may be called from several threads at a time.
pub trait Channel: Send + Sync {
    /// Waits for the next request and puts it into `buffer`, which is large enough for the largest.
    /// Returns its length; zero once there will be no more.
    ///
    /// # Errors
    /// Where the connection is broken.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Sends a reply or a notification, which is `parts` one after the other.
    ///
    /// # Errors
    /// Where it cannot be sent. A reply to a request that was interrupted, and a notification of
    /// what the guest does not know, may be refused without the connection being broken.
    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<()>;

    /// Reads up to `length` bytes of `file` from `offset` on, as pread(2) does, to the very place where the reply to the
    /// request `unique` is to have its data; None where there is no such place. That reply is sent next, as a header that
    /// announces the data, or an error, and without the data.
    fn read_to_place(
        &self,
        _unique: u64,
        _file: BorrowedFd<'_>,
        _offset: u64,
        _length: usize,
    ) -> Option<Result<usize, Errno>> {
        None
    }

    /// Whether there is somebody for advice.
    fn takes_advice(&self) -> bool {
        false
    }

    /// Sends a reply, and before it what whoever gets that is better to know.
    ///
    /// # Errors
    /// Those of [`Channel::send`].
    fn send_with_advice(&self, parts: &[IoSlice<'_>], _: &[Advice]) -> io::Result<()> {
        self.send(parts)
    }

    /// Whether the other end answers `FUSE_RELEASE` and `FUSE_RELEASEDIR` itself, which have no outcome that
    /// somebody could look at: no reply to them is sent then.
    fn answers_releases(&self) -> bool {
        false
    }
}
