//! A directory tree that commands see as `/`, and paths resolved inside it.
//!
//! The agent itself stays in the initramfs; the machine's root is a tree that it holds by a file
//! descriptor. Every path that the agent resolves in a tree is resolved with `RESOLVE_IN_ROOT`,
//! so that a symlink in an image leads to a place in that image.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};

/// No file that the agent reads as a whole (passwd, group) is longer than this.
const MAX_FILE: u64 = 16 << 20;

/// A root directory, which may be still to come.
#[derive(Debug)]
pub struct Tree {
    root: OnceLock<OwnedFd>,
    is_own: bool,
}

impl Tree {
    /// The tree that the agent itself runs in.
    pub fn own() -> io::Result<Self> {
        Ok(Self {
            root: OnceLock::from(open_directory("/")?),
            is_own: true,
        })
    }

    /// The tree below `path` of the agent's own tree.
    pub fn below(path: &str) -> io::Result<Self> {
        Ok(Self {
            root: OnceLock::from(open_directory(path)?),
            is_own: false,
        })
    }

    /// A tree that is not the agent's own and not there yet: nothing is found in it before [`Tree::settle`].
    pub fn later() -> Self {
        Self {
            root: OnceLock::new(),
            is_own: false,
        }
    }

    /// From now on it is what `other` is. Only the first one counts.
    pub fn settle(&self, other: Self) {
        if let Some(root) = other.root.into_inner() {
            // A tree that is there stays what it is.
            let _ = self.root.set(root);
        }
    }

    /// The directory to change root to, or None where the agent is in this tree already.
    /// Fails where it is not there yet.
    pub fn new_root(&self) -> io::Result<Option<BorrowedFd<'_>>> {
        let directory = self.directory()?;
        Ok((!self.is_own).then_some(directory))
    }

    /// Its top directory; fails where it is not there yet.
    pub fn directory(&self) -> io::Result<BorrowedFd<'_>> {
        let missing = || {
            io::Error::new(
                io::ErrorKind::NotFound,
                "the machine's root is not there yet",
            )
        };
        self.root.get().map(AsFd::as_fd).ok_or_else(missing)
    }

    /// Opens `path` of this tree, close-on-exec. Absolute and relative paths both start at its root.
    pub fn open(&self, path: impl AsRef<[u8]>, flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC;
        Ok(rustix::fs::openat2(
            self.directory()?,
            path.as_ref(),
            flags,
            Mode::empty(),
            ResolveFlags::IN_ROOT,
        )?)
    }

    /// Reads a regular file of this tree.
    ///
    /// Fails with InvalidData where it is longer than 16 MiB or no regular file.
    pub fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        // O_NONBLOCK: a FIFO in an image must not hold the agent up.
        let file = std::fs::File::from(self.open(path, OFlags::RDONLY | OFlags::NONBLOCK)?);
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() > MAX_FILE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("/{path} is no regular file of at most 16 MiB"),
            ));
        }
        let mut content = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut content)?;
        Ok(content)
    }

    /// Opens the directory `path` (for use as a place), making it and its parents where missing,
    /// each with the permissions `mode`.
    pub fn make_directory(&self, path: impl AsRef<[u8]>, mode: u32) -> io::Result<OwnedFd> {
        let place = OFlags::PATH | OFlags::DIRECTORY;
        let mut done = Vec::new();
        let mut directory = self.open("/", place)?;
        let names = path.as_ref().split(|byte| *byte == b'/');
        for name in names.filter(|name| !name.is_empty()) {
            done.push(b'/');
            done.extend_from_slice(name);
            directory = match self.open(&done, place) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let mode = Mode::from_raw_mode(mode);
                    rustix::fs::mkdirat(&directory, name, mode)?;
                    // mkdir masks the mode with the umask.
                    rustix::fs::chmodat(&directory, name, mode, AtFlags::empty())?;
                    self.open(&done, place)?
                }
                opened => opened?,
            };
        }
        Ok(directory)
    }
}

/// A path that names what `fd` has open, for system calls that take paths only.
pub fn path_of(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

fn open_directory(path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}
