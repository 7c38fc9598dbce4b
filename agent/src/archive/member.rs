//! What an archive says of one file.

/// One file, directory, link or device of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its path in the archive, as it stands there: bytes, with slashes.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permissions, set-id bits and the sticky bit.
    pub mode: u32,
    /// User id; not `u32::MAX`.
    pub uid: u32,
    /// Group id; not `u32::MAX`.
    pub gid: u32,
    /// When it was modified.
    pub modified: Time,
    /// Extended attributes.
    pub attributes: Vec<Attribute>,
}

/// An extended attribute (xattr(7)): name and value.
pub type Attribute = (Vec<u8>, Vec<u8>);

/// What a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File {
        /// Its length in bytes.
        size: u64,
        /// Where its data is, ascending and not overlapping, all else being zeros; None where all is data.
        extents: Option<Vec<Extent>>,
    },
    /// A directory.
    Directory,
    /// A symbolic link with this target.
    Symlink(Vec<u8>),
    /// Another name of the member that has this name.
    HardLink(Vec<u8>),
    /// A named pipe.
    Fifo,
    /// A device node.
    Device {
        /// Whether it is a block device, else a character device.
        block: bool,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Something this side does not know: its type flag.
    Unknown(u8),
}

/// A part of a file that holds data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes from the file's start.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// A time since 1970-01-01 UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time {
    /// Whole seconds, rounded down.
    pub seconds: i64,
    /// Below 1,000,000,000.
    pub nanoseconds: u32,
}
