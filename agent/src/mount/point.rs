//! Where a folder is mounted: made where it is missing, and never outside of the machine's root.

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags, openat, readlinkat, statx};
use rustix::io::Errno;

use crate::tree::{Tree, path_of};

/// What is made of a mount point that is missing.
const DIRECTORY_MODE: u32 = 0o755;
const FILE_MODE: u32 = 0o644;

/// A directory, or a file, that is to be covered.
#[derive(Debug)]
pub struct Point {
    /// It itself.
    pub target: OwnedFd,
    /// The directory that it is in.
    pub parent: OwnedFd,
    /// Its name there.
    pub name: CString,
}

impl Point {
    /// Opens `path` of `tree`, a directory or a file, and makes what is missing of it. Fails with a sentence.
    pub fn make(tree: &Tree, path: &[u8], is_directory: bool) -> Result<Self, String> {
        let shown = String::from_utf8_lossy(path);
        if !path.starts_with(b"/") || path.iter().all(|byte| *byte == b'/') {
            return Err(format!(
                "{shown:?} is no mount point: it has to be an absolute path below /"
            ));
        }
        let made = open_or_make(tree, path, is_directory);
        let target = made.map_err(|error| {
            format!("the mount point {shown} cannot be made in the machine: {error}")
        })?;
        let kind = statx(&target, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE)
            .map(|seen| FileType::from_raw_mode(seen.stx_mode.into()))
            .map_err(|errno| format!("the mount point {shown} cannot be looked at: {errno}"))?;
        match (is_directory, kind == FileType::Directory) {
            (true, false) => Err(format!(
                "a directory cannot be mounted at {shown}, as the machine has something else there"
            )),
            (false, true) => Err(format!(
                "a file cannot be mounted at {shown}, as the machine has a directory there"
            )),
            _ => Self::of(tree, target)
                .map_err(|error| format!("the mount point {shown} cannot be found again: {error}")),
        }
    }

    /// Where `target` really is, all symlinks resolved.
    fn of(tree: &Tree, target: OwnedFd) -> io::Result<Self> {
        let real = real_path(&target)?;
        let top = real_path(tree.directory()?)?;
        let missing = || io::Error::from(Errno::NOENT);
        let below = match top.as_slice() {
            b"/" => real.as_slice(),
            top => real.strip_prefix(top).ok_or_else(missing)?,
        };
        let slash = below
            .iter()
            .rposition(|byte| *byte == b'/')
            .ok_or_else(missing)?;
        let (parent, name) = below.split_at(slash);
        let name = CString::new(name.get(1..).unwrap_or_default())?;
        if name.is_empty() {
            return Err(missing());
        }
        let parent = tree.open([b"/", parent].concat(), OFlags::PATH | OFlags::DIRECTORY)?;
        Ok(Self {
            target,
            parent,
            name,
        })
    }
}

fn open_or_make(tree: &Tree, path: &[u8], is_directory: bool) -> io::Result<OwnedFd> {
    if is_directory {
        return match tree.open(path, OFlags::PATH) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tree.make_directory(path, DIRECTORY_MODE)
            }
            opened => opened,
        };
    }
    match tree.open(path, OFlags::PATH) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let slash = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
            let (parent, name) = path.split_at(slash);
            let parent = tree.make_directory(parent, DIRECTORY_MODE)?;
            let flags =
                OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let name = name.get(1..).unwrap_or_default();
            openat(&parent, name, flags, Mode::from_raw_mode(FILE_MODE))?;
            tree.open(path, OFlags::PATH)
        }
        opened => opened,
    }
}

fn real_path(of: impl AsFd) -> io::Result<Vec<u8>> {
    let path = readlinkat(rustix::fs::CWD, path_of(of), Vec::new())?;
    Ok(OsString::from_vec(path.into_bytes()).into_vec())
}
