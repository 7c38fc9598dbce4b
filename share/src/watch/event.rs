//! What happened on the host, for those in the guest who watch.

use std::ffi::{CString, OsString};

use rustix::fs::FileType;

/// A change of the host's in a directory that the guest knows, or of the file that is shared by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostEvent {
    /// The directory's inode number in the guest's requests; that of the root for a file that is shared by itself.
    pub dir: u64,
    /// The directory's path from the root of the share on, as the guest knows it; empty for the root.
    pub path: OsString,
    /// The entry it happened to; empty for the directory, or the file that is shared, itself.
    pub name: CString,
    /// What happened.
    pub change: Change,
}

/// What kind of file something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A FIFO, a socket or a device.
    Special,
}

impl Kind {
    pub(crate) fn of(kind: FileType) -> Self {
        match kind {
            FileType::RegularFile => Self::File,
            FileType::Directory => Self::Directory,
            FileType::Symlink => Self::Symlink,
            _ => Self::Special,
        }
    }
}

/// What happened to an entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It is there, and was not, or was something else.
    Created {
        /// What it is.
        kind: Kind,
    },
    /// It was written.
    Modified,
    /// It was closed by somebody who had it open for writing.
    CloseWrite,
    /// Its attributes were changed.
    Attrib,
    /// It is gone.
    Deleted {
        /// Whether it was a directory.
        is_dir: bool,
    },
    /// It has another name now.
    Moved {
        /// The new directory's inode number.
        dir: u64,
        /// The new directory's path, as in [`HostEvent::path`].
        path: OsString,
        /// The new name.
        name: CString,
    },
    /// More happened than could be told: anything may have changed.
    Overflow,
}
