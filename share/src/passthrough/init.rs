//! The first request, in which both ends say what they can do.

use std::sync::atomic::Ordering;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::{Cache, Locking, MAX_TRANSFER, Share};
use crate::wire::{self, InitIn, InitOut, ROOT_ID, init};

/// What is used wherever the guest's kernel has it. Not `ATOMIC_O_TRUNC`: a kernel that has a file emptied as it is opened looks only
/// then whether it is a program that runs.
const ALWAYS: u64 = init::ASYNC_READ
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::DO_READDIRPLUS
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT
    | init::HAS_EXPIRE_ONLY;

/// Where what comes with a listing is soon not believed any more: only who looks at the entries gets it. Elsewhere
/// everybody does, as one listing costs less than a lookup for each entry.
const UNTOLD: u64 = init::AUTO_INVAL_DATA | init::READDIRPLUS_AUTO;

/// Where the guest is told of changes, so that nothing is to be guessed from a file's times, and what
/// was listed need not be listed again.
const TOLD: u64 = init::EXPLICIT_INVAL_DATA | init::CACHE_SYMLINKS | init::NO_OPENDIR_SUPPORT;

/// Without these, requests would look differently.
const NEEDED: u64 = init::MAX_PAGES | init::SETXATTR_EXT | init::INIT_EXT;

/// How many requests the guest's kernel may have under way that nobody waits for.
const MAX_BACKGROUND: u16 = 128;

impl Share {
    /// Agrees with the guest's kernel on what is used. What an earlier kernel knew is forgotten.
    ///
    /// # Errors
    /// `EPROTO` where the kernel is older than Linux 5.15.
    pub(crate) fn init(&self, asked: &InitIn, flags2: u32) -> Result<InitOut, Errno> {
        if asked.major < wire::MAJOR {
            return Err(Errno::PROTO);
        }
        if asked.major > wire::MAJOR {
            // The kernel asks again in our version.
            return Ok(InitOut {
                major: wire::MAJOR,
                minor: wire::MINOR,
                ..InitOut::default()
            });
        }
        let offered = u64::from(asked.flags) | u64::from(flags2) << 32;
        if asked.minor < wire::OLDEST_MINOR || offered & NEEDED != NEEDED {
            return Err(Errno::PROTO);
        }
        self.forget_all();
        let agreed = offered & self.wanted();
        self.agreed.store(agreed, Ordering::Relaxed);
        let root = self.inodes.get(ROOT_ID)?;
        if let Some(watcher) = &self.watcher
            && root.kind == FileType::Directory
        {
            watcher.want(&root);
        }
        let max = u32::try_from(MAX_TRANSFER).map_err(|_| Errno::INVAL)?;
        let pages = u16::try_from(MAX_TRANSFER / 4096).map_err(|_| Errno::INVAL)?;
        Ok(InitOut {
            major: wire::MAJOR,
            minor: asked.minor.min(wire::MINOR),
            max_readahead: asked.max_readahead.max(max),
            #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
            flags: agreed as u32,
            max_background: MAX_BACKGROUND,
            congestion_threshold: MAX_BACKGROUND / 4 * 3,
            max_write: max,
            time_gran: 1,
            max_pages: pages,
            map_alignment: 0,
            flags2: (agreed >> 32) as u32,
            ..InitOut::default()
        })
    }

    fn wanted(&self) -> u64 {
        let acl = match self.options.acl {
            true => init::POSIX_ACL,
            false => 0,
        };
        let cache = match self.options.cache {
            Cache::Auto if self.watcher.is_some() => TOLD,
            Cache::Auto | Cache::Strict => UNTOLD,
            Cache::Private => TOLD | init::WRITEBACK_CACHE,
        };
        let locks = match self.options.locking {
            Locking::Guest => 0,
            Locking::Host => init::POSIX_LOCKS | init::FLOCK_LOCKS,
        };
        ALWAYS | acl | cache | locks
    }

    /// The guest's kernel has let go of everything.
    pub(crate) fn forget_all(&self) {
        self.handles.clear();
        self.locks.clear();
        self.end_listing(None);
        for inode in self.inodes.clear() {
            self.forgotten(&inode);
        }
        self.agreed.store(0, Ordering::Relaxed);
    }
}
