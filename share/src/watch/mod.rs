//! What changes on the host under the share: who is to be told what.
//!
//! Each directory that the guest knows is watched: at once when it looks into it, for what it is told then has to
//! hold, and else a moment later, for its programs may wait for what happens there. As long as the guest knows it
//! and the host has room for one more watch. What this process itself does for the guest is told
//! apart by the kernel, so a guest never hears of its own changes. A file that is shared by itself is watched from
//! the beginning, under whatever name it is changed.

mod coherence;
mod event;
mod fanotify;
mod overlap;
mod replay;

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, TryLockError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

pub use coherence::watch;
pub use event::{Change, HostEvent, Kind};
pub(crate) use fanotify::FileId;
use fanotify::Group;
pub(crate) use overlap::{Single, Unseen};
pub(crate) use replay::{Before, Replay, answer};

use crate::host::Key;
use crate::inode::{Held, Inode, lock};

/// How many directories may wait to be watched. Others are watched once the guest looks into them.
const MAX_WANTED: usize = 1 << 16;

/// Whether a directory, or a file that is shared by itself, is watched.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum Watch {
    /// Nobody has looked into it.
    #[default]
    Not,
    /// Under this name.
    As(FileId),
    /// It cannot be.
    Never,
}

/// The directories, or the one file, that are watched.
#[derive(Debug)]
pub(crate) struct Watcher {
    root: PathBuf,
    /// What is shared, where that is a file by itself.
    file: Option<Key>,
    /// The guest may change what is shared.
    is_writable: bool,
    group: Group,
    dirs: RwLock<HashMap<FileId, u64>>,
    /// Some directories cannot be watched, and the guest may change them.
    unseen: OnceLock<Option<Unseen>>,
    /// Whoever is to tell a guest what to believe for good holds this from before it looks at the
    /// host until it has told; whoever is to tell it otherwise waits until all those have.
    telling: RwLock<()>,
    /// Directories that the guest knows and has not looked into: its programs may watch them all the same.
    wanted: Mutex<HashSet<u64>>,
    /// There is no room to watch those.
    is_full: AtomicBool,
    /// Directories that were listed and cannot be watched.
    unwatched: Mutex<HashSet<u64>>,
    stopping: AtomicBool,
    /// Written to where either of these is not as it was.
    wake: OwnedFd,
}

impl Watcher {
    /// One for a share of `root`, which is absolute and has no symbolic links in it, and which the guest may
    /// change if it `is_writable`.
    ///
    /// # Errors
    /// Where the host has no fanotify for us.
    pub fn open(root: &Path, is_writable: bool) -> Result<Self, Errno> {
        Self::with(Group::for_directories()?, root, is_writable)
    }

    /// One for a share of the file `root` by itself, which is watched already: `file`, as `held` has it.
    ///
    /// # Errors
    /// Where the host has no fanotify for us, or the file cannot be watched.
    pub fn open_file(
        root: &Path,
        is_writable: bool,
        file: &Inode,
        held: &Held,
    ) -> Result<Self, Errno> {
        let mut watcher = Self::with(Group::for_file()?, root, is_writable)?;
        watcher.file = Some(file.key);
        *lock(&file.watch) = Watch::As(watcher.group.mark(held.as_fd())?);
        Ok(watcher)
    }

