//! A machine's name is claimed for as long as the machine runs.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::dirs;
use crate::lock::Lock;

/// Claims `name` among this user's machines; it is given back when the lock is dropped.
pub fn claim(name: &str) -> Result<Lock> {
    let dir = dirs::runtime()?.join("names");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    match Lock::attempt(&dir.join(name))? {
        Some(lock) => Ok(lock),
        None => bail!("a machine named {name} is running: stop it, or take another --name"),
    }
}
