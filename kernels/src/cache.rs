//! The kernels of one user: directories that are complete or not there at all.
//!
//! A kernel is put together in a staging directory beside its final place and renamed when all
//! of it is on the disk. Whoever stages holds a lock on the staging directory, so that what a
//! killed process left behind is recognised and removed by the next one.
//!
//! Lock order: the lock of a task ([`Cache::exclusive`]), then the lock of the cache, which is
//! held only for moments.

mod stage;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::version;

pub use stage::{Description, Stage};

const STAGE_PREFIX: &str = ".stage-";

/// When the staging directory of another boot is nobody's any more.
const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 3600);
const METADATA: &str = "kernel.json";
/// The uncompressed ELF kernel in a kernel's directory.
pub const VMLINUX: &str = "vmlinux";
/// The build configuration in a kernel's directory.
pub const CONFIG: &str = "config";
/// The module tree in a kernel's directory: what is in `/lib/modules/VERSION` elsewhere.
pub const MODULES: &str = "modules";
const MAX_METADATA: u64 = 64 << 10;

/// What went wrong with the kernel cache.
#[derive(Debug, Error)]
pub enum CacheError {
    /// There is no place for a cache.
    #[error("no place for the kernel cache: neither XDG_CACHE_HOME nor HOME is an absolute path")]
    NoPlace,
    /// A file of the cache could not be used.
    #[error("{action} {path} failed")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A kernel's directory has no readable description.
    #[error("{path} is damaged; remove the kernel with `mvm kernel rm` and fetch it again")]
    Metadata {
        /// The description.
        path: PathBuf,
        /// What is wrong in it.
        source: serde_json::Error,
    },
    /// No kernel of that name.
    #[error("there is no kernel {0:?} in the cache; `mvm kernel ls` shows those that are")]
    NotFound(String),
    /// More than one kernel of that name.
    #[error("{name:?} could be any of {candidates}; write more of the name")]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// The kernels that begin so.
        candidates: String,
    },
}

impl CacheError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// How a kernel came into the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// From a distribution's package.
    Fetched,
    /// Compiled here.
    Built,
    /// From a file of the user's.
    Added,
}

/// What is known of a kernel beside its files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// The release that `uname -r` prints.
    pub version: String,
    /// SHA-256 of `vmlinux`, in hexadecimal.
    pub sha256: String,
    /// How it came here.
    pub source: Source,
    /// The package that it was taken or built from, where there was one.
    pub package: Option<String>,
    /// That package's version.
    pub package_version: Option<String>,
    /// When it was put into the cache: seconds since 1970-01-01 UTC.
    pub created: u64,
}

/// A kernel in the cache. Its files are never changed.
#[derive(Debug, Clone)]
pub struct CachedKernel {
    /// Its name: the version and the first digits of the digest.
    pub id: String,
    /// Its directory.
    pub dir: PathBuf,
    /// What is known of it.
    pub metadata: Metadata,
}

impl CachedKernel {
    /// The uncompressed ELF kernel.
    pub fn vmlinux(&self) -> PathBuf {
        self.dir.join(VMLINUX)
    }

    /// The configuration it was built with, where it is known.
    pub fn config(&self) -> Option<PathBuf> {
        Some(self.dir.join(CONFIG)).filter(|path| path.is_file())
    }

    /// The directory of its module tree, where it has one.
    pub fn modules(&self) -> Option<PathBuf> {
        Some(self.dir.join(MODULES)).filter(|path| path.is_dir())
    }

    /// Bytes of all its files.
    ///
    /// # Errors
    /// When a directory of it cannot be read.
    pub fn size(&self) -> Result<u64, CacheError> {
        let mut total = 0u64;
        walk(&self.dir, &mut |_, metadata| {
            total = total.saturating_add(metadata.len());
            Ok(())
        })?;
        Ok(total)
    }
}

