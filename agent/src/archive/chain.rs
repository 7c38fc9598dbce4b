//! The way from a directory down to one below it, as open directories.
//!
//! Each step goes from a directory that is open to an entry of it that is no symlink: so however
//! the tree is rearranged meanwhile, a step leads to a directory that was there, and never through
//! a link. A chain of any length keeps only its deepest directories open; going back up past
//! those is by `..`, and what that leads to is checked to be where the way down had passed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, Stat, fstat, openat};
use rustix::io::Errno;

/// Directories of a chain that are kept open, besides its first.
const MAX_OPEN: usize = 64;

/// Open directories, one in the other, and something to remember about each.
#[derive(Debug)]
pub struct Chain<T> {
    first: Link<T>,
    rest: Vec<(Vec<u8>, Link<T>)>,
}

#[derive(Debug)]
struct Link<T> {
    directory: Option<OwnedFd>,
    identity: Identity,
    about: T,
}

/// What tells a file from all others of a system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    device: u64,
    inode: u64,
}

impl From<&Stat> for Identity {
    fn from(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        }
    }
}

impl<T> Chain<T> {
    /// Starts at `directory`.
    pub fn new(directory: OwnedFd, about: T) -> Result<Self, Errno> {
        let first = Link::new(directory, about)?;
        let rest = Vec::new();
        Ok(Self { first, rest })
    }

    /// Steps below the first directory.
    pub fn depth(&self) -> usize {
        self.rest.len()
    }

    /// The name of each step.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.rest.iter().map(|(name, _)| name.as_slice())
    }

    /// The first directory.
    pub fn top(&self) -> Result<BorrowedFd<'_>, Errno> {
        let directory = self.first.directory.as_ref();
        directory.map(AsFd::as_fd).ok_or(Errno::STALE)
    }

    /// The deepest directory. Fails only where it could not be opened again.
    pub fn here(&self) -> Result<BorrowedFd<'_>, Errno> {
        let directory = self.last().directory.as_ref();
        directory.map(AsFd::as_fd).ok_or(Errno::STALE)
    }

    /// What is remembered about the deepest directory.
    pub fn about(&mut self) -> &mut T {
        match self.rest.last_mut() {
            Some((_, link)) => &mut link.about,
            None => &mut self.first.about,
        }
    }

    /// Goes down into `name`, which has been opened there as `directory`.
    pub fn enter(&mut self, name: &[u8], directory: OwnedFd, about: T) -> Result<(), Errno> {
        let link = Link::new(directory, about)?;
        self.rest.push((name.to_vec(), link));
        if let Some(above) = self.rest.len().checked_sub(MAX_OPEN + 1)
            && let Some((_, link)) = self.rest.get_mut(above)
        {
            link.directory = None;
        }
        Ok(())
    }

    /// Goes up from the deepest directory, which must not be the first: its name, and it with what
    /// was remembered about it.
    ///
    /// Fails with ESTALE where a directory is not any more where it was; the chain is one shorter
    /// all the same.
    pub fn leave(&mut self) -> (Vec<u8>, Result<(OwnedFd, T), Errno>) {
        match self.rest.pop() {
            Some((name, below)) => (name, self.reopen(below)),
            None => (Vec::new(), Err(Errno::INVAL)),
        }
    }

    /// Makes sure that the deepest directory is open, `below` having been in it.
    fn reopen(&mut self, below: Link<T>) -> Result<(OwnedFd, T), Errno> {
        let directory = below.directory.ok_or(Errno::STALE)?;
        let here = match self.rest.last_mut() {
            Some((_, link)) => link,
            None => &mut self.first,
        };
        if here.directory.is_none() {
            let above = open(&directory, b"..")?;
            if Identity::from(&fstat(&above)?) != here.identity {
                return Err(Errno::STALE);
            }
            here.directory = Some(above);
        }
        Ok((directory, below.about))
    }

    /// The first directory, when all others have been left.
    pub fn finish(self) -> (Option<OwnedFd>, T) {
        (self.first.directory, self.first.about)
    }

    fn last(&self) -> &Link<T> {
        self.rest.last().map_or(&self.first, |(_, link)| link)
    }
}

impl<T> Link<T> {
    fn new(directory: OwnedFd, about: T) -> Result<Self, Errno> {
        let identity = Identity::from(&fstat(&directory)?);
        Ok(Self {
            directory: Some(directory),
            identity,
            about,
        })
    }
}

/// Opens the directory `name` of `directory`: no symlink, nothing else.
pub fn open(directory: impl AsFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(directory, name, flags, Mode::empty())
}
