//! Locks: what of the guest's requests holds on the host (see `lock.rs`).

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::{Locking, Share};
use crate::lock;
use crate::wire::{FileLock, FlushIn, LK_FLOCK, LkIn};

impl Share {
    /// # Errors
    /// `ENOSYS` where locks are those of the guest's kernel.
    fn check_locking(&self) -> Result<(), Errno> {
        match self.options.locking {
            Locking::Guest => Err(Errno::NOSYS),
            Locking::Host => Ok(()),
        }
    }

    /// Takes a lock, or gives it up, without waiting.
    pub(crate) fn set_lock(&self, id: u64, asked: &LkIn) -> Result<(), Errno> {
        self.check_locking()?;
        let handle = self.handles.get(asked.fh, id)?;
        if handle.inode.kind != FileType::RegularFile && asked.lk_flags & LK_FLOCK == 0 {
            return Err(Errno::BADF);
        }
        if asked.lk_flags & LK_FLOCK != 0 {
            return lock::set_whole(std::os::fd::AsFd::as_fd(&*handle), asked.lk.kind);
        }
        let holder = (id, asked.owner);
        let is_unlock = asked.lk.kind == libc::F_UNLCK.cast_unsigned();
        if is_unlock && self.locks.known(holder).is_none() {
            return Ok(());
        }
        let file = self.locks.holder(holder, || {
            let held = self.inodes.hold(&handle.inode)?;
            let open = |flags| self.open_again(&handle.inode, &held, flags);
            // A lock for writing takes a description for writing.
            match self.check_writable().and_then(|()| open(OFlags::RDWR)) {
                Err(Errno::ROFS | Errno::ACCESS | Errno::PERM | Errno::TXTBSY) => {
                    open(OFlags::RDONLY)
                }
                outcome => outcome,
            }
        })?;
        lock::set(&file, &asked.lk)
    }

    /// What is in the way of a lock.
    pub(crate) fn test_lock(&self, id: u64, asked: &LkIn) -> Result<FileLock, Errno> {
        self.check_locking()?;
        let handle = self.handles.get(asked.fh, id)?;
        if let Some(file) = self.locks.known((id, asked.owner)) {
            return lock::test(&file, &asked.lk);
        }
        let held = self.inodes.hold(&handle.inode)?;
        let file = self.open_again(&handle.inode, &held, OFlags::RDONLY)?;
        lock::test(&file, &asked.lk)
    }

    /// A process of the guest has closed a file, by which it loses its locks on it.
    pub(crate) fn flush(&self, id: u64, asked: &FlushIn) -> Result<(), Errno> {
        self.check_locking()?;
        self.handles.get(asked.fh, id)?;
        self.locks.closed((id, asked.lock_owner));
        Ok(())
    }
}
