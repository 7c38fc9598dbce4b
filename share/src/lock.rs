//! Locks of the guest's programs that hold on the host too.
//!
//! Each holder of record locks on a file (a process of the guest) is an open file description of its own
//! here, as that is what such locks belong to (`F_OFD_SETLK`): they hold against other processes of the
//! host, other guests, and the guest's other processes alike. A lock of flock(2) is one of the
//! description that the guest has open anyway.
//!
//! Whoever has to wait does so on a thread of its own, so that no other request waits with it. It asks
//! again and again: a wait within the kernel could not be ended when the guest gives up.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::inode::{Inode, lock};
use crate::wire::FileLock;

/// How many of a guest's requests may wait for locks at a time.
const MAX_WAITING: usize = 64;
/// How many requests are remembered that were to be interrupted before they began to wait.
const MAX_EARLY: usize = 64;

/// The end of a lock that reaches as far as the file ever will.
const TO_THE_END: u64 = i64::MAX.cast_unsigned();

/// Who holds record locks: an inode, and a number of the guest's.
type Holder = (u64, u64);

/// The guest's record locks, and who waits for locks.
#[derive(Debug)]
pub(crate) struct Locks {
    holders: Mutex<HashMap<Holder, Arc<OwnedFd>>>,
    max: usize,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Requests that wait, by number; whether each was interrupted.
    requests: HashMap<u64, bool>,
    /// Interrupted before they waited, the oldest first.
    early: VecDeque<u64>,
}

impl Locks {
    /// Locks of at most `max` holders.
    pub fn new(max: usize) -> Self {
        Self {
            holders: Mutex::default(),
            max,
            waiting: Mutex::default(),
        }
    }

    /// The description that a holder's locks belong to; `open` makes one for who has none.
    ///
    /// # Errors
    /// `ENOLCK` where there are too many, and those of `open`.
    pub fn holder(
        &self,
        holder: Holder,
        open: impl FnOnce() -> Result<OwnedFd, Errno>,
    ) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(file) = lock(&self.holders).get(&holder) {
            return Ok(file.clone());
        }
        let file = Arc::new(open()?);
        let mut holders = lock(&self.holders);
        if holders.len() >= self.max {
            return Err(Errno::NOLCK);
        }
        Ok(holders.entry(holder).or_insert(file).clone())
    }

    /// The description of a holder, if it has any locks.
    pub fn known(&self, holder: Holder) -> Option<Arc<OwnedFd>> {
        lock(&self.holders).get(&holder).cloned()
    }

    /// A holder has closed the file, by which it loses its locks on it.
    pub fn closed(&self, holder: Holder) {
        let gone = lock(&self.holders).remove(&holder);
        drop(gone);
    }

    /// A handle on `inode` was closed: where that was the last, nobody has locks on it any more.
    pub fn released(&self, inode: &Inode) {
        let mut holders = lock(&self.holders);
        // Whoever takes a lock has a handle until it is among the holders.
        if inode.handles.load(Ordering::Relaxed) > 0 {
            return;
        }
        let gone: Vec<_> = holders.extract_if(|(id, _), _| *id == inode.id).collect();
        drop(holders);
        drop(gone);
    }

    /// The guest has let go of everything.
    pub fn clear(&self) {
        let gone = std::mem::take(&mut *lock(&self.holders));
        drop(gone);
        for interrupted in lock(&self.waiting).requests.values_mut() {
            *interrupted = true;
        }
    }

    /// Request `unique` begins to wait; to be ended with [`Locks::end_wait`].
    ///
    /// # Errors
    /// `EINTR` where it was interrupted already, `ENOLCK` where too many wait, `EINVAL` where it waits
    /// already.
    pub fn begin_wait(&self, unique: u64) -> Result<(), Errno> {
        let mut waiting = lock(&self.waiting);
        if let Some(at) = waiting.early.iter().position(|early| *early == unique) {
            waiting.early.remove(at);
            return Err(Errno::INTR);
        }
        if waiting.requests.len() >= MAX_WAITING {
            return Err(Errno::NOLCK);
        }
        match waiting.requests.entry(unique) {
            Entry::Occupied(_) => Err(Errno::INVAL),
            Entry::Vacant(place) => {
                place.insert(false);
                Ok(())
            }
        }
    }

    /// Whether request `unique` is to wait no longer.
    pub fn is_interrupted(&self, unique: u64) -> bool {
        lock(&self.waiting).requests.get(&unique) != Some(&false)
    }

    /// Request `unique` waits no more.
    pub fn end_wait(&self, unique: u64) {
        lock(&self.waiting).requests.remove(&unique);
    }

    /// The guest gives up on request `unique`.
    pub fn interrupt(&self, unique: u64) {
        let mut waiting = lock(&self.waiting);
        if let Some(interrupted) = waiting.requests.get_mut(&unique) {
            *interrupted = true;
            return;
        }
        if waiting.early.len() >= MAX_EARLY {
            waiting.early.pop_front();
        }
        waiting.early.push_back(unique);
    }
}