/// The kernels of one user. Several processes may use one cache.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The cache of this user: `$XDG_CACHE_HOME/mvm/kernels`, by default below `~/.cache`.
    ///
    /// # Errors
    /// When there is no place for it or it cannot be made.
    pub fn open() -> Result<Self, CacheError> {
        let absolute = |name: &str| {
            let path = PathBuf::from(std::env::var_os(name)?);
            path.is_absolute().then_some(path)
        };
        let base = absolute("XDG_CACHE_HOME")
            .or_else(|| Some(absolute("HOME")?.join(".cache")))
            .ok_or(CacheError::NoPlace)?;
        Self::at(&base.join("mvm/kernels"))
    }

    /// The cache in the directory `root`, which is made where it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn at(root: &Path) -> Result<Self, CacheError> {
        make_dir(root)?;
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Where the cache is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A directory of the cache that is for something else than kernels, made where it is
    /// missing. Its name must not look like a kernel's.
    pub(crate) fn side_dir(&self, name: &str) -> Result<PathBuf, CacheError> {
        let dir = self.root.join(name);
        make_dir(&dir)?;
        Ok(dir)
    }

    /// All complete kernels, the newest version first.
    ///
    /// # Errors
    /// When the cache cannot be read. A damaged kernel is left out with a warning.
    pub fn kernels(&self) -> Result<Vec<CachedKernel>, CacheError> {
        let mut kernels = Vec::new();
        let entries = fs::read_dir(&self.root).map_err(CacheError::io("reading", &self.root))?;
        for entry in entries {
            let entry = entry.map_err(CacheError::io("reading", &self.root))?;
            let Some(id) = entry.file_name().to_str().map(str::to_owned) else {
                continue;
            };
            let dir = entry.path();
            if !id.starts_with(|c: char| c.is_ascii_digit()) {
                continue;
            }
            match read_metadata(&dir) {
                Ok(metadata) => kernels.push(CachedKernel { id, dir, metadata }),
                Err(error) => tracing::warn!("kernel {id} is left out: {error}"),
            }
        }
        kernels.sort_by(|a, b| {
            version::compare(&b.metadata.version, &a.metadata.version)
                .then(b.metadata.created.cmp(&a.metadata.created))
                .then_with(|| a.id.cmp(&b.id))
        });
        Ok(kernels)
    }

    /// The kernel whose name is, or begins with, `name`.
    ///
    /// # Errors
    /// When there is none or more than one.
    pub fn find(&self, name: &str) -> Result<CachedKernel, CacheError> {
        let mut found = self.kernels()?;
        if let Some(exact) = found.iter().position(|kernel| kernel.id == name) {
            return Ok(found.swap_remove(exact));
        }
        found.retain(|kernel| !name.is_empty() && kernel.id.starts_with(name));
        match found.len() {
            1 => Ok(found.swap_remove(0)),
            0 => Err(CacheError::NotFound(name.to_owned())),
            _ => Err(CacheError::Ambiguous {
                name: name.to_owned(),
                candidates: found
                    .iter()
                    .map(|kernel| kernel.id.as_str())
                    .collect::<Vec<_>>()
                    .join(", "),
            }),
        }
    }

    /// Removes the kernel whose name is, or begins with, `name`, and returns its full name.
    ///
    /// A machine that runs from it keeps what it has mapped.
    ///
    /// # Errors
    /// When there is no such kernel, or its files cannot be removed.
    pub fn remove(&self, name: &str) -> Result<String, CacheError> {
        // A directory whose description is damaged can be removed by its full name.
        let whole = self.root.join(name);
        let is_damaged = name.starts_with(|c: char| c.is_ascii_digit())
            && Path::new(name).file_name() == Some(OsStr::new(name))
            && whole.is_dir();
        let (id, dir) = match self.find(name) {
            Ok(kernel) => (kernel.id, kernel.dir),
            Err(CacheError::NotFound(_)) if is_damaged => (name.to_owned(), whole),
            Err(error) => return Err(error),
        };
        let stage = self.stage()?;
        let target = stage.path().join("removed");
        fs::rename(&dir, target).map_err(CacheError::io("removing", &dir))?;
        Ok(id)
    }

    /// Waits until no other process does the task of this name, and keeps others from it until
    /// the guard is dropped.
    ///
    /// # Errors
    /// When the lock file cannot be made.
    pub fn exclusive(&self, task: &str) -> Result<TaskLock, CacheError> {
        let path = self.root.join(format!(".lock-{task}"));
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(CacheError::io("opening", &path))?;
        lock(&file).map_err(CacheError::io("locking", &path))?;
        Ok(TaskLock { _file: file })
    }

    /// Begins a new kernel, in a directory that vanishes unless [`Stage::publish`] is called.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn stage(&self) -> Result<Stage, CacheError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let _guard = self.exclusive("cache")?;
        self.remove_abandoned();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{STAGE_PREFIX}{}-{}-{count}", boot(), std::process::id());
        let dir = self.root.join(name);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .map_err(CacheError::io("making", &dir))?;
        let handle = File::open(&dir).map_err(CacheError::io("opening", &dir))?;
        lock(&handle).map_err(CacheError::io("locking", &dir))?;
        Ok(Stage::new(self.clone(), dir, handle))
    }

    /// Removes staging directories that nobody holds the lock of. The cache's lock is held.
    ///
    /// Locks are those of one kernel: where the cache is shared with another one that runs, as with an
    /// emulated Linux, its locks are not seen here. What another boot made is left alone for a day.
    fn remove_abandoned(&self) {
        let own = format!("{STAGE_PREFIX}{}-", boot());
        let Ok(entries) = fs::read_dir(&self.root) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if !name.as_encoded_bytes().starts_with(STAGE_PREFIX.as_bytes()) {
                continue;
            }
            if !name.as_encoded_bytes().starts_with(own.as_bytes()) && !is_old(&entry) {
                continue;
            }
            let Ok(handle) = File::open(entry.path()) else {
                continue;
            };
            if flock(&handle, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            if let Err(error) = fs::remove_dir_all(entry.path()) {
                tracing::warn!("{} is left behind: {error}", entry.path().display());
            }
        }
    }
}

