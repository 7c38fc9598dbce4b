//! The static busybox of the built-in root, from the distribution's package.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::archive::{self, Limits};
use crate::cache::{Cache, CacheError};
use crate::deb::{self, DebError};
use crate::package::{Client, Consent, PackageError, Packages, Wanted};
use crate::progress::Progress;

/// The package; it holds one program that needs no library.
const PACKAGE: &str = "busybox-static";

/// More than the package has, so that a hostile one is cut short.
const LIMITS: Limits = Limits {
    bytes: 64 << 20,
    entries: 10_000,
};

/// Why there is no busybox.
#[derive(Debug, Error)]
pub enum BusyboxError {
    /// The package could not be had.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// There is no place to keep it.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The package could not be unpacked.
    #[error("the package {PACKAGE} could not be unpacked")]
    Deb(#[from] DebError),
    /// It is not in the package.
    #[error("the package {PACKAGE} holds no bin/busybox")]
    NotThere,
    /// A file could not be written.
    #[error("{path} could not be written")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Where busybox is, once [`fetch`] has been successful.
///
/// # Errors
/// When there is no place for it.
pub fn path(cache: &Cache) -> Result<PathBuf, CacheError> {
    Ok(cache.side_dir("busybox")?.join("busybox"))
}

/// Makes sure that busybox is in the cache, and returns where.
///
/// # Errors
/// When the package cannot be had; nothing is left behind then.
pub fn fetch(
    cache: &Cache,
    consent: Consent,
    progress: &dyn Progress,
) -> Result<PathBuf, BusyboxError> {
    let target = path(cache)?;
    if target.is_file() {
        return Ok(target);
    }
    let _lock = cache.exclusive("busybox")?;
    if target.is_file() {
        return Ok(target);
    }
    let stage = cache.stage()?;
    let wanted = Wanted::Named {
        names: vec![PACKAGE.to_owned()],
        prefix: PACKAGE,
    };
    let client = Client::find()?;
    let files = Packages::new(client, cache, consent).obtain(
        &wanted,
        None,
        stage.path(),
        &mut |_, _| false,
        progress,
    )?;
    let program = stage.path().join("busybox");
    for package in &files {
        unpack(&package.file, &program)?;
    }
    if !program.is_file() {
        return Err(BusyboxError::NotThere);
    }
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).map_err(io_error(&program))?;
    fs::rename(&program, &target).map_err(io_error(&target))?;
    progress.finish();
    Ok(target)
}

fn unpack(package: &Path, program: &Path) -> Result<(), BusyboxError> {
    let file = File::open(package).map_err(io_error(package))?;
    deb::for_each_file(
        file,
        LIMITS,
        &mut |member, contents| match member.path.to_str() {
            Some("bin/busybox" | "usr/bin/busybox") => {
                archive::write_file(program, member, contents)
            }
            _ => Ok(()),
        },
    )?;
    Ok(())
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> BusyboxError {
    let path = path.to_owned();
    move |source| BusyboxError::Io { path, source }
}
