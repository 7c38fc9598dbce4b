//! The root filesystem of a machine: what `--rootfs` means.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use agent::guest::Root;
use anyhow::{Context, Result, bail};
use devices::virtio::block::disk;

use crate::args::RunArgs;

/// The serial number of the disk with the root filesystem.
pub const SERIAL: &str = "mvm-root";

/// What a machine's commands see as `/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rootfs {
    /// The host's own, as far as [`crate::host_root`] shows it.
    Host,
    /// The small root that mvm brings.
    BuiltIn,
    /// A directory of the host.
    Directory {
        /// Where it is.
        path: PathBuf,
        /// Whether the guest changes it; else its changes are gone with it.
        writable: bool,
    },
    /// A disk image.
    Image {
        /// Where it is.
        path: PathBuf,
        /// Whether it was asked for that it stays as it is.
        read_only: bool,
    },
}

impl Rootfs {
    /// What was typed, by what the host has there.
    pub fn of(args: &RunArgs) -> Self {
        let Some(typed) = &args.rootfs else {
            // At the console there is nobody who would mount it.
            return match args.initrd.is_some() || args.console {
                true => Self::BuiltIn,
                false => Self::Host,
            };
        };
        if typed == "none" {
            return Self::BuiltIn;
        }
        let (path, mode) = split_mode(typed);
        let path = PathBuf::from(path);
        match path.is_dir() {
            true => Self::Directory {
                path,
                writable: mode == Some(Mode::ReadWrite),
            },
            false => Self::Image {
                path,
                read_only: mode == Some(Mode::ReadOnly),
            },
        }
    }

    /// What the agent is told of it; looks into an image to know how to mount it.
    ///
    /// # Errors
    /// Where it cannot be a root, or not of such a machine.
    pub fn root(&self, args: &RunArgs) -> Result<Root> {
        match self {
            Self::Host => Ok(Root::Share { overlay: true }),
            Self::BuiltIn => Ok(Root::Initramfs),
            Self::Directory { path, writable } => {
                if args.console {
                    // At the console there is nobody who would mount it.
                    bail!(
                        "{} is a directory, which cannot be the root with --console: give a disk image, or run a \
                         command",
                        path.display()
                    );
                }
                Ok(Root::Share { overlay: !writable })
            }
            Self::Image { path, read_only } => image_root(path, *read_only),
        }
    }

    /// The image, where it is one.
    pub fn image(&self) -> Option<(&Path, bool)> {
        match self {
            Self::Image { path, read_only } => Some((path, *read_only)),
            _ => None,
        }
    }
}

fn image_root(path: &Path, read_only: bool) -> Result<Root> {
    // Only looked into; the machine opens it for what it does with it.
    let file = disk::open_image(path, true)?;
    let image = vmm::image::probe(&file)
        .with_context(|| format!("{} cannot be a root filesystem", path.display()))?;
    Ok(Root::Disk {
        serial: SERIAL.to_owned(),
        partition: image.partition,
        filesystem: image.filesystem.to_owned(),
        // These two have no writable form.
        read_only: read_only || matches!(image.filesystem, "squashfs" | "erofs"),
    })
}

/// What stands behind a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// `:ro`
    ReadOnly,
    /// `:rw`
    ReadWrite,
}

/// Takes `:ro` or `:rw` from behind a path; any other word after a colon is part of it.
pub fn split_mode(text: &OsStr) -> (&OsStr, Option<Mode>) {
    let bytes = text.as_bytes();
    for (suffix, mode) in [(&b":ro"[..], Mode::ReadOnly), (b":rw", Mode::ReadWrite)] {
        if let Some(path) = bytes.strip_suffix(suffix) {
            return (OsStr::from_bytes(path), Some(mode));
        }
    }
    (text, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_known_suffix_is_an_option() {
        for (text, path, mode) in [
            ("a.img", "a.img", None),
            ("a.img:ro", "a.img", Some(Mode::ReadOnly)),
            ("a.img:rw", "a.img", Some(Mode::ReadWrite)),
            ("a:b", "a:b", None),
        ] {
            assert_eq!(split_mode(OsStr::new(text)), (OsStr::new(path), mode));
        }
    }
}
