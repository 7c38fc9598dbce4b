//! What the guest has open, by number.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::io::Errno;

use crate::inode::Inode;

/// An open file or directory.
#[derive(Debug)]
pub(crate) struct Handle {
    pub inode: Arc<Inode>,
    file: OwnedFd,
    /// Where the next read of a directory goes on; one read at a time.
    pub position: Mutex<u64>,
}

impl Handle {
    pub fn new(inode: Arc<Inode>, file: OwnedFd) -> Self {
        inode.handles.fetch_add(1, Ordering::Relaxed);
        Self {
            inode,
            file,
            position: Mutex::new(0),
        }
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.inode.handles.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All that is open.
#[derive(Debug)]
pub(crate) struct Handles {
    open: RwLock<HashMap<u64, Arc<Handle>>>,
    next: AtomicU64,
    max: usize,
}

impl Handles {
    /// A table of at most `max` handles.
    pub fn new(max: usize) -> Self {
        Self {
            open: RwLock::default(),
            next: AtomicU64::new(1),
            max,
        }
    }

    /// Whether there is room for one more.
    ///
    /// # Errors
    /// `EMFILE` where there is none.
    pub fn check_room(&self) -> Result<(), Errno> {
        match self.len() < self.max {
            true => Ok(()),
            false => Err(Errno::MFILE),
        }
    }

    /// Adds a handle, whose number is new.
    ///
    /// # Errors
    /// `EMFILE` where there is no room.
    pub fn add(&self, handle: Handle) -> Result<u64, Errno> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= self.max {
            return Err(Errno::MFILE);
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        open.insert(number, Arc::new(handle));
        Ok(number)
    }

    /// The handle with this number, which is one on inode `id`.
    ///
    /// # Errors
    /// `EBADF` where there is none.
    pub fn get(&self, number: u64, id: u64) -> Result<Arc<Handle>, Errno> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let handle = open.get(&number).filter(|handle| handle.inode.id == id);
        handle.cloned().ok_or(Errno::BADF)
    }

    /// Takes the handle out; it is closed once nobody uses it.
    pub fn remove(&self, number: u64) -> Option<Arc<Handle>> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        open.remove(&number)
    }

    /// Closes all.
    pub fn clear(&self) {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        let gone = std::mem::take(&mut *open);
        drop(open);
        drop(gone);
    }

    /// How many are open.
    pub fn len(&self) -> usize {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.len()
    }
}
