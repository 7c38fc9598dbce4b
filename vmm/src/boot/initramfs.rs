//! Writing an initramfs in memory: a `newc` cpio archive that is the same for the same calls.

use std::collections::BTreeSet;
use std::io::{self, Write};

use cpio::newc;
use thiserror::Error;

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFBLK: u32 = 0o060_000;
const PERMISSIONS: u32 = 0o7777;

/// Directories that were not asked for.
const PARENT_MODE: u32 = 0o755;

/// Linux's PATH_MAX, with the final NUL.
const PATH_MAX: usize = 4096;

/// Why an entry cannot be put into the archive.
#[derive(Debug, Error)]
pub enum InitramfsError {
    /// A path that is empty, too long, or has `..` or a NUL in it.
    #[error("{0:?} cannot be a path in an initramfs")]
    Path(String),
    /// A file larger than the format can hold.
    #[error("{path:?} has {len} bytes, more than the 4 GiB that an initramfs can hold in a file")]
    TooLarge {
        /// Its path.
        path: String,
        /// Its length.
        len: usize,
    },
    /// The archive could not be written.
    #[error("the initramfs entry {path:?} could not be written")]
    Write {
        /// Its path.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// The kind of a device node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeKind {
    /// A character device.
    Character,
    /// A block device.
    Block,
}

/// An archive under construction.
///
/// Paths are absolute or relative to the root, which is the same here. Parent directories are
/// made (mode 755) where no earlier call made them. All belongs to root and dates from 1970.
#[derive(Debug, Default)]
pub struct Builder {
    archive: Vec<u8>,
    directories: BTreeSet<String>,
    last_ino: u32,
}

impl Builder {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory with permission bits `mode`; one that is there already stays as it is.
    pub fn dir(&mut self, path: &str, mode: u32) -> Result<&mut Self, InitramfsError> {
        let path = normalize(path)?;
        if !self.directories.contains(&path) {
            self.parents(&path)?;
            self.append(&path, S_IFDIR | mode & PERMISSIONS, None, &[])?;
            self.directories.insert(path);
        }
        Ok(self)
    }

    /// Adds a regular file with permission bits `mode`.
    pub fn file(
        &mut self,
        path: &str,
        mode: u32,
        bytes: &[u8],
    ) -> Result<&mut Self, InitramfsError> {
        let path = normalize(path)?;
        self.parents(&path)?;
        self.append(&path, S_IFREG | mode & PERMISSIONS, None, bytes)
    }

    /// Adds a symbolic link to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<&mut Self, InitramfsError> {
        let path = normalize(path)?;
        self.parents(&path)?;
        self.append(&path, S_IFLNK | 0o777, None, target.as_bytes())
    }

    /// Adds a device node with permission bits `mode`.
    pub fn node(
        &mut self,
        path: &str,
        kind: NodeKind,
        mode: u32,
        (major, minor): (u32, u32),
    ) -> Result<&mut Self, InitramfsError> {
        let path = normalize(path)?;
        self.parents(&path)?;
        let kind = match kind {
            NodeKind::Character => S_IFCHR,
            NodeKind::Block => S_IFBLK,
        };
        self.append(&path, kind | mode & PERMISSIONS, Some((major, minor)), &[])
    }

    /// The finished archive.
    pub fn finish(self) -> Result<Vec<u8>, InitramfsError> {
        newc::trailer(self.archive).map_err(|source| InitramfsError::Write {
            path: "TRAILER!!!".to_owned(),
            source,
        })
    }

    fn parents(&mut self, path: &str) -> Result<(), InitramfsError> {
        for (end, _) in path.match_indices('/') {
            let parent = &path[..end];
            if !self.directories.contains(parent) {
                self.append(parent, S_IFDIR | PARENT_MODE, None, &[])?;
                self.directories.insert(parent.to_owned());
            }
        }
        Ok(())
    }

