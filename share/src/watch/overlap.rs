//! Directories and files that several shares of this process use.
//!
//! The kernel tells which process was the cause of an event, and no more where there are no privileges.
//! Where folders of one machine overlap, what one of them does for the guest is news to the other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::FileId;
use crate::host::{Key, Stat};
use crate::inode::lock;

/// How many shares watch a directory.
static WATCHED: Mutex<BTreeMap<FileId, usize>> = Mutex::new(BTreeMap::new());

/// Where shares change what they do not watch.
static UNSEEN: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Files that are shared by themselves, and may be changed that way.
static SINGLE: Mutex<Vec<Key>> = Mutex::new(Vec::new());

/// What a share is listed with, for as long as this exists.
#[derive(Debug)]
pub(crate) struct Listed<T: PartialEq + 'static> {
    list: &'static Mutex<Vec<T>>,
    entry: T,
}

impl<T: PartialEq + Clone> Listed<T> {
    fn on(list: &'static Mutex<Vec<T>>, entry: T) -> Self {
        lock(list).push(entry.clone());
        Self { list, entry }
    }
}

impl<T: PartialEq> Drop for Listed<T> {
    fn drop(&mut self) {
        let mut list = lock(self.list);
        if let Some(at) = list.iter().position(|entry| *entry == self.entry) {
            list.swap_remove(at);
        }
    }
}

/// A share that may change what it does not watch: while this exists, everything below its directory may be
/// its doing.
pub(crate) type Unseen = Listed<PathBuf>;

impl Unseen {
    /// That of a share of `root`, which is absolute and has no symbolic links in it.
    pub fn new(root: &Path) -> Self {
        Self::on(&UNSEEN, root.to_owned())
    }
}

/// A share of a single file, which it may change: while this exists, whatever happens to the file may be its doing.
pub(crate) type Single = Listed<Key>;

impl Single {
    /// That of a share of `file`.
    pub fn new(file: Key) -> Self {
        Self::on(&SINGLE, file)
    }
}

/// Whether what happens to a file may be the doing of a share of it alone; it is looked at only where there are such.
pub(super) fn is_changed_by_itself(file: impl FnOnce() -> Option<Stat>) -> bool {
    if lock(&SINGLE).is_empty() {
        return false;
    }
    // The file is looked at with no lock held.
    file().is_some_and(|stat| changers_of(stat.key) > 0)
}

/// How many shares may change a file that is shared by itself.
pub(super) fn changers_of(file: Key) -> usize {
    let single = lock(&SINGLE);
    single.iter().filter(|single| **single == file).count()
}

/// Whether an event at `path` may be the doing of a share that does not watch it.
pub(super) fn is_changed_unseen(path: impl FnOnce() -> Option<PathBuf>) -> bool {
    let unseen = lock(&UNSEEN);
    !unseen.is_empty()
        && path().is_some_and(|path| unseen.iter().any(|root| path.starts_with(root)))
}

/// One more share watches a directory.
pub(super) fn join(dir: &FileId) {
    *lock(&WATCHED).entry(dir.clone()).or_default() += 1;
}

/// One share less watches a directory.
pub(super) fn leave(dir: &FileId) {
    let mut watched = lock(&WATCHED);
    if let Some(count) = watched.get_mut(dir) {
        *count -= 1;
        if *count == 0 {
            watched.remove(dir);
        }
    }
}

/// Whether any share watches a directory.
pub(super) fn is_watched(dir: &FileId) -> bool {
    lock(&WATCHED).contains_key(dir)
}

/// Whether an event in a directory may be the doing of another share that watches it too.
pub(super) fn is_watched_by_several(dir: &FileId) -> bool {
    lock(&WATCHED).get(dir).is_some_and(|count| *count > 1)
}
