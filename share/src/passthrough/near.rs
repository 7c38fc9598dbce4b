//! Which files can be reached without waiting for anybody else than this host.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use zerocopy::FromBytes;

use super::Share;
use crate::wire::{InHeader, Opcode};

/// Filesystems that answer from memory or a disk of this host: their numbers in linux/magic.h, or their own sources.
const NEAR: [u64; 11] = [
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // btrfs
    0xf2f5_2010, // F2FS
    0xca45_1a4e, // bcachefs
    0x2fc1_2fc1, // ZFS
    0x794c_7630, // overlayfs
    0x0102_1994, // tmpfs
    0x8584_58f6, // ramfs
    0x7371_7368, // squashfs
    0xe0f5_e1e2, // EROFS
];

/// Of so many filesystems it is kept in mind whether they are such.
const MAX_FILESYSTEMS: usize = 1024;

/// Which of the filesystems that a share has files of are near.
#[derive(Debug, Default)]
pub(super) struct Near {
    known: RwLock<HashMap<u64, bool>>,
    /// A file of one that is not known yet; zero for none.
    unknown: AtomicU64,
}

impl Near {
    /// Whether the filesystem `dev` is known to be near.
    pub fn has(&self, dev: u64) -> bool {
        self.get(dev) == Some(true)
    }

    fn get(&self, dev: u64) -> Option<bool> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(&dev).copied()
    }

    /// Finds out about `dev`, on which `file` is.
    pub fn learn(&self, dev: u64, file: BorrowedFd<'_>) {
        let found = rustix::fs::fstatfs(file).map(|found| found.f_type.cast_unsigned());
        let is_near = found.is_ok_and(|kind| NEAR.contains(&kind));
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if known.len() < MAX_FILESYSTEMS {
            known.insert(dev, is_near);
        }
    }
}

impl Share {
    /// Whether the file that a request is about is near. Where that is not known,
    /// [`Share::learn_filesystems`] finds out.
    pub(crate) fn is_near(&self, message: &[u8]) -> bool {
        let Ok((header, _)) = InHeader::read_from_prefix(message) else {
            return false;
        };
        // It names many files, or one that may be gone, and asks nothing of them.
        let opcode = Opcode::from_number(header.opcode);
        if matches!(opcode, Some(Opcode::Forget | Opcode::BatchForget)) {
            return true;
        }
        let Ok(inode) = self.inodes.get(header.nodeid) else {
            // That is soon found, too.
            return true;
        };
        let known = self.near.get(inode.key.dev);
        if known.is_none() {
            self.near.unknown.store(inode.id, Ordering::Relaxed);
        }
        known == Some(true)
    }

    /// Finds out about filesystems of which it is not known. To be called where waiting is no harm.
    pub(crate) fn learn_filesystems(&self) {
        if self.near.unknown.load(Ordering::Relaxed) == 0 {
            return;
        }
        let node = self.near.unknown.swap(0, Ordering::Relaxed);
        if let Ok((inode, held)) = self.held(node) {
            self.near.learn(inode.key.dev, held.as_fd());
        }
    }
}
