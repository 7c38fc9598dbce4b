//! A folder seen through a mount that nobody else sees: it is writable where the folder's own is not, shows
//! nothing that is mounted below, and is gone with this.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2, readlinkat};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::attach::Attached;
use super::handle::{Handle, make_writable};
use crate::tree::{Tree, path_of};

/// A folder that stays mounted as long as this is there.
#[derive(Debug)]
pub struct View {
    /// Its top, as a place only.
    pub top: OwnedFd,
    /// Its top, open; None where that is no directory.
    directory: Option<OwnedFd>,
    /// The path of its top, as the kernel tells it.
    prefix: Vec<u8>,
}

/// A folder, as a thread sees it while it has something to do there.
pub struct Lookout {
    attached: Arc<Attached>,
    root: Arc<Tree>,
    view: Option<View>,
    /// Since when it is held.
    since: Instant,
}

impl Lookout {
    /// Onto a folder of the machine with this root; it is not in use yet.
    pub fn new(attached: Arc<Attached>, root: Arc<Tree>) -> Self {
        Self {
            attached,
            root,
            view: None,
            since: Instant::now(),
        }
    }

    /// Onto the same folder, for another thread.
    pub fn another(&self) -> Self {
        Self::new(Arc::clone(&self.attached), Arc::clone(&self.root))
    }

    /// The folder; None where it is not at its place any more.
    pub fn view(&mut self) -> io::Result<Option<&View>> {
        if self.view.is_none() {
            let opened = self.attached.open(&self.root);
            match opened.and_then(|top| View::new(&top)) {
                Ok(view) => {
                    self.view = Some(view);
                    self.since = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.view.as_ref())
    }

    /// Lets go of it, until it is needed again.
    pub fn close(&mut self) {
        self.view = None;
    }

    /// Lets go of it where it has been held for longer than that: it may not be at its place any more.
    pub fn close_older(&mut self, age: Duration) {
        if self.since.elapsed() > age {
            self.close();
        }
    }

    /// Whether it is held.
    pub fn is_open(&self) -> bool {
        self.view.is_some()
    }
}

impl View {
    /// Of the mount that `mounted` is the top of.
    pub fn new(mounted: &OwnedFd) -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let top = open_tree(mounted, "", flags)?;
        make_writable(&top)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match openat(&top, ".", flags, Mode::empty()) {
            Err(Errno::NOTDIR) => None,
            opened => Some(opened?),
        };
        let prefix = path(&top)?;
        Ok(Self {
            top,
            directory,
            prefix,
        })
    }

    /// Opens a file by the kernel's name for it, as a place only.
    pub fn open_handle(&self, handle: &Handle) -> Result<OwnedFd, Errno> {
        match &self.directory {
            Some(directory) => handle.open(directory),
            // There is nothing else to be watched.
            None => Ok(rustix::io::fcntl_dupfd_cloexec(&self.top, 0)?),
        }
    }

    /// Opens a directory by its path from the top on, without following anything.
    pub fn open_directory(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = if path.is_empty() { b"." } else { path };
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.top, path, flags, Mode::empty(), resolve)
    }

    /// The path of an open file from the top on; None where it has none any more.
    pub fn path_below(&self, file: impl AsFd) -> Option<Vec<u8>> {
        let path = path(file).ok()?;
        let below = match self.prefix.as_slice() {
            b"/" => path.strip_prefix(b"/")?,
            prefix if path == prefix => b"",
            prefix => path.strip_prefix(prefix)?.strip_prefix(b"/")?,
        };
        (!path.ends_with(b" (deleted)")).then(|| below.to_vec())
    }
}

fn path(file: impl AsFd) -> io::Result<Vec<u8>> {
    Ok(readlinkat(CWD, path_of(file), Vec::new())?.into_bytes())
}