    fn with(group: Group, root: &Path, is_writable: bool) -> Result<Self, Errno> {
        Ok(Self {
            root: root.to_owned(),
            file: None,
            is_writable,
            group,
            dirs: RwLock::default(),
            unseen: OnceLock::new(),
            telling: RwLock::new(()),
            wanted: Mutex::default(),
            is_full: AtomicBool::new(false),
            unwatched: Mutex::default(),
            stopping: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// What is told to the guest while this is held is taken back in time where it changes.
    pub fn telling(&self) -> RwLockReadGuard<'_, ()> {
        self.telling.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same, unless that has to wait.
    ///
    /// # Errors
    /// `EAGAIN` then.
    pub fn telling_promptly(&self) -> Result<RwLockReadGuard<'_, ()>, Errno> {
        match self.telling.try_read() {
            Ok(telling) => Ok(telling),
            Err(TryLockError::Poisoned(telling)) => Ok(telling.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Errno::AGAIN),
        }
    }

    /// What is shared.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Everything that was looked at before this is called has been told to the guest after it.
    fn all_told(&self) {
        drop(self.telling.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Watches a directory, unless it is watched already; whether it is now.
    pub fn add(&self, dir: &Inode, held: &Held) -> bool {
        let mut watch = lock(&dir.watch);
        if *watch == Watch::Not {
            *watch = match self.group.mark(held.as_fd()) {
                Ok(id) => {
                    let mut dirs = self.dirs.write().unwrap_or_else(PoisonError::into_inner);
                    if dirs.insert(id.clone(), dir.id).is_none() {
                        overlap::join(&id);
                    }
                    Watch::As(id)
                }
                Err(errno) => {
                    self.say(errno);
                    Watch::Never
                }
            };
        }
        matches!(*watch, Watch::As(_))
    }

    /// The guest has got to know a directory: it is watched in a moment.
    pub fn want(&self, dir: &Inode) {
        if dir.is_watched() || self.is_full.load(Ordering::Relaxed) {
            return;
        }
        let mut wanted = lock(&self.wanted);
        if wanted.len() < MAX_WANTED && wanted.insert(dir.id) && wanted.len() == 1 {
            self.wake();
        }
    }

    /// Those that are wanted, each once.
    fn take_wanted(&self) -> HashSet<u64> {
        std::mem::take(&mut *lock(&self.wanted))
    }

    /// Watches a directory that is wanted, where there is room.
    fn add_wanted(&self, dir: &Inode, held: &Held) {
        let has_room = {
            let watch = lock(&dir.watch);
            *watch != Watch::Not || self.group.mark(held.as_fd()).is_ok()
        };
        match has_room {
            true => drop(self.add(dir, held)),
            // What is left is for directories that the guest looks into.
            false => self.is_full.store(true, Ordering::Relaxed),
        }
    }

    fn say(&self, errno: Errno) {
        let unseen = self.is_writable.then(|| Unseen::new(&self.root));
        if self.unseen.set(unseen).is_err() {
            return;
        }
        match errno {
            Errno::NOSPC => tracing::warn!(
                "the guest uses more directories of the share than this host lets one user watch \
                 (fs.fanotify.max_user_marks): in others it sees changes after a second"
            ),
            errno => tracing::warn!(
                "a shared directory cannot be watched for changes ({errno}): the guest sees those \
                 in it after a second"
            ),
        }
    }

    /// The guest has forgotten a directory. `held` is a descriptor of it, if there still is one.
    pub fn remove(&self, dir: &Inode, held: Option<&Held>) {
        let Watch::As(id) = std::mem::take(&mut *lock(&dir.watch)) else {
            return;
        };
        let mut dirs = self.dirs.write().unwrap_or_else(PoisonError::into_inner);
        if dirs.get(&id) != Some(&dir.id) {
            // The guest has got to know it anew.
            return;
        }
        dirs.remove(&id);
        overlap::leave(&id);
        if let Some(held) = held {
            // A directory that is gone has no mark any more either.
            let _ = self.group.unmark(held.as_fd());
        }
    }

    fn dir(&self, id: &FileId) -> Option<u64> {
        let dirs = self.dirs.read().unwrap_or_else(PoisonError::into_inner);
        dirs.get(id).copied()
    }

    /// The guest has listed a directory that cannot be watched: it is told in a moment to list it anew.
    pub fn add_unwatched(&self, dir: u64) {
        let mut unwatched = lock(&self.unwatched);
        if unwatched.insert(dir) && unwatched.len() == 1 {
            self.wake();
        }
    }

    /// Ends [`watch`].
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.wake();
    }

    fn wake(&self) {
        // It fails only where it was written to 2^64 times.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let dirs = self.dirs.get_mut().unwrap_or_else(PoisonError::into_inner);
        for id in dirs.keys() {
            overlap::leave(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_must_not_wait_does_not_wait_for_who_takes_back() {
        let dir = tempfile::tempdir().unwrap();
        let Ok(watcher) = Watcher::open(dir.path(), true) else {
            return eprintln!("skipped: this host has no fanotify for us");
        };
        {
            let _telling = watcher.telling();
            assert!(watcher.telling_promptly().is_ok());
        }
        let _all_told = watcher.telling.write().unwrap();
        assert_eq!(watcher.telling_promptly().err(), Some(Errno::AGAIN));
    }
}
