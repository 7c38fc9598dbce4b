//! The inodes that the guest knows, by number.
//!
//! An inode is known from the moment a reply names it until the guest has forgotten it as often as
//! it was named. It is reached through a descriptor that only holds on to it (`O_PATH`). There are
//! fewer descriptors than a guest may know inodes, so one that was not used lately is closed, and
//! the inode is found again by its name in its parent when it is needed: one step of a path from
//! the parent's descriptor, and then it has to be the same file still, by filesystem, inode number
//! and time of birth. What has no name to find it by, and what is open, keeps its descriptor.

mod held;

use std::collections::{HashMap, VecDeque};
use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use rustix::fs::FileType;
use rustix::io::Errno;

use crate::host::{Key, Stat, Time};
use crate::owner::Override;
use crate::view::Scope;
use crate::watch::Watch;
use crate::wire::ROOT_ID;
pub(crate) use held::Held;

/// Where an inode is found: a name in a directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub parent: u64,
    pub name: Arc<CStr>,
}

impl Place {
    /// `name` in `parent`.
    pub fn new(parent: u64, name: &CStr) -> Self {
        Self {
            parent,
            name: name.into(),
        }
    }
}

/// A file that the guest knows.
#[derive(Debug)]
pub(crate) struct Inode {
    pub id: u64,
    pub key: Key,
    pub birth: Option<Time>,
    pub kind: FileType,
    /// How often replies named it. Changed under the table's lock only.
    lookups: AtomicU64,
    place: Mutex<Option<Place>>,
    held: Mutex<Option<Arc<Held>>>,
    /// Whether the descriptor was used since it was last looked at.
    used: AtomicBool,
    /// Whether it was made just now, and nobody was told.
    pub is_new: AtomicBool,
    /// How many of a directory's names were looked up and found.
    pub found: AtomicU32,
    /// How many handles are open on it.
    pub handles: AtomicU32,
    /// Whether the guest sees it setuid or setgid, or may: to be taken away when it is written.
    pub privileged: AtomicBool,
    /// What it is to the guest, where the host cannot remember it.
    pub remembered: Mutex<Option<Override>>,
    /// What the host remembers of it, from when that was looked up until it may be something else. Locked while it is looked
    /// up or changed.
    pub recalled: Mutex<Option<Override>>,
    /// Of a directory, and of a file that is shared by itself: whether it is watched.
    pub watch: Mutex<Watch>,
    /// Where in the view it was found; that of the root, which shows least, where there is none.
    scope: AtomicU32,
}

impl Inode {
    /// Whether it is watched itself, as directories are, and a file that is shared by itself.
    pub fn is_watched(&self) -> bool {
        matches!(*lock(&self.watch), Watch::As(_))
    }

    /// The descriptor, if there is one at the moment.
    pub fn held(&self) -> Option<Arc<Held>> {
        lock(&self.held).clone()
    }

    /// Where it was found last; nothing for the root and for what has lost its name.
    pub fn place(&self) -> Option<Place> {
        lock(&self.place).clone()
    }

    /// Where in the view it was found.
    pub fn scope(&self) -> Scope {
        Scope::from_number(self.scope.load(Ordering::Relaxed))
    }

    /// It was found elsewhere in the view, too.
    pub fn set_scope(&self, scope: Scope) {
        self.scope.store(scope.number(), Ordering::Relaxed);
    }

    fn evictable(&self) -> bool {
        self.id != ROOT_ID
            && self.birth.is_some()
            && self.handles.load(Ordering::Relaxed) == 0
            && lock(&self.place).is_some()
    }

    fn is(&self, stat: &Stat) -> bool {
        self.key == stat.key && self.birth == stat.birth && self.kind == stat.kind()
    }
}

#[derive(Debug, Default)]
struct Table {
    by_id: HashMap<u64, Arc<Inode>>,
    by_key: HashMap<Key, u64>,
    /// Those that were found at a place, by that.
    by_place: HashMap<Place, u64>,
}

impl Table {
    /// The inode is found at `place` now, and nowhere else; what was found there before has no name.
    fn put(&mut self, inode: &Inode, place: Option<Place>) {
        if inode.id == ROOT_ID || *lock(&inode.place) == place {
            return;
        }
        self.unplace(inode);
        if let Some(place) = place {
            let before = self.by_place.insert(place.clone(), inode.id);
            if let Some(before) = before.and_then(|id| self.by_id.get(&id)) {
                *lock(&before.place) = None;
            }
            *lock(&inode.place) = Some(place);
        }
    }

