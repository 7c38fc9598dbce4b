//! Lock files that vanish with their holder.
//!
//! A lock is flock(2) on a file, so the kernel gives it back when its holder dies. Whoever gives it
//! back in an orderly way removes the file first; therefore who has locked a file makes sure that it
//! is still the one at the path.

use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// How long a lock may be looked at by others without a pause.
const LOOKED_AT: Duration = Duration::from_secs(10);

/// A lock that is held; given back, and its file removed, when this is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock at `path`, waiting while another process holds it.
    pub fn wait(path: &Path) -> Result<Self> {
        Self::take(path, How::Wait)?
            .with_context(|| format!("the lock {} cannot be taken", path.display()))
    }

    /// Takes the lock at `path`; None where another process holds it.
    pub fn attempt(path: &Path) -> Result<Option<Self>> {
        Self::take(path, How::Attempt)
    }

    fn take(path: &Path, how: How) -> Result<Option<Self>> {
        loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(path)
                .with_context(|| format!("cannot open the lock {}", path.display()))?;
            let locked = match how {
                How::Wait => lock(&file, FlockOperation::LockExclusive)
                    .map(|()| true)
                    .map_err(io::Error::from),
                How::Attempt => attempt(&file),
            };
            if !locked.with_context(|| format!("cannot lock {}", path.display()))? {
                return Ok(None);
            }
            if is_at(&file, path)? {
                return Ok(Some(Self {
                    _file: file,
                    path: path.to_owned(),
                }));
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // One that somebody removed is as good as removed.
        let _ = fs::remove_file(&self.path);
    }
}

#[derive(Debug, Clone, Copy)]
enum How {
    Wait,
    Attempt,
}

/// Whether another process holds the lock at `path`.
pub fn is_held(path: &Path) -> bool {
    match File::open(path) {
        Ok(file) => lock(&file, FlockOperation::NonBlockingLockShared).is_err(),
        Err(_) => false,
    }
}

/// Locks `file` for as long as it is open; false where another process has.
///
/// Those who only look whether it is locked share it for a moment, and are waited for.
pub fn attempt(file: &File) -> io::Result<bool> {
    let deadline = Instant::now() + LOOKED_AT;
    loop {
        match lock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {}
            locked => return Ok(locked.map(|()| true)?),
        }
        match lock(file, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) => return Ok(false),
            shared => shared?,
        }
        lock(file, FlockOperation::Unlock)?;
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // Of several who try this at once, each sleeps for another while.
        let pause = 1 + RandomState::new().hash_one(deadline) % 1000;
        thread::sleep(Duration::from_micros(pause));
    }
}

fn lock(file: &File, how: FlockOperation) -> rustix::io::Result<()> {
    rustix::io::retry_on_intr(|| flock(file, how))
}

fn is_at(file: &File, path: &Path) -> Result<bool> {
    let here = file.metadata()?;
    match fs::metadata(path) {
        Ok(there) => Ok((here.dev(), here.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => {
            Err(error).with_context(|| format!("cannot look at the lock {}", path.display()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_lock_excludes_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = Lock::attempt(&path).unwrap().unwrap();
        assert!(is_held(&path));
        assert!(Lock::attempt(&path).unwrap().is_none());
        drop(held);
        assert!(!path.exists());
        assert!(!is_held(&path));
    }

    #[test]
    fn many_holders_one_after_the_other_never_meet() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let inside = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _held = Lock::wait(&path).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
    }
}