/// What tells this boot of this kernel from all others.
fn boot() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.chars().take_while(char::is_ascii_hexdigit).collect()
}

/// Whether nothing was put into a directory for so long that nobody can be at work in it.
fn is_old(entry: &fs::DirEntry) -> bool {
    let modified = entry.metadata().and_then(|metadata| metadata.modified());
    modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > ABANDONED_AFTER))
}

/// Keeps other processes from a task; see [`Cache::exclusive`].
#[derive(Debug)]
pub struct TaskLock {
    _file: File,
}

/// SHA-256 of a file, in hexadecimal.
pub(crate) fn digest(path: &Path) -> Result<String, CacheError> {
    let mut file = File::open(path).map_err(CacheError::io("opening", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        let n = file
            .read(&mut buffer)
            .map_err(CacheError::io("reading", path))?;
        if n == 0 {
            break;
        }
        hash.update(buffer.get(..n).unwrap_or_default());
    }
    Ok(hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

fn read_metadata(dir: &Path) -> Result<Metadata, CacheError> {
    let path = dir.join(METADATA);
    let mut text = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_METADATA).read_to_end(&mut text))
        .map_err(CacheError::io("reading", &path))?;
    serde_json::from_slice(&text).map_err(|source| CacheError::Metadata { path, source })
}

fn make_dir(path: &Path) -> Result<(), CacheError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(CacheError::io("making", path))
}

/// Waits for an exclusive lock.
fn lock(file: &File) -> io::Result<()> {
    loop {
        match flock(file, FlockOperation::LockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Visits every file below `dir`; symbolic links are neither visited nor followed.
fn walk(
    dir: &Path,
    visit: &mut dyn FnMut(&Path, &fs::Metadata) -> Result<(), CacheError>,
) -> Result<(), CacheError> {
    // Sorted, so that what goes wrong goes wrong the same way each time.
    let mut entries = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(CacheError::io("reading", dir))? {
        let entry = entry.map_err(CacheError::io("reading", dir))?;
        entries.insert(entry.file_name(), entry);
    }
    for entry in entries.values() {
        let path = entry.path();
        let metadata = entry
            .metadata()
            .map_err(CacheError::io("looking at", &path))?;
        if metadata.is_dir() {
            walk(&path, visit)?;
        } else if metadata.is_file() {
            visit(&path, &metadata)?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