    fn append(
        &mut self,
        path: &str,
        mode: u32,
        device: Option<(u32, u32)>,
        bytes: &[u8],
    ) -> Result<&mut Self, InitramfsError> {
        let too_large = |_| InitramfsError::TooLarge {
            path: path.to_owned(),
            len: bytes.len(),
        };
        let len = u32::try_from(bytes.len()).map_err(too_large)?;
        self.last_ino += 1;
        let (major, minor) = device.unwrap_or_default();
        let mut entry = newc::Builder::new(path)
            .ino(self.last_ino)
            .mode(mode)
            .nlink(if mode & S_IFDIR == S_IFDIR { 2 } else { 1 })
            .rdev_major(major)
            .rdev_minor(minor)
            .write(&mut self.archive, len);
        entry
            .write_all(bytes)
            .and_then(|()| entry.finish())
            .map_err(|source| InitramfsError::Write {
                path: path.to_owned(),
                source,
            })?;
        Ok(self)
    }
}

/// A path without leading, doubled and final slashes.
fn normalize(path: &str) -> Result<String, InitramfsError> {
    let parts: Vec<_> = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .collect();
    let normal = parts.join("/");
    let bad = normal.is_empty()
        || normal.len() >= PATH_MAX
        || normal.contains('\0')
        || parts.contains(&"..")
        // The format's end marker.
        || normal == "TRAILER!!!";
    if bad {
        return Err(InitramfsError::Path(path.to_owned()));
    }
    Ok(normal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn list(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut rest = archive;
        let mut entries = Vec::new();
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                return entries;
            }
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            entries.push((name, mode, bytes));
            rest = reader.finish().unwrap();
        }
    }

    fn sample() -> Vec<u8> {
        let mut builder = Builder::new();
        builder
            .file("/init", 0o755, b"#!/bin/sh\n")
            .unwrap()
            .dir("/proc/", 0o555)
            .unwrap()
            .file("usr//lib/x.ko", 0o644, &[7; 4097])
            .unwrap()
            .dir("usr/lib", 0o700)
            .unwrap()
            .symlink("/bin", "usr/bin")
            .unwrap()
            .node("/dev/console", NodeKind::Character, 0o600, (5, 1))
            .unwrap();
        builder.finish().unwrap()
    }

    #[test]
    fn what_is_added_is_read_back_with_its_parents_first() {
        let entry = |name: &str, mode, bytes: &[u8]| (name.to_owned(), mode, bytes.to_vec());
        assert_eq!(
            list(&sample()),
            [
                entry("init", 0o100_755, b"#!/bin/sh\n"),
                entry("proc", 0o040_555, b""),
                entry("usr", 0o040_755, b""),
                entry("usr/lib", 0o040_755, b""),
                entry("usr/lib/x.ko", 0o100_644, &[7; 4097]),
                entry("bin", 0o120_777, b"usr/bin"),
                entry("dev", 0o040_755, b""),
                entry("dev/console", 0o020_600, b""),
            ]
        );
    }

    #[test]
    fn the_same_calls_give_the_same_bytes() {
        assert!(sample() == sample());
    }

    #[test]
    fn a_node_keeps_its_device_number() {
        let mut builder = Builder::new();
        builder
            .node("null", NodeKind::Character, 0o666, (1, 3))
            .unwrap();
        let archive = builder.finish().unwrap();
        let reader = newc::Reader::new(archive.as_slice()).unwrap();
        assert_eq!(
            (reader.entry().rdev_major(), reader.entry().rdev_minor()),
            (1, 3)
        );
    }

    #[test]
    fn paths_that_cannot_be_are_refused() {
        for path in [
            "",
            "/",
            "a/../b",
            "..",
            "a\0b",
            "TRAILER!!!",
            &"x/".repeat(3000),
        ] {
            let result = Builder::new().file(path, 0o644, b"").map(|_| ());
            assert!(
                matches!(result, Err(InitramfsError::Path(_))),
                "{path:?}: {result:?}"
            );
        }
    }
}
