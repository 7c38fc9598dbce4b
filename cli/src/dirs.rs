//! Where mvm keeps what it keeps: the XDG directories, and a private one for sockets and locks.

use std::env;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::accel;

/// The directory for sockets and locks: `$XDG_RUNTIME_DIR/mvm`, else `/tmp/mvm-UID`.
///
/// It is made with mode 0700. One that belongs to somebody else or lets others in is refused: another
/// user of the host could have put it there.
pub fn runtime() -> Result<PathBuf> {
    let uid = rustix::process::getuid().as_raw();
    if let Some(dir) = own_to_outer(uid)? {
        return Ok(dir);
    }
    let dir = match env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(dir) if dir.is_absolute() && dir.is_dir() => dir.join("mvm"),
        _ => PathBuf::from(format!("/tmp/mvm-{uid}")),
    };
    private_dir(&dir, uid, "XDG_RUNTIME_DIR")?;
    Ok(dir)
}

/// The directory for what outlives a machine's process: `$XDG_STATE_HOME/mvm`, else `~/.local/state/mvm`.
///
/// It is made with mode 0700, and refused as [`runtime`] is.
pub fn state() -> Result<PathBuf> {
    let uid = rustix::process::getuid().as_raw();
    if let Some(dir) = own_to_outer(uid)? {
        let dir = dir.join("state");
        private_dir(&dir, uid, "another directory")?;
        return Ok(dir);
    }
    let base = match env::var_os("XDG_STATE_HOME").map(PathBuf::from) {
        Some(dir) if dir.is_absolute() => dir,
        _ => match env::var_os("HOME").map(PathBuf::from) {
            Some(home) if home.is_absolute() => home.join(".local/state"),
            _ => {
                bail!(
                    "neither XDG_STATE_HOME nor HOME says where to keep machines: set one of them"
                )
            }
        },
    };
    fs::create_dir_all(&base).with_context(|| format!("cannot make {}", base.display()))?;
    let dir = base.join("mvm");
    private_dir(&dir, uid, "XDG_STATE_HOME")?;
    Ok(dir)
}

/// In the outer Linux, a directory of its own: neither sockets nor locks are shared with the host's.
fn own_to_outer(uid: u32) -> Result<Option<PathBuf>> {
    if !accel::is_outer() {
        return Ok(None);
    }
    let dir = PathBuf::from(format!("/dev/mvm-{uid}"));
    private_dir(&dir, uid, "another directory")?;
    Ok(Some(dir))
}

/// Makes `dir` with mode 0700 where it is missing. `variable` can be set to have another one.
fn private_dir(dir: &Path, uid: u32, variable: &str) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(error).with_context(|| format!("cannot make {}", dir.display()));
        }
    }
    let found =
        fs::symlink_metadata(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    if !found.is_dir() || found.uid() != uid || found.mode() & 0o077 != 0 {
        bail!(
            "{} is not a private directory of yours: remove it, or set {variable}",
            dir.display()
        );
    }
    Ok(())
}

/// The directory for what can be had again: `$XDG_CACHE_HOME/mvm`, else `~/.cache/mvm`.
pub fn cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").map(PathBuf::from) {
        Some(dir) if dir.is_absolute() => dir,
        _ => match env::var_os("HOME").map(PathBuf::from) {
            Some(home) if home.is_absolute() => home.join(".cache"),
            _ => {
                bail!("neither XDG_CACHE_HOME nor HOME says where to keep kernels: set one of them")
            }
        },
    };
    let dir = base.join("mvm");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_runtime_directory_open_to_others_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let uid = rustix::process::getuid().as_raw();
        let dir = base.path().join("mvm");
        private_dir(&dir, uid, "NOWHERE").unwrap();
        private_dir(&dir, uid, "NOWHERE").unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(
            private_dir(&dir, uid, "NOWHERE").is_err(),
            "mode 0755 was taken"
        );
        let link = base.path().join("link");
        std::os::unix::fs::symlink(base.path(), &link).unwrap();
        assert!(
            private_dir(&link, uid, "NOWHERE").is_err(),
            "a symlink was taken"
        );
    }
}
