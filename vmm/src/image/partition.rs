//! Partition tables: GPT (UEFI 2.10, section 5) and MBR with its extended partitions.
//!
//! A table is read as Linux reads it (block/partitions/efi.c and msdos.c), so that a partition has
//! the number here that it will have in the guest.

use super::{CRC32, ImageError, SECTOR, Window, bytes_at, crc_register, le16, le32, le64};

/// The highest partition number that Linux gives on one disk.
const MAX_NUMBER: usize = 255;

/// One partition, in bytes from the start of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Partition {
    pub(super) number: u32,
    pub(super) start: u64,
    pub(super) len: u64,
    purpose: Purpose,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Any,
    Root,
    Boot,
}

impl Partition {
    /// The table itself says that this is the root of an x86-64 system.
    pub(super) fn is_root(&self) -> bool {
        self.purpose == Purpose::Root
    }

    /// The table does not say that this is for boot loaders.
    pub(super) fn may_be_root(&self) -> bool {
        self.purpose != Purpose::Boot
    }
}

/// A partition table, as far as it makes sense.
#[derive(Debug)]
pub(super) struct Table {
    /// `GPT` or `MBR`.
    pub(super) kind: &'static str,
    pub(super) partitions: Vec<Partition>,
    /// What is wrong with entries that were left out, if any.
    pub(super) damage: Option<String>,
}

impl Table {
    fn new(kind: &'static str) -> Self {
        Self {
            kind,
            partitions: Vec::new(),
            damage: None,
        }
    }

    /// Adds the partition of `count` sectors from sector `first` on, if it lies on the disk.
    fn add(&mut self, disk: &Window, number: u32, sectors: (u64, u64), purpose: Purpose) {
        let (first, count) = sectors;
        let bytes = first.checked_mul(SECTOR).zip(count.checked_mul(SECTOR));
        match bytes.filter(|(start, len)| disk.part(*start, *len).is_some()) {
            Some((start, len)) => self.partitions.push(Partition {
                number,
                start,
                len,
                purpose,
            }),
            None => {
                self.damage.get_or_insert_with(|| {
                    format!(
                        "partition {number} does not lie inside the disk, so the image may be truncated"
                    )
                });
            }
        }
    }
}

/// Reads the table of `disk`; None where there is none.
pub(super) fn read(disk: &Window) -> Result<Option<Table>, ImageError> {
    const SIGNATURE: u16 = 0xaa55;
    let first = disk.read(0, SECTOR as usize)?.unwrap_or_default();
    let signed = le16(&first, 510) == Some(SIGNATURE);
    let header = disk.read(SECTOR, SECTOR as usize)?.unwrap_or_default();
    if header.starts_with(b"EFI PART") {
        let protected =
            signed && mbr_entries(&first).any(|e| e.kind == MBR_PROTECTIVE && e.first == 1);
        if !protected {
            return Err(corrupt_gpt("its protective MBR is missing"));
        }
        return read_gpt(disk, &header).map(Some);
    }
    // A boot sector that is no table has code where the entries would be.
    let plausible = signed && mbr_flags(&first).all(|flag| matches!(flag, 0 | 0x80));
    if !plausible || mbr_entries(&first).all(|e| e.count == 0) {
        return Ok(None);
    }
    read_mbr(disk, &first).map(Some)
}

fn corrupt_gpt(reason: &str) -> ImageError {
    ImageError::CorruptTable {
        table: "GPT",
        reason: reason.to_owned(),
    }
}

/// The type "Linux root (x86-64)" of the Discoverable Partitions Specification, as it lies on disk.
const GPT_ROOT_X86_64: [u8; 16] = [
    0xe3, 0xbc, 0x68, 0x4f, 0xcd, 0xe8, 0xb1, 0x4d, 0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09,
];
/// The type "Extended Boot Loader Partition": a /boot, often ext4.
const GPT_XBOOTLDR: [u8; 16] = [
    0xff, 0xc2, 0x13, 0xbc, 0xe6, 0x59, 0x62, 0x42, 0xa3, 0x52, 0xb2, 0x75, 0xfd, 0x6f, 0x71, 0x72,
];