    fn unplace(&mut self, inode: &Inode) {
        if let Some(place) = lock(&inode.place).take()
            && self.by_place.get(&place) == Some(&inode.id)
        {
            self.by_place.remove(&place);
        }
    }

    /// Takes an inode out.
    fn remove(&mut self, id: u64) -> Option<Arc<Inode>> {
        let inode = self.by_id.remove(&id)?;
        if self.by_key.get(&inode.key) == Some(&id) {
            self.by_key.remove(&inode.key);
        }
        let place = inode.place();
        if place.as_ref().and_then(|place| self.by_place.get(place)) == Some(&id) {
            // The inode itself still says where it was.
            place.as_ref().map(|place| self.by_place.remove(place));
        }
        Some(inode)
    }
}

/// All inodes that the guest knows.
#[derive(Debug)]
pub(crate) struct Inodes {
    table: RwLock<Table>,
    next: AtomicU64,
    max_inodes: usize,
    max_held: usize,
    /// How many descriptors there are.
    held: Arc<AtomicUsize>,
    /// Whose they are, the ones to look at first in front. Some may be gone.
    queue: Mutex<VecDeque<Weak<Inode>>>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the locks here guard is whole between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inodes {
    /// A table with the root in it, of at most `max_inodes` inodes and `max_held` descriptors.
    pub fn new(root: OwnedFd, stat: &Stat, max_inodes: usize, max_held: usize) -> Self {
        let inodes = Self {
            table: RwLock::default(),
            next: AtomicU64::new(ROOT_ID + 1),
            max_inodes,
            max_held,
            held: Arc::default(),
            queue: Mutex::default(),
        };
        let root_inode = Arc::new(Self::make(ROOT_ID, stat, Scope::ROOT));
        inodes.held.fetch_add(1, Ordering::Relaxed);
        *lock(&root_inode.held) = Some(Arc::new(Held {
            fd: root,
            count: inodes.held.clone(),
        }));
        let mut table = inodes.write();
        table.by_key.insert(stat.key, ROOT_ID);
        table.by_id.insert(ROOT_ID, root_inode);
        drop(table);
        inodes
    }

    fn make(id: u64, stat: &Stat, scope: Scope) -> Inode {
        Inode {
            id,
            key: stat.key,
            birth: stat.birth,
            kind: stat.kind(),
            lookups: AtomicU64::new(1),
            place: Mutex::new(None),
            held: Mutex::new(None),
            used: AtomicBool::new(true),
            is_new: AtomicBool::new(false),
            found: AtomicU32::new(0),
            handles: AtomicU32::new(0),
            privileged: AtomicBool::new(false),
            remembered: Mutex::new(None),
            recalled: Mutex::new(None),
            watch: Mutex::default(),
            scope: AtomicU32::new(scope.number()),
        }
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The inode with this number.
    ///
    /// # Errors
    /// `ESTALE` where the guest was never told of it, or has forgotten it.
    pub fn get(&self, id: u64) -> Result<Arc<Inode>, Errno> {
        self.read().by_id.get(&id).cloned().ok_or(Errno::STALE)
    }

    /// The inode of a file, if the guest knows it.
    pub fn find(&self, stat: &Stat) -> Option<Arc<Inode>> {
        let table = self.read();
        let inode = table.by_id.get(table.by_key.get(&stat.key)?)?;
        inode.is(stat).then(|| inode.clone())
    }

    /// The inode of what was found as `name` in `parent`, which the guest now knows once more; `scope` is
    /// where that is in the view, if it was not known.
    ///
    /// # Errors
    /// `ENFILE` where the guest knows more inodes than it may.
    pub fn enter(
        &self,
        parent: u64,
        name: &CStr,
        stat: &Stat,
        scope: Scope,
    ) -> Result<Arc<Inode>, Errno> {
        let place = Place::new(parent, name);
        let mut table = self.write();
        let known = table.by_key.get(&stat.key).copied();
        if let Some(inode) = known.and_then(|id| table.by_id.get(&id)).cloned()
            && inode.is(stat)
        {
            inode.lookups.fetch_add(1, Ordering::Relaxed);
            table.put(&inode, Some(place));
            return Ok(inode);
        }
        self.add(&mut table, stat, Some(place), scope)
    }

    /// The inode of a new file without a name.
    ///
    /// # Errors
    /// `ENFILE` where the guest knows more inodes than it may.
    pub fn enter_nameless(&self, stat: &Stat) -> Result<Arc<Inode>, Errno> {
        self.add(&mut self.write(), stat, None, Scope::ROOT)
    }

    /// An inode has got one more name, by which the guest knows it once more.
    ///
    /// # Errors
    /// `ESTALE` where the guest has forgotten it meanwhile.
    pub fn enter_known(&self, inode: &Inode, parent: u64, name: &CStr) -> Result<(), Errno> {
        let mut table = self.write();
        let known = table.by_id.get(&inode.id).ok_or(Errno::STALE)?;
        known.lookups.fetch_add(1, Ordering::Relaxed);
        table.put(inode, Some(Place::new(parent, name)));
        table.by_key.insert(inode.key, inode.id);
        Ok(())
    }

    fn add(
        &self,
        table: &mut Table,
        stat: &Stat,
        place: Option<Place>,
        scope: Scope,
    ) -> Result<Arc<Inode>, Errno> {
        if table.by_id.len() >= self.max_inodes {
            return Err(Errno::NFILE);
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let inode = Arc::new(Self::make(id, stat, scope));
        table.by_key.insert(stat.key, id);
        table.by_id.insert(id, inode.clone());
        table.put(&inode, place);
        Ok(inode)
    }

    /// The guest forgets `count` of the times it was told of an inode; returns it where it knows it no
    /// more.
    pub fn forget(&self, id: u64, count: u64) -> Option<Arc<Inode>> {
        if id == ROOT_ID {
            return None;
        }
        let mut table = self.write();
        let inode = table.by_id.get(&id)?;
        let left = inode.lookups.load(Ordering::Relaxed).saturating_sub(count);
        inode.lookups.store(left, Ordering::Relaxed);
        if left > 0 {
            return None;
        }
        // Its descriptor is closed by the caller, which may take its time, with no lock held.
        table.remove(id)
    }

    /// Forgets all but the root, and returns what was forgotten.
    pub fn clear(&self) -> Vec<Arc<Inode>> {
        let mut table = self.write();
        let gone = table.by_id.extract_if(|id, _| *id != ROOT_ID);
        let gone = gone.map(|(_, inode)| inode).collect();
        table.by_key.retain(|_, id| *id == ROOT_ID);
        table.by_place.clear();
        gone
    }

    /// All that the guest knows.
    pub fn all(&self) -> Vec<Arc<Inode>> {
        self.read().by_id.values().cloned().collect()
    }

    /// How many inodes the guest knows.
    pub fn len(&self) -> usize {
        self.read().by_id.len()
    }

    /// How many descriptors hold on to inodes.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// The inode is found at `place` now, or by no name.
    pub fn set_place(&self, inode: &Inode, place: Option<Place>) {
        self.write().put(inode, place);
    }

    /// The inode that was found at a place last.
    pub fn at(&self, place: &Place) -> Option<Arc<Inode>> {
        let table = self.read();
        table.by_id.get(table.by_place.get(place)?).cloned()
    }

    /// The inode has lost its last name: a later file with its number is another.
    pub fn unname(&self, inode: &Inode) {
        let mut table = self.write();
        table.put(inode, None);
        if table.by_key.get(&inode.key) == Some(&inode.id) {
            table.by_key.remove(&inode.key);
        }
    }

    /// An inode for a name that the host has not any more, which the guest is made to believe in.
    ///
    /// # Errors
    /// `ENFILE` where the guest knows more inodes than it may.
    pub fn enter_ghost(&self, stat: &Stat) -> Result<Arc<Inode>, Errno> {
        self.add(&mut self.write(), stat, None, Scope::ROOT)
    }

    /// A number that no inode has, nor will have.
    pub fn spare_number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// The guest is told of an inode once more, if it still knows it.
    pub fn tell_again(&self, inode: &Inode) -> Result<(), Errno> {
        let table = self.write();
        let known = table.by_id.get(&inode.id).ok_or(Errno::STALE)?;
        known.lookups.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
