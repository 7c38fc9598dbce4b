//! The host side of a disk: an image file or a block device, opened, locked and measured.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags};
use thiserror::Error;

use super::request::{Limits, SECTOR};

/// Why an image cannot be a disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// There is nothing at the path.
    #[error("the disk image {0} does not exist; create it or correct the path")]
    Missing(PathBuf),
    /// The process may not open it.
    #[error(
        "no permission to open the disk image {path} for {access}; change its mode or owner, \
         or attach it with :ro"
    )]
    Denied {
        /// The image.
        path: PathBuf,
        /// "reading" or "reading and writing".
        access: &'static str,
    },
    /// It is neither a regular file nor a block device.
    #[error("{path} is {kind}, not a disk image; give a raw image file or a block device")]
    NotADisk {
        /// What was given.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// It holds less than one sector.
    #[error("the disk image {0} is empty; give it a size, for example with truncate -s 1G")]
    Empty(PathBuf),
    /// Another machine has it open in a way that excludes this one.
    #[error(
        "the disk image {0} is in use by another machine; stop that one, or attach it with :ro \
         in both"
    )]
    InUse(PathBuf),
    /// The operating system refused something else.
    #[error("the disk image {path} cannot be {action}")]
    Io {
        /// The image.
        path: PathBuf,
        /// "opened", "locked" or "measured".
        action: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
}

/// Opens and locks the image at `path`: alone for writing, together with other readers for
/// reading.
///
/// The lock (flock) belongs to the returned file and its duplicates and ends with the last of
/// them, also when the process is killed. Where the filesystem knows no locks a warning is logged
/// and the image is used unlocked.
pub fn open_image(path: &Path, read_only: bool) -> Result<File, DiskError> {
    // NONBLOCK so that opening a FIFO does not wait for its other end.
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|error| open_error(path, read_only, error))?;
    let io_error = |action, source| DiskError::Io {
        path: path.to_owned(),
        action,
        source,
    };
    let bytes = measure(&file)
        .map_err(|error| io_error("measured", error))?
        .map_err(|kind| DiskError::NotADisk {
            path: path.to_owned(),
            kind,
        })?;
    if bytes < SECTOR {
        return Err(DiskError::Empty(path.to_owned()));
    }
    clear_nonblock(&file).map_err(|error| io_error("opened", error))?;
    lock(&file, path, read_only)?;
    Ok(file)
}

fn open_error(path: &Path, read_only: bool, error: io::Error) -> DiskError {
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::NotFound => DiskError::Missing(path),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => DiskError::Denied {
            path,
            access: if read_only {
                "reading"
            } else {
                "reading and writing"
            },
        },
        // Opening a directory for writing fails before its type can be seen.
        io::ErrorKind::IsADirectory => DiskError::NotADisk {
            path,
            kind: "a directory",
        },
        _ => DiskError::Io {
            path,
            action: "opened",
            source: error,
        },
    }
}

/// Bytes of an image or block device; the inner error says what else the file is.
fn measure(file: &File) -> io::Result<Result<u64, &'static str>> {
    let metadata = file.metadata()?;
    let kind = metadata.file_type();
    if kind.is_file() {
        return Ok(Ok(metadata.len()));
    }
    if kind.is_block_device() {
        let mut device = file;
        return device.seek(SeekFrom::End(0)).map(Ok);
    }
    Ok(Err(if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a pipe"
    } else {
        "a special file"
    }))
}

/// Reads that would have to wait for the disk fail on a descriptor with O_NONBLOCK under io_uring.
fn clear_nonblock(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(
        file,
        flags.difference(OFlags::NONBLOCK),
    )?)
}

fn lock(file: &File, path: &Path, read_only: bool) -> Result<(), DiskError> {
    let operation = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match rustix::fs::flock(file, operation) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(DiskError::InUse(path.to_owned())),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOLCK | rustix::io::Errno::NOSYS) => {
            tracing::warn!(
                "the filesystem of {} knows no locks: nothing keeps a second machine off it",
                path.display()
            );
            Ok(())
        }
        Err(error) => Err(DiskError::Io {
            path: path.to_owned(),
            action: "locked",
            source: error.into(),
        }),
    }
}

/// An open image and its size.
#[derive(Debug)]
pub struct Disk {
    file: File,
    limits: Limits,
}

impl Disk {
    /// Measures `file`.
    ///
    /// The protocol counts in sectors of 512 bytes: bytes of the image after the last whole sector
    /// are neither seen nor changed by the guest.
    pub fn new(file: File, read_only: bool) -> io::Result<Self> {
        let bytes = measure(&file)?.map_err(|kind| {
            let text = format!("a disk cannot be {kind}");
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })?;
        Ok(Self {
            limits: Limits {
                sectors: bytes / SECTOR,
                read_only,
            },
            file,
        })
    }

    /// What requests are checked against.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }
}

impl AsRawFd for Disk {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}
