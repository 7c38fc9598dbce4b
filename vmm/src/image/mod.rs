//! What a raw disk image holds: which filesystem, on the whole disk or on which partition.
//!
//! The guest's kernel finds the filesystem again by itself; this is read first so that a wrong
//! image is refused with a sentence instead of a kernel panic. The image is hostile: every read is
//! bounded, every number in it is checked before it is used, and nothing in it can cause a panic.

mod filesystem;
mod partition;

use std::fs::File;
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};

use thiserror::Error;

use filesystem::Content;
use partition::Partition;

/// The sector size that partition tables count in; virtio-blk shows the guest the same.
const SECTOR: u64 = 512;

/// A disk image that the guest can mount as its root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The filesystem's name for mount(2): `ext4` (also for ext2 and ext3), `squashfs` or `erofs`.
    pub filesystem: &'static str,
    /// The partition with the filesystem as the kernel numbers it, from 1; None is the whole disk.
    pub partition: Option<u32>,
}

/// Why a disk image cannot be a machine's root.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The image could not be read.
    #[error("the disk image cannot be read")]
    Read(#[from] io::Error),
    /// It is a directory, a pipe or a character device.
    #[error("it is a {0}, not a disk image")]
    NotADisk(&'static str),
    /// It has no bytes.
    #[error("the disk image is empty (0 bytes)")]
    Empty,
    /// It holds zeros where a filesystem or a partition table would begin.
    #[error("the disk image is blank: make a filesystem in it first, for example with mkfs.ext4")]
    Blank,
    /// It is not raw: a disk format of another program, or compressed.
    #[error("it is a {format} file, not a raw disk image: convert it first with `{mend}`")]
    NotRaw {
        /// The format's name.
        format: &'static str,
        /// A command that makes it raw.
        mend: &'static str,
    },
    /// The filesystem is one that machines cannot boot from.
    #[error(
        "unsupported filesystem {filesystem} on {place}: a root is ext4, squashfs or erofs",
        place = place(*.partition)
    )]
    Unsupported {
        /// The filesystem's name.
        filesystem: &'static str,
        /// Its partition; None is the whole disk.
        partition: Option<u32>,
    },
    /// The filesystem's superblock cannot be right.
    #[error(
        "the {filesystem} filesystem on {place} is corrupt: {reason}",
        place = place(*.partition)
    )]
    CorruptFilesystem {
        /// The filesystem's name.
        filesystem: &'static str,
        /// Its partition; None is the whole disk.
        partition: Option<u32>,
        /// What is wrong with it.
        reason: String,
    },
    /// The partition table cannot be right.
    #[error("the {table} partition table is corrupt: {reason}")]
    CorruptTable {
        /// `GPT` or `MBR`.
        table: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// No partition holds a filesystem that is known.
    #[error(
        "none of the {count} partitions of the {table} table holds a filesystem for a root (ext4, squashfs or erofs)"
    )]
    NoPartition {
        /// `GPT` or `MBR`.
        table: &'static str,
        /// How many partitions were looked at.
        count: usize,
    },
    /// Nothing is recognised.
    #[error(
        "the disk image holds no filesystem that is recognised: a root is ext4, squashfs or erofs"
    )]
    Unrecognised,
}

fn place(partition: Option<u32>) -> String {
    match partition {
        Some(number) => format!("partition {number}"),
        None => "the whole disk".to_owned(),
    }
}

/// Finds the filesystem to boot from: that of the whole disk, else the partition that a GPT marks
/// as an x86-64 root, else the first partition that holds ext4, squashfs or erofs.
///
/// `file` is a regular file or a block device, open for reading. Only superblocks and partition
/// tables are read, 17 MiB at the very most.
pub fn probe(file: &File) -> Result<Image, ImageError> {
    let disk = Window::whole(file)?;
    let head = disk.head(filesystem::HEAD_LEN)?;
    match filesystem::recognise(&head, disk.len) {
        Some(Content::Partitioned | Content::Boot(_)) | None => {}
        Some(content) => return verdict(content, None),
    }
    if let Some(table) = partition::read(&disk)? {
        return probe_partitions(&disk, &table);
    }
    match filesystem::recognise(&head, disk.len) {
        Some(content @ Content::Boot(_)) => verdict(content, None),
        _ if head.iter().all(|byte| *byte == 0) => Err(ImageError::Blank),
        _ => Err(ImageError::Unrecognised),
    }
}

