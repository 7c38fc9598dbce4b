//! Superblocks: what the first bytes of a disk or a partition say that it holds.
//!
//! Layouts: Linux's Documentation/filesystems/ext4/super.rst, fs/squashfs/squashfs_fs.h and
//! fs/erofs/erofs_fs.h. Of filesystems that cannot be a root only the name is found.

use super::{CRC32C, bytes_at, crc_register, le16, le32, le64};

/// How many bytes [`recognise`] wants to see: up to the superblock of btrfs.
pub(super) const HEAD_LEN: usize = 0x1_0000 + 0x1000;

/// What a disk or a partition holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    /// A filesystem to boot from, by its name for mount(2).
    Root(&'static str),
    /// One whose superblock cannot be right, and why.
    Corrupt(&'static str, String),
    /// Something else that has a name.
    Other(&'static str),
    /// What firmware boots from; its first sector can be a partition table as well.
    Boot(&'static str),
    /// A disk format of another program, or an archive.
    NotRaw {
        /// Its name.
        format: &'static str,
        /// A command that makes a raw disk of it.
        mend: &'static str,
    },
    /// The header of a GPT.
    Partitioned,
}

/// Filesystems and volumes that are told by name only: name, offset of the magic, magic.
const OTHERS: [(&str, usize, &[u8]); 9] = [
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x1_0040, b"_BHRfS_M"),
    ("f2fs", 0x400, b"\x10\x20\xf5\xf2"),
    ("bcachefs", 0x1018, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9"),
    ("bcachefs", 0x1018, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
    ("encrypted LUKS", 0, b"LUKS\xba\xbe"),
    ("LVM", 0x218, b"LVM2 001"),
    ("swap", 0xff6, b"SWAPSPACE2"),
    ("cramfs", 0, b"\x45\x3d\xcd\x28"),
];

const BOOTS: [(&str, usize, &[u8]); 6] = [
    ("iso9660", 0x8001, b"CD001"),
    ("FAT32", 82, b"FAT32   "),
    ("FAT16", 54, b"FAT16   "),
    ("FAT12", 54, b"FAT12   "),
    ("exFAT", 3, b"EXFAT   "),
    ("NTFS", 3, b"NTFS    "),
];

const QEMU_IMG: &str = "qemu-img convert -O raw FILE FILE.raw";

const FORMATS: [(&str, &str, usize, &[u8]); 8] = [
    ("qcow2", QEMU_IMG, 0, b"QFI\xfb"),
    ("VMDK", QEMU_IMG, 0, b"KDMV"),
    ("VHDX", QEMU_IMG, 0, b"vhdxfile"),
    ("VDI", QEMU_IMG, 0x40, b"\x7f\x10\xda\xbe"),
    ("gzip", "gunzip FILE", 0, b"\x1f\x8b\x08"),
    ("xz", "unxz FILE", 0, b"\xfd7zXZ\0"),
    ("zstd", "unzstd FILE", 0, b"\x28\xb5\x2f\xfd"),
    ("bzip2", "bunzip2 FILE", 0, b"BZh"),
];

/// Says what begins with `head` and is `len` bytes long in all.
pub(super) fn recognise(head: &[u8], len: u64) -> Option<Content> {
    let magic_is =
        |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|b| b.starts_with(magic));
    let checks: [(&'static str, Option<Check>); 3] = [
        ("squashfs", squashfs(head)),
        ("erofs", erofs(head)),
        ("ext4", ext(head)),
    ];
    for (name, check) in checks {
        match check {
            None => {}
            Some(Err(reason)) => return Some(Content::Corrupt(name, reason)),
            Some(Ok(size)) if size > len => {
                let reason = format!(
                    "it is {size} bytes long and there are only {len}, so the image may be truncated"
                );
                return Some(Content::Corrupt(name, reason));
            }
            Some(Ok(_)) => return Some(Content::Root(name)),
        }
    }
    if let Some((name, ..)) = OTHERS.iter().find(|(_, at, magic)| magic_is(*at, magic)) {
        return Some(Content::Other(name));
    }
    if let Some((format, mend, ..)) = FORMATS.iter().find(|(.., at, magic)| magic_is(*at, magic)) {
        return Some(Content::NotRaw { format, mend });
    }
    if magic_is(0x200, b"EFI PART") {
        return Some(Content::Partitioned);
    }
    BOOTS
        .iter()
        .find(|(_, at, magic)| magic_is(*at, magic))
        .map(|(name, ..)| Content::Boot(name))
}

/// The filesystem's size in bytes, or what is wrong with its superblock.
type Check = Result<u64, String>;

/// ext2, ext3 and ext4: one driver mounts them all.
fn ext(head: &[u8]) -> Option<Check> {
    const MAGIC: u16 = 0xef53;
    let superblock = head.get(1024..)?;
    (le16(superblock, 0x38)? == MAGIC).then(|| {
        let superblock = superblock.get(..1024).ok_or("its superblock is cut off")?;
        ext_superblock(superblock).unwrap_or_else(|| Err("its superblock is cut off".to_owned()))
    })
}

fn ext_superblock(superblock: &[u8]) -> Option<Check> {
    const INCOMPAT_JOURNAL_DEV: u32 = 0x8;
    const INCOMPAT_64BIT: u32 = 0x80;
    const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
    const MAX_LOG_BLOCK_SIZE: u32 = 6;
    const CHECKSUM: usize = 0x3fc;

    let dynamic_revision = le32(superblock, 0x4c)? >= 1;
    let feature = |offset, bit| {
        dynamic_revision && le32(superblock, offset).is_some_and(|bits| bits & bit != 0)
    };
    if feature(0x60, INCOMPAT_JOURNAL_DEV) {
        return Some(Err(
            "it is the external journal of another filesystem".to_owned()
        ));
    }
    if feature(0x64, RO_COMPAT_METADATA_CSUM) {
        let summed = superblock.get(..CHECKSUM)?.iter().copied();
        if crc_register(CRC32C, summed) != le32(superblock, CHECKSUM)? {
            return Some(Err("the checksum of its superblock is wrong".to_owned()));
        }
    }
    let log_block_size = le32(superblock, 0x18)?;
    let high = match feature(0x60, INCOMPAT_64BIT) {
        true => le32(superblock, 0x150)?,
        false => 0,
    };
    let blocks = u64::from(high) << 32 | u64::from(le32(superblock, 4)?);
    let inodes = le32(superblock, 0)?;
    let per_group = le32(superblock, 0x20)?;
    if log_block_size > MAX_LOG_BLOCK_SIZE || blocks == 0 || inodes == 0 || per_group == 0 {
        return Some(Err("its superblock holds impossible sizes".to_owned()));
    }
    Some(
        blocks
            .checked_mul(1024 << log_block_size)
            .ok_or_else(|| "its superblock holds impossible sizes".to_owned()),
    )
}

fn squashfs(head: &[u8]) -> Option<Check> {
    if !head.starts_with(b"hsqs") {
        return None;
    }
    let block_size = le32(head, 12)?;
    let block_log = u32::from(le16(head, 22)?);
    let major = le16(head, 28)?;
    let used = le64(head, 40)?;
    let check = if major != 4 {
        Err(format!(
            "it is of version {major}, and Linux reads version 4"
        ))
    } else if !(12..=20).contains(&block_log) || block_size != 1 << block_log || used < 96 {
        Err("its superblock holds impossible sizes".to_owned())
    } else {
        Ok(used)
    };
    Some(check)
}

fn erofs(head: &[u8]) -> Option<Check> {
    const MAGIC: u32 = 0xe0f5_e1e2;
    const COMPAT_SB_CHKSUM: u32 = 1;
    const CHECKSUM: usize = 4;
    const SUPERBLOCK: usize = 1024;

    let superblock = head.get(SUPERBLOCK..)?;
    if le32(superblock, 0)? != MAGIC {
        return None;
    }
    let block_bits = u32::from(bytes_at::<1>(superblock, 12)?[0]);
    if !(9..=16).contains(&block_bits) {
        return Some(Err("its superblock holds impossible sizes".to_owned()));
    }
    if le32(superblock, 8)? & COMPAT_SB_CHKSUM != 0 {
        let block_size = 1_usize << block_bits;
        let summed = if block_size > SUPERBLOCK {
            block_size - SUPERBLOCK
        } else {
            block_size
        };
        let Some(block) = superblock.get(..summed) else {
            return Some(Err("its superblock is cut off".to_owned()));
        };
        let zeroed = block.iter().enumerate().map(|(at, byte)| match at {
            CHECKSUM..8 => 0,
            _ => *byte,
        });
        if crc_register(CRC32C, zeroed) != le32(superblock, CHECKSUM)? {
            return Some(Err("the checksum of its superblock is wrong".to_owned()));
        }
    }
    Some(Ok(u64::from(le32(superblock, 36)?) << block_bits))
}
