//! The files by which mvm processes find one outer Linux: its socket, its locks, what is known of it.

use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::dirs;
use crate::lock::{self, Lock};

/// What the supervisor tells of its outer Linux.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Description {
    /// The supervisor's process id.
    pub pid: u32,
    /// `uname -r` of the outer Linux.
    pub kernel: String,
    /// Bytes of memory.
    pub memory: u64,
    /// Virtual CPUs.
    pub cpus: usize,
    /// When it was ready: seconds since 1970-01-01 UTC.
    pub since: u64,
}

/// The names of one outer Linux's files.
#[derive(Debug, Clone)]
pub struct Files {
    base: PathBuf,
}

impl Files {
    /// Those of this user, this build of mvm and this view of the filesystem.
    ///
    /// Another build has another agent; another mount namespace or root has other files at the same paths.
    pub fn of_this_program() -> Result<Self> {
        let program = env::current_exe().context("mvm cannot find its own file")?;
        let file = fs::metadata(&program)
            .with_context(|| format!("cannot look at {}", program.display()))?;
        let root = fs::metadata("/").context("cannot look at /")?;
        let mut key = DefaultHasher::new();
        (
            file.dev(),
            file.ino(),
            file.size(),
            file.mtime(),
            file.mtime_nsec(),
        )
            .hash(&mut key);
        (root.dev(), root.ino()).hash(&mut key);
        fs::read_link("/proc/self/ns/mnt")
            .context("cannot read /proc/self/ns/mnt; mvm needs /proc")?
            .hash(&mut key);
        let name = format!("accel-{:016x}", key.finish());
        Ok(Self {
            base: dirs::runtime()?.join(name),
        })
    }

    /// The Unix socket at which the agent's ports are offered.
    pub fn socket(&self) -> PathBuf {
        self.base.with_extension("sock")
    }

    /// The Unix socket at which streams are handed over, to be joined to the guest's ports.
    pub fn join(&self) -> PathBuf {
        self.base.with_extension("join")
    }

    /// The Unix socket between QEMU and the vsock device.
    pub fn vhost(&self) -> PathBuf {
        self.base.with_extension("vhost")
    }

    /// What the supervisor says went wrong, and QEMU's console.
    pub fn log(&self) -> PathBuf {
        self.base.with_extension(LOG)
    }

    /// The supervisor's lock, which it holds as long as it lives; waits while one that is on its way out does.
    pub fn lock_supervisor(&self) -> Result<Lock> {
        Lock::wait(&self.base.with_extension(LOCK))
    }

    /// Whether a supervisor lives.
    pub fn is_supervised(&self) -> bool {
        lock::is_held(&self.base.with_extension(LOCK))
    }

    /// Waits until no other process is starting an outer Linux.
    pub fn lock_start(&self) -> Result<Lock> {
        Lock::wait(&self.base.with_extension("start"))
    }

    /// Tells what runs.
    pub fn describe(&self, description: &Description) -> Result<()> {
        let path = self.base.with_extension("json");
        let partial = self.base.with_extension("json.new");
        fs::write(&partial, serde_json::to_vec_pretty(description)?)
            .and_then(|()| fs::rename(&partial, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// What runs, where something does.
    pub fn description(&self) -> Result<Option<Description>> {
        if !self.is_supervised() {
            return Ok(None);
        }
        match fs::read(self.base.with_extension("json")) {
            Ok(text) => Ok(serde_json::from_slice(&text).ok()),
            Err(_) => Ok(None),
        }
    }

    /// Removes all but the log, which may have to be read, and the locks.
    pub fn clean(&self) {
        for extension in ["sock", "join", "vhost", "json", "json.new"] {
            remove(&self.base.with_extension(extension));
        }
    }

    /// Removes the log too, when all went well.
    pub fn clean_log(&self) {
        remove(&self.log());
    }

    /// Removes what supervisors that were killed, of whatever build, have left behind.
    pub fn clean_abandoned(&self) -> Result<()> {
        let dir = self
            .base
            .parent()
            .context("the runtime directory has gone")?;
        for entry in fs::read_dir(dir)?.flatten() {
            let path = entry.path();
            let is_mark = path
                .extension()
                .is_some_and(|extension| extension == LOCK || extension == LOG);
            if !is_mark || path.with_extension("") == self.base {
                continue;
            }
            if let Some(_lock) = Lock::attempt(&path.with_extension(LOCK))? {
                let abandoned = Self {
                    base: path.with_extension(""),
                };
                abandoned.clean();
                abandoned.clean_log();
            }
        }
        Ok(())
    }
}

/// The extensions of a supervisor's lock and log: one of them outlives it when it is killed.
const LOCK: &str = "lock";
const LOG: &str = "log";

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!("{} is left behind: {error}", path.display());
        }
        _ => {}
    }
}