fn probe_partitions(disk: &Window, table: &partition::Table) -> Result<Image, ImageError> {
    let mut first: Option<Image> = None;
    let mut mishap: Option<ImageError> = None;
    for partition in &table.partitions {
        if !partition.may_be_root() {
            continue;
        }
        match probe_partition(disk, partition) {
            Ok(Some(image)) if partition.is_root() => return Ok(image),
            Ok(Some(image)) => first = first.or(Some(image)),
            Ok(None) => {}
            Err(ImageError::Read(error)) => return Err(error.into()),
            Err(error) => mishap = mishap.or(Some(error)),
        }
    }
    match (first, mishap, &table.damage) {
        (Some(image), _, _) => Ok(image),
        (None, Some(error), _) => Err(error),
        (None, None, Some(reason)) => Err(ImageError::CorruptTable {
            table: table.kind,
            reason: reason.clone(),
        }),
        (None, None, None) => Err(ImageError::NoPartition {
            table: table.kind,
            count: table.partitions.len(),
        }),
    }
}

fn probe_partition(disk: &Window, partition: &Partition) -> Result<Option<Image>, ImageError> {
    let Some(window) = disk.part(partition.start, partition.len) else {
        return Ok(None);
    };
    let head = window.head(filesystem::HEAD_LEN)?;
    match filesystem::recognise(&head, window.len) {
        // Firmware partitions hold FAT: they are no mistake.
        None | Some(Content::Boot(_) | Content::Partitioned) => Ok(None),
        Some(content) => verdict(content, Some(partition.number)).map(Some),
    }
}

fn verdict(content: Content, partition: Option<u32>) -> Result<Image, ImageError> {
    match content {
        Content::Root(filesystem) => Ok(Image {
            filesystem,
            partition,
        }),
        Content::Corrupt(filesystem, reason) => Err(ImageError::CorruptFilesystem {
            filesystem,
            partition,
            reason,
        }),
        Content::Other(filesystem) | Content::Boot(filesystem) => Err(ImageError::Unsupported {
            filesystem,
            partition,
        }),
        Content::NotRaw { format, mend } => Err(ImageError::NotRaw { format, mend }),
        Content::Partitioned => Err(ImageError::Unrecognised),
    }
}

/// A range of a file that reads cannot leave.
struct Window<'a> {
    file: &'a File,
    start: u64,
    len: u64,
}

impl<'a> Window<'a> {
    fn whole(file: &'a File) -> Result<Self, ImageError> {
        let metadata = file.metadata()?;
        let kind = metadata.file_type();
        let len = if kind.is_file() {
            metadata.len()
        } else if kind.is_block_device() {
            let mut device = file;
            device.seek(SeekFrom::End(0))?
        } else if kind.is_dir() {
            return Err(ImageError::NotADisk("directory"));
        } else {
            return Err(ImageError::NotADisk("pipe, socket or character device"));
        };
        match len {
            0 => Err(ImageError::Empty),
            len => Ok(Self {
                file,
                start: 0,
                len,
            }),
        }
    }

    /// The part at `start`, `len` bytes long; None where it does not lie inside.
    fn part(&self, start: u64, len: u64) -> Option<Window<'a>> {
        let end = start.checked_add(len)?;
        (len > 0 && end <= self.len).then_some(Window {
            file: self.file,
            start: self.start.checked_add(start)?,
            len,
        })
    }

    /// The first `len` bytes, fewer where the window is shorter.
    fn head(&self, len: usize) -> io::Result<Vec<u8>> {
        let len = usize::try_from(self.len).map_or(len, |whole| whole.min(len));
        let mut bytes = vec![0; len];
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, self.start + filled as u64) {
                // The file became shorter since it was measured.
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    /// `len` bytes at `offset`; None where they do not all lie inside.
    fn read(&self, offset: u64, len: usize) -> io::Result<Option<Vec<u8>>> {
        match self.part(offset, len as u64) {
            Some(part) => Ok(Some(part.head(len)?).filter(|bytes| bytes.len() == len)),
            None => Ok(None),
        }
    }
}

/// The `N` bytes at `offset`; None past the end.
fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    let end = offset.checked_add(N)?;
    bytes.get(offset..end)?.try_into().ok()
}

fn le16(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes_at(bytes, offset).map(u16::from_le_bytes)
}

fn le32(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes_at(bytes, offset).map(u32::from_le_bytes)
}

fn le64(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes_at(bytes, offset).map(u64::from_le_bytes)
}

/// The polynomial of GPT's checksums (CRC-32), reflected.
const CRC32: u32 = 0xedb8_8320;
/// The polynomial of the filesystems' checksums (CRC-32C), reflected.
const CRC32C: u32 = 0x82f6_3b78;

/// The checksum's register after `bytes`, started at all ones and not inverted at the end.
///
/// At most 128 KiB are ever summed, so a table is not worth its lines.
fn crc_register(polynomial: u32, bytes: impl IntoIterator<Item = u8>) -> u32 {
    bytes.into_iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (polynomial & (crc & 1).wrapping_neg())
        })
    })
}

#[cfg(test)]
mod tests;
