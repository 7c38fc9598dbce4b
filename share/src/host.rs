//! The host's files, one step of a path at a time.
//!
//! Nothing here follows a symbolic link, goes upwards, or opens what is not a regular file or a
//! directory. What a descriptor stands for is opened for reading and writing through
//! `/proc/self/fd`, which reaches the very same file whatever its name has become.

use std::ffi::CStr;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxFlags, StatxTimestamp, Timestamps,
};
use rustix::io::Errno;
use rustix::path::DecInt;

use crate::prompt;

/// How each step of a path is taken.
const ONE_STEP: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// How often a step is tried again that the host could not take safely at the time.
const STEP_TRIES: usize = 8;

/// What identifies a file while it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// The filesystem.
    pub dev: u64,
    /// The inode on it.
    pub ino: u64,
}

/// A time since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Time {
    pub sec: i64,
    pub nsec: u32,
}

impl From<StatxTimestamp> for Time {
    fn from(time: StatxTimestamp) -> Self {
        Self {
            sec: time.tv_sec,
            nsec: time.tv_nsec,
        }
    }
}

/// A file's attributes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stat {
    pub key: Key,
    /// When it was made, where the filesystem knows: tells a file from a later one with the same
    /// inode number.
    pub birth: Option<Time>,
    /// Type and permissions.
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub blocks: u64,
    pub blksize: u32,
    pub rdev: (u32, u32),
    pub atime: Time,
    pub mtime: Time,
    pub ctime: Time,
}

impl Stat {
    /// What kind of file it is.
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.mode)
    }

    fn of(dir: BorrowedFd<'_>, name: &CStr, flags: AtFlags) -> Result<Self, Errno> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let mut flags = flags | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        if prompt::is_prompt() {
            // Attributes that come from elsewhere may be old ones.
            flags |= AtFlags::STATX_DONT_SYNC;
        }
        let found = rustix::fs::statx(dir, name, flags, wanted)?;
        let has_birth = found.stx_mask & StatxFlags::BTIME.bits() != 0;
        Ok(Self {
            key: Key {
                dev: rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor),
                ino: found.stx_ino,
            },
            birth: has_birth.then(|| found.stx_btime.into()),
            mode: u32::from(found.stx_mode),
            nlink: found.stx_nlink,
            uid: found.stx_uid,
            gid: found.stx_gid,
            size: found.stx_size,
            blocks: found.stx_blocks,
            blksize: found.stx_blksize,
            rdev: (found.stx_rdev_major, found.stx_rdev_minor),
            atime: found.stx_atime.into(),
            mtime: found.stx_mtime.into(),
            ctime: found.stx_ctime.into(),
        })
    }

    /// Of an empty file of some kind that is nowhere.
    pub fn nothing(key: Key, kind: FileType) -> Self {
        let never = Time { sec: 0, nsec: 0 };
        Self {
            key,
            birth: None,
            mode: kind.as_raw_mode() | 0o644,
            nlink: 1,
            uid: 0,
            gid: 0,
            size: 0,
            blocks: 0,
            blksize: 4096,
            rdev: (0, 0),
            atime: never,
            mtime: never,
            ctime: never,
        }
    }

    /// Of what `name` in `dir` is, be it a symbolic link.
    pub fn at(dir: BorrowedFd<'_>, name: &CStr) -> Result<Self, Errno> {
        Self::of(dir, name, AtFlags::empty())
    }

    /// Of an open file.
    pub fn fd(file: BorrowedFd<'_>) -> Result<Self, Errno> {
        Self::of(file, c"", AtFlags::EMPTY_PATH)
    }
}

/// Holds on to what `name` in `dir` is, without opening it.
pub(crate) fn hold(dir: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    step(dir, name, OFlags::PATH, Mode::empty())
}

/// Makes the regular file `name` in `dir` and opens it; fails where there is something.
pub(crate) fn create(
    dir: BorrowedFd<'_>,
    name: &CStr,
    flags: OFlags,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    step(dir, name, flags | OFlags::CREATE | OFlags::EXCL, mode)
}

/// Makes a regular file in `dir` that has no name, and opens it.
pub(crate) fn create_nameless(
    dir: BorrowedFd<'_>,
    flags: OFlags,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::TMPFILE | OFlags::CLOEXEC;
    rustix::fs::openat(dir, c".", flags, mode)
}

fn step(dir: BorrowedFd<'_>, name: &CStr, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut tries = STEP_TRIES;
    loop {
        match rustix::fs::openat2(dir, name, flags, mode, ONE_STEP) {
            // The tree was changed under the step: it is to be taken anew.
            Err(Errno::AGAIN | Errno::INTR) if tries > 0 => tries -= 1,
            outcome => return outcome,
        }
    }
}

/// `/proc/self/fd`, through which descriptors are opened anew.
#[derive(Debug)]
pub(crate) struct Descriptors(OwnedFd);

impl Descriptors {
    pub fn open() -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(c"/proc/self/fd", flags, Mode::empty()).map(Self)
    }

    /// Opens the file that `held` stands for.
    ///
    /// # Errors
    /// `ENXIO` for what is neither a regular file nor a directory: a device, a FIFO or a socket of
    /// the host is never opened for the guest. `ELOOP` for a symbolic link.
    pub fn open_again(
        &self,
        held: BorrowedFd<'_>,
        kind: FileType,
        flags: OFlags,
    ) -> Result<OwnedFd, Errno> {
        match kind {
            FileType::RegularFile | FileType::Directory => {}
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO),
        }
        let flags = (flags | OFlags::CLOEXEC | OFlags::NOCTTY) - OFlags::NOFOLLOW;
        rustix::fs::openat(&self.0, DecInt::from_fd(held), flags, Mode::empty())
    }

    /// Sets permissions.
    pub fn set_mode(&self, held: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        rustix::fs::chmodat(&self.0, DecInt::from_fd(held), mode, AtFlags::empty())
    }

    /// Sets the times of the last access and the last change.
    pub fn set_times(&self, held: BorrowedFd<'_>, times: &Timestamps) -> Result<(), Errno> {
        rustix::fs::utimensat(&self.0, DecInt::from_fd(held), times, AtFlags::empty())
    }

    /// Holds on to what `file` stands for.
    pub fn hold_again(&self, file: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        rustix::fs::openat(&self.0, DecInt::from_fd(file), flags, Mode::empty())
    }

    /// A descriptor with which nothing can be done.
    pub fn nothing(&self) -> Result<OwnedFd, Errno> {
        rustix::io::fcntl_dupfd_cloexec(&self.0, 0)
    }

    /// Gives `held` one more name.
    pub fn link(
        &self,
        held: BorrowedFd<'_>,
        dir: BorrowedFd<'_>,
        name: &CStr,
    ) -> Result<(), Errno> {
        let from = DecInt::from_fd(held);
        rustix::fs::linkat(&self.0, from, dir, name, AtFlags::SYMLINK_FOLLOW)
    }
}

/// The path of a descriptor below `/proc/self/fd`, for calls that take nothing but a path.
#[derive(Debug)]
pub(crate) struct ProcPath {
    bytes: [u8; 32],
}

impl ProcPath {
    /// The path of what `held` stands for.
    pub fn of(held: &impl AsFd) -> Self {
        let mut bytes = [0; 32];
        let number = held.as_fd().as_raw_fd();
        // Ten digits at most: it fits, and a NUL is left.
        let _ = write!(&mut bytes[..31], "/proc/self/fd/{number}");
        Self { bytes }
    }

    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or_default()
    }
}
