//! Small files that are read whole and replaced whole, whoever dies meanwhile.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The longest file: 2 MiB of arguments and environment, each byte of which may take several characters.
const MAX: u64 = 16 << 20;

/// Whether what is written has to survive the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// It does.
    Disk,
    /// It is of no use after the host.
    Memory,
}

/// Replaces the file `name` of `dir` by `content` as JSON: all of it or, where this fails, nothing.
pub fn write(dir: &Path, name: &str, content: &impl Serialize, how: Durability) -> Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let path = dir.join(name);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let partial = dir.join(format!(".{name}.{}.{count}", std::process::id()));
    let mut text = serde_json::to_vec_pretty(content)?;
    text.push(b'\n');
    let written = write_new(&partial, &text, how).and_then(|()| fs::rename(&partial, &path));
    if written.is_err() {
        // There is nothing to remove where it could not be made.
        let _ = fs::remove_file(&partial);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn write_new(path: &Path, text: &[u8], how: Durability) -> io::Result<()> {
    let mut options = OpenOptions::new();
    // One of the same name is from a process that was killed, and whose number is in use again.
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)?;
    file.write_all(text)?;
    match how {
        Durability::Disk => file.sync_all(),
        Durability::Memory => Ok(()),
    }
}

/// Reads the JSON file at `path`, which has to be of format `version`; None where there is no file.
///
/// Whatever else is there (a directory, a pipe, something endless, somebody else's) is an error.
pub fn read<T: DeserializeOwned>(path: &Path, version: u32) -> Result<Option<T>> {
    let text = match read_bounded(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let found = serde_json::from_slice::<Versioned>(&text)
        .with_context(|| format!("{} is damaged", path.display()))?
        .version;
    if found != version {
        bail!(
            "{} is of format {found}, and this mvm knows format {version}: use the mvm that wrote it",
            path.display()
        );
    }
    serde_json::from_slice(&text)
        .map(Some)
        .with_context(|| format!("{} is damaged", path.display()))
}

/// What every version of every file has.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    // A pipe in the file's place would be waited for.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut text = Vec::new();
    file.take(MAX + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX {
        return Err(io::Error::other("it is too long"));
    }
    Ok(text)
}

/// Removes the file at `path`, if there is one.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
