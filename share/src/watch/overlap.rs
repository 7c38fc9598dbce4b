//! Directories that several shares of this process watch.
//!
//! The kernel tells which process was the cause of an event, and no more where there are no privileges.
//! Where folders of one machine overlap, what one of them does for the guest is news to the other.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::FileId;
use crate::inode::lock;

/// How many shares watch a directory.
static WATCHED: Mutex<BTreeMap<FileId, usize>> = Mutex::new(BTreeMap::new());

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

/// Whether an event in a directory may be another share's doing.
pub(super) fn is_watched_by_several(dir: &FileId) -> bool {
    lock(&WATCHED).get(dir).is_some_and(|count| *count > 1)
}
