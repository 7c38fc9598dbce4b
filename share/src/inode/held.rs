//! The descriptors that hold on to inodes: opened when needed, closed when not used lately.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;

use super::{Inode, Inodes, lock};
use crate::host::{self, Stat};

/// How many directories deep a path may be. Linux has no such limit, but paths of 4096 bytes.
const MAX_DEPTH: usize = 4096;
/// How many descriptors are looked at, at most, to find one that can be closed.
const EVICTION_STEPS: usize = 64;

/// A descriptor that counts.
#[derive(Debug)]
pub(crate) struct Held {
    pub(super) fd: OwnedFd,
    pub(super) count: Arc<AtomicUsize>,
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Inodes {
    /// A descriptor of an inode.
    ///
    /// # Errors
    /// `ESTALE` where it is not found any more where it was; `ENFILE` where there are too many
    /// descriptors.
    pub fn hold(&self, inode: &Arc<Inode>) -> Result<Arc<Held>, Errno> {
        if let Some(held) = &*lock(&inode.held) {
            inode.used.store(true, Ordering::Relaxed);
            return Ok(held.clone());
        }
        // Up to the first that is held, then down again: no lock is held meanwhile, as names may
        // have become a circle in the eyes of the guest.
        let mut missing = vec![(inode.clone(), inode.place().ok_or(Errno::STALE)?)];
        let mut dir = loop {
            let parent = missing.last().ok_or(Errno::STALE)?.1.parent;
            let parent = self.get(parent)?;
            if let Some(held) = &*lock(&parent.held) {
                break held.clone();
            }
            if missing.len() >= MAX_DEPTH {
                return Err(Errno::STALE);
            }
            let place = parent.place().ok_or(Errno::STALE)?;
            missing.push((parent, place));
        };
        while let Some((inode, place)) = missing.pop() {
            dir = self.hold_at(&inode, dir.as_fd(), &place.name)?;
        }
        Ok(dir)
    }

    /// Holds on to an inode that was just found as `name` in `dir`.
    pub fn hold_at(
        &self,
        inode: &Arc<Inode>,
        dir: BorrowedFd<'_>,
        name: &CStr,
    ) -> Result<Arc<Held>, Errno> {
        if let Some(held) = &*lock(&inode.held) {
            return Ok(held.clone());
        }
        let fd = match host::hold(dir, name) {
            Err(Errno::MFILE | Errno::NFILE) => {
                self.evict(EVICTION_STEPS);
                host::hold(dir, name)
            }
            outcome => outcome,
        };
        let fd = fd.map_err(|errno| match errno {
            // Another file took its place, or none.
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV => Errno::STALE,
            errno => errno,
        })?;
        if !inode.is(&Stat::fd(fd.as_fd())?) {
            return Err(Errno::STALE);
        }
        self.keep(inode, fd)
    }

    /// Keeps `fd` as the descriptor of `inode`.
    pub fn keep(&self, inode: &Arc<Inode>, fd: OwnedFd) -> Result<Arc<Held>, Errno> {
        let held = {
            let mut slot = lock(&inode.held);
            if let Some(held) = &*slot {
                return Ok(held.clone());
            }
            self.held.fetch_add(1, Ordering::Relaxed);
            let held = Arc::new(Held {
                fd,
                count: self.held.clone(),
            });
            *slot = Some(held.clone());
            held
        };
        inode.used.store(true, Ordering::Relaxed);
        lock(&self.queue).push_back(Arc::downgrade(inode));
        let excess = self.held().saturating_sub(self.max_held);
        if excess > 0 {
            self.evict(excess);
            // All of them are needed: some slack for what is in use right now, no more.
            if self.held() > self.max_held + self.max_held / 8 + EVICTION_STEPS {
                lock(&inode.held).take();
                return Err(Errno::NFILE);
            }
        }
        Ok(held)
    }

    /// Closes up to `count` descriptors that were not used lately.
    fn evict(&self, count: usize) {
        let mut closed = Vec::new();
        let mut queue = lock(&self.queue);
        for _ in 0..queue.len().min(EVICTION_STEPS + count) {
            let Some(weak) = queue.pop_front() else {
                break;
            };
            let Some(inode) = weak.upgrade() else {
                continue;
            };
            if inode.used.swap(false, Ordering::Relaxed) || !inode.evictable() {
                queue.push_back(weak);
                continue;
            }
            closed.extend(lock(&inode.held).take());
            if closed.len() >= count {
                break;
            }
        }
        drop(queue);
        drop(closed);
    }
}