/// What the kernel has for a lock.
///
/// # Errors
/// `EINVAL` for what is none.
fn record(asked: &FileLock) -> Result<libc::flock, Errno> {
    let signed = |number: u64| i64::try_from(number).map_err(|_| Errno::INVAL);
    let kind = i32::try_from(asked.kind).map_err(|_| Errno::INVAL)?;
    if !matches!(kind, libc::F_RDLCK | libc::F_WRLCK | libc::F_UNLCK) {
        return Err(Errno::INVAL);
    }
    let length = match asked.end {
        // Zero stands for all that there is and will be.
        end if end >= TO_THE_END => 0,
        end => end
            .checked_sub(asked.start)
            .and_then(|length| length.checked_add(1))
            .ok_or(Errno::INVAL)?,
    };
    let narrow = |number: i32| i16::try_from(number).map_err(|_| Errno::INVAL);
    Ok(libc::flock {
        l_type: narrow(kind)?,
        l_whence: narrow(libc::SEEK_SET)?,
        l_start: signed(asked.start)?,
        l_len: signed(length)?,
        // Has to be, for locks of descriptions.
        l_pid: 0,
    })
}

fn control(file: &OwnedFd, command: i32, record: &mut libc::flock) -> Result<(), Errno> {
    // SAFETY: both commands take a `flock`, which outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(record)) } {
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
        _ => Ok(()),
    }
}

/// Takes or gives up a record lock, without waiting.
///
/// # Errors
/// `EAGAIN` where somebody else has it; those of fcntl(2).
pub(crate) fn set(file: &OwnedFd, asked: &FileLock) -> Result<(), Errno> {
    let mut record = record(asked)?;
    match control(file, libc::F_OFD_SETLK, &mut record) {
        Err(Errno::ACCESS) => Err(Errno::AGAIN),
        outcome => outcome,
    }
}

/// What is in the way of a record lock.
///
/// # Errors
/// Those of fcntl(2).
pub(crate) fn test(file: &OwnedFd, asked: &FileLock) -> Result<FileLock, Errno> {
    let mut record = record(asked)?;
    control(file, libc::F_OFD_GETLK, &mut record)?;
    let kind = u32::try_from(record.l_type).map_err(|_| Errno::IO)?;
    let start = record.l_start.cast_unsigned();
    Ok(FileLock {
        start,
        end: match record.l_len {
            0 => TO_THE_END,
            length => start
                .saturating_add(length.cast_unsigned())
                .saturating_sub(1),
        },
        kind,
        // A process of the host, or of another guest: none that this guest could name.
        pid: 0,
    })
}

/// Takes or gives up a lock of flock(2), without waiting.
///
/// # Errors
/// `EAGAIN` where somebody else has it; those of flock(2).
pub(crate) fn set_whole(file: BorrowedFd<'_>, kind: u32) -> Result<(), Errno> {
    let operation = match i32::try_from(kind) {
        Ok(libc::F_RDLCK) => FlockOperation::NonBlockingLockShared,
        Ok(libc::F_WRLCK) => FlockOperation::NonBlockingLockExclusive,
        Ok(libc::F_UNLCK) => FlockOperation::NonBlockingUnlock,
        _ => return Err(Errno::INVAL),
    };
    rustix::fs::flock(file, operation)
}