fn read_gpt(disk: &Window, header: &[u8]) -> Result<Table, ImageError> {
    const ENTRY_LEN: usize = 128;
    const MAX_ENTRIES: usize = 1024;

    let cut_off = || corrupt_gpt("its header is cut off");
    let header_len = le32(header, 12).ok_or_else(cut_off)? as usize;
    let summed = header
        .get(..header_len)
        .filter(|summed| summed.len() >= 92)
        .ok_or_else(|| corrupt_gpt("its header has an impossible length"))?;
    let zeroed = summed.iter().enumerate().map(|(at, byte)| match at {
        16..20 => 0,
        _ => *byte,
    });
    if Some(!crc_register(CRC32, zeroed)) != le32(header, 16) {
        return Err(corrupt_gpt("the checksum of its header is wrong"));
    }
    let entries_at = le64(header, 72).ok_or_else(cut_off)?;
    let count = le32(header, 80).ok_or_else(cut_off)? as usize;
    if le32(header, 84) != Some(ENTRY_LEN as u32) || count > MAX_ENTRIES {
        return Err(corrupt_gpt("its entries have an impossible size or number"));
    }
    let entries = match entries_at.checked_mul(SECTOR) {
        Some(start) => disk.read(start, count * ENTRY_LEN)?,
        None => None,
    }
    .ok_or_else(|| corrupt_gpt("its entries do not lie inside the disk"))?;
    if Some(!crc_register(CRC32, entries.iter().copied())) != le32(header, 88) {
        return Err(corrupt_gpt("the checksum of its entries is wrong"));
    }
    let mut table = Table::new("GPT");
    for (number, entry) in (1..).zip(entries.chunks_exact(ENTRY_LEN)).take(MAX_NUMBER) {
        let (Some(kind), Some(first), Some(last)) =
            (bytes_at::<16>(entry, 0), le64(entry, 32), le64(entry, 40))
        else {
            continue;
        };
        let purpose = match kind {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] => continue,
            GPT_ROOT_X86_64 => Purpose::Root,
            GPT_XBOOTLDR => Purpose::Boot,
            _ => Purpose::Any,
        };
        // An end before its start gives a length of 0, which lies on no disk.
        let count = last.checked_sub(first).and_then(|c| c.checked_add(1));
        table.add(disk, number, (first, count.unwrap_or(0)), purpose);
    }
    Ok(table)
}

const MBR_PROTECTIVE: u8 = 0xee;
const MBR_ENTRIES: usize = 446;
const MBR_ENTRY_LEN: usize = 16;

#[derive(Debug, Clone, Copy)]
struct MbrEntry {
    kind: u8,
    first: u64,
    count: u64,
}

impl MbrEntry {
    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

fn mbr_entries(sector: &[u8]) -> impl Iterator<Item = MbrEntry> {
    let entries = sector.get(MBR_ENTRIES..510).unwrap_or(&[]);
    entries.chunks_exact(MBR_ENTRY_LEN).filter_map(|entry| {
        Some(MbrEntry {
            kind: *entry.get(4)?,
            first: le32(entry, 8)?.into(),
            count: le32(entry, 12)?.into(),
        })
    })
}

fn mbr_flags(sector: &[u8]) -> impl Iterator<Item = u8> {
    let entries = sector.get(MBR_ENTRIES..510).unwrap_or(&[]);
    entries
        .chunks_exact(MBR_ENTRY_LEN)
        .filter_map(|entry| entry.first().copied())
}

fn read_mbr(disk: &Window, sector: &[u8]) -> Result<Table, ImageError> {
    let mut table = Table::new("MBR");
    for (number, entry) in (1..).zip(mbr_entries(sector)) {
        if entry.count > 0 && !entry.is_extended() {
            table.add(disk, number, (entry.first, entry.count), Purpose::Any);
        }
    }
    for entry in mbr_entries(sector).filter(|e| e.count > 0 && e.is_extended()) {
        read_extended(disk, &entry, &mut table)?;
    }
    Ok(table)
}

/// Follows the chain of an extended partition; its logical partitions are numbered from 5 on.
fn read_extended(disk: &Window, extended: &MbrEntry, table: &mut Table) -> Result<(), ImageError> {
    const MAX_LINKS: usize = 100;
    let mut at = extended.first;
    let mut len = extended.count;
    let end = extended.first + extended.count;
    let logical = table.partitions.iter().filter(|p| p.number >= 5).count();
    let mut number = 5 + u32::try_from(logical).unwrap_or(u32::MAX - 5);
    for _ in 0..MAX_LINKS {
        let offset = at.checked_mul(SECTOR);
        let sector = match offset {
            Some(offset) => disk.read(offset, SECTOR as usize)?,
            None => None,
        };
        let Some(sector) = sector.filter(|s| le16(s, 510) == Some(0xaa55)) else {
            return Ok(());
        };
        for (slot, entry) in mbr_entries(&sector).enumerate() {
            let first = at + entry.first;
            let fits = entry.first + entry.count <= len
                && first >= extended.first
                && first + entry.count <= end;
            // The last two slots should be empty: what is there counts only where it can be true.
            if entry.count == 0 || entry.is_extended() || (slot >= 2 && !fits) {
                continue;
            }
            if number as usize > MAX_NUMBER {
                return Ok(());
            }
            table.add(disk, number, (first, entry.count), Purpose::Any);
            number += 1;
        }
        let Some(link) = mbr_entries(&sector).find(|e| e.is_extended() && e.count > 0) else {
            return Ok(());
        };
        at = extended.first + link.first;
        len = link.count;
    }
    table
        .damage
        .get_or_insert_with(|| "its extended partition has no end".to_owned());
    Ok(())
}
