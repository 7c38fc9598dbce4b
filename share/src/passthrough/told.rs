//! What the guest was told, for those who take it back.

use std::ffi::{CStr, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::sync::{Arc, RwLockReadGuard};

use rustix::io::Errno;

use super::Share;
use crate::host::Stat;
use crate::inode::{Inode, Place};
use crate::watch::Watcher;
use crate::wire::{InHeader, Opcode, ROOT_ID};

/// How many directories a path goes through at most.
const MAX_DEPTH: usize = 4096;

impl Share {
    /// To be held from before a request is dispatched until its reply has been sent: what the reply
    /// says is then taken back after it, should it change. Requests that take long tell nothing that
    /// could be taken back.
    pub fn telling(&self, message: &[u8]) -> Option<RwLockReadGuard<'_, ()>> {
        Some(self.teller(message)?.telling())
    }

    /// The same for a thread that must not wait.
    ///
    /// # Errors
    /// `EAGAIN` where somebody waits to take back what was told.
    pub(crate) fn telling_promptly(
        &self,
        message: &[u8],
    ) -> Result<Option<RwLockReadGuard<'_, ()>>, Errno> {
        let watcher = self.teller(message);
        watcher.map(Watcher::telling_promptly).transpose()
    }

    /// The watcher, where a request is one that tells what may be taken back.
    fn teller(&self, message: &[u8]) -> Option<&Watcher> {
        use Opcode::{
            BatchForget, CopyFileRange, Fallocate, Forget, Fsync, Fsyncdir, Read, Setlkw, Syncfs,
            Write,
        };
        let watcher = self.watcher.as_ref()?;
        let (header, _) = <InHeader as zerocopy::FromBytes>::read_from_prefix(message).ok()?;
        match Opcode::from_number(header.opcode)? {
            BatchForget | CopyFileRange | Fallocate | Forget | Fsync | Fsyncdir | Read | Setlkw
            | Syncfs | Write => None,
            _ => Some(watcher),
        }
    }

    /// Ends [`crate::watch()`].
    pub fn stop(&self) {
        if let Some(watcher) = &self.watcher {
            watcher.stop();
        }
    }

    pub(crate) fn watcher(&self) -> Option<&Watcher> {
        self.watcher.as_ref()
    }

    /// What `name` in a directory is now, if it is shown.
    pub(crate) fn stat(&self, dir: u64, name: &CStr) -> Option<Stat> {
        let (inode, dir) = self.dir(dir).ok()?;
        let found = self.find(&inode, dir.as_fd(), name);
        found.ok().map(|(stat, _)| stat)
    }

    /// The inode of a file, if the guest knows it.
    pub(crate) fn known(&self, stat: &Stat) -> Option<Arc<Inode>> {
        self.inodes.find(stat)
    }

    pub(crate) fn all_known(&self) -> Vec<Arc<Inode>> {
        self.inodes.all()
    }

    /// The host has removed `name` from a directory, where `now` is what has taken its place. Returns
    /// what it was, if the guest knows it.
    pub(crate) fn lost(&self, dir: u64, name: &CStr, now: Option<&Stat>) -> Option<Arc<Inode>> {
        let inode = self.inodes.at(&Place::new(dir, name))?;
        if now.is_some_and(|stat| stat.key == inode.key && stat.birth == inode.birth) {
            return None;
        }
        let still = inode.held().and_then(|held| Stat::fd(held.as_fd()).ok());
        match still {
            // It has other names, under which it may be found again.
            Some(stat) if stat.nlink > 0 => self.inodes.set_place(&inode, None),
            _ => self.inodes.unname(&inode),
        }
        Some(inode)
    }

    /// The host has renamed something.
    pub(crate) fn was_moved(&self, from: (u64, &CStr), to: (u64, &CStr)) {
        let Some(inode) = self.stat(to.0, to.1).and_then(|stat| self.known(&stat)) else {
            return;
        };
        if inode.place() == Some(Place::new(from.0, from.1)) {
            let place = Place::new(to.0, to.1);
            self.inodes.set_place(&inode, Some(place));
        }
    }

    /// The path of a directory from the root of the share on.
    pub(crate) fn path(&self, id: u64) -> Option<OsString> {
        let mut steps = Vec::new();
        let mut id = id;
        while id != ROOT_ID {
            let place = self.inodes.get(id).ok()?.place()?;
            if steps.len() >= MAX_DEPTH {
                return None;
            }
            steps.push(place.name.to_bytes().to_vec());
            id = place.parent;
        }
        steps.reverse();
        Some(OsString::from_vec(steps.join(&b'/')))
    }
}
