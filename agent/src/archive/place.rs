//! The paths that people type, looked up: symlinks in them are followed, as with `cp`.
//!
//! That is unlike the names in an archive, which are never looked up here.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Stat, openat, openat2, readlinkat, statat,
};
use rustix::io::Errno;

use super::chain;

/// Symlinks that are followed for the last part of one path, as in Linux.
const MAX_LINKS: usize = 40;

/// Tries of a lookup that loses races against renames.
const TRIES: usize = 16;

/// Where paths are looked up.
#[derive(Debug, Clone, Copy)]
pub enum Root<'a> {
    /// As this process does, from its working directory.
    Own,
    /// In the tree below this directory, which no path and no symlink leads out of.
    Tree(BorrowedFd<'a>),
}

/// What is at a path.
#[derive(Debug)]
pub enum Place {
    /// A directory, open for reading.
    Directory(OwnedFd),
    /// Anything else.
    File {
        /// The directory that it is in, open as a place only.
        parent: OwnedFd,
        /// Its name there.
        name: Vec<u8>,
        /// What it is.
        stat: Box<Stat>,
    },
    /// Nothing yet.
    Free {
        /// The directory that it would be in, open as a place only.
        parent: OwnedFd,
        /// Its name there.
        name: Vec<u8>,
        /// Whether it was named as a directory, with a slash at the end.
        as_directory: bool,
    },
}

impl Root<'_> {
    /// Finds what is at `path`. A symlink in the last place is followed where `follow` is true or a
    /// slash stands behind it.
    ///
    /// Fails with ENOENT where the directory that it would be in is missing, and with ENOTDIR
    /// where something that is no directory is used as one.
    pub fn find(&self, path: &[u8], follow: bool) -> Result<Place, Errno> {
        let mut path = path.to_vec();
        for _ in 0..MAX_LINKS {
            let trimmed = without_slashes(&path);
            let as_directory = trimmed.len() < path.len();
            let split = trimmed.iter().rposition(|&byte| byte == b'/');
            let (parent, name) = match split {
                Some(slash) => trimmed.split_at(slash + 1),
                None => (&b"."[..], trimmed),
            };
            if matches!(name, b"" | b"." | b"..") {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                return self.open(&path, flags).map(Place::Directory);
            }
            let parent_fd = self.open(parent, OFlags::PATH | OFlags::DIRECTORY)?;
            let name = name.to_vec();
            let stat = match statat(&parent_fd, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => {
                    return Ok(Place::Free {
                        parent: parent_fd,
                        name,
                        as_directory,
                    });
                }
                Err(error) => return Err(error),
            };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Symlink if follow || as_directory => {
                    let target = readlinkat(&parent_fd, name.as_slice(), Vec::new())?;
                    let mut next = match target.to_bytes().first() {
                        Some(b'/') => Vec::new(),
                        _ => [parent, b"/"].concat(),
                    };
                    next.extend_from_slice(target.to_bytes());
                    if as_directory {
                        next.push(b'/');
                    }
                    path = next;
                }
                FileType::Directory => {
                    return chain::open(&parent_fd, &name).map(Place::Directory);
                }
                _ if as_directory => return Err(Errno::NOTDIR),
                _ => {
                    return Ok(Place::File {
                        parent: parent_fd,
                        name,
                        stat: Box::new(stat),
                    });
                }
            }
        }
        Err(Errno::LOOP)
    }

    fn open(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC;
        let Self::Tree(root) = self else {
            return openat(CWD, path, flags, Mode::empty());
        };
        for _ in 0..TRIES {
            let inside = ResolveFlags::IN_ROOT;
            match openat2(root.as_fd(), path, flags, Mode::empty(), inside) {
                // Something was renamed while `..` was looked up.
                Err(Errno::AGAIN) => {}
                opened => return opened,
            }
        }
        Err(Errno::AGAIN)
    }
}

fn without_slashes(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|&byte| byte != b'/');
    path.get(..end.map_or(0, |last| last + 1)).unwrap_or(path)
}
