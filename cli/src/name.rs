//! A machine's name is claimed for as long as the machine runs.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use crate::dirs;

/// A claimed name; given back when dropped, and by the kernel when the process dies.
#[derive(Debug)]
pub struct Claim {
    _lock: File,
}

/// Claims `name` among this user's machines.
pub fn claim(name: &str) -> Result<Claim> {
    let dir = dirs::runtime()?.join("names");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let path = dir.join(name);
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot claim the name at {}", path.display()))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("a machine named {name} is running: stop it, or take another --name");
    }
    Ok(Claim { _lock: lock })
}
