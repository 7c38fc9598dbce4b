//! Real images made with the usual tools where these are installed, tables made here, and nonsense.

use super::*;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// An image of `kind`, or None (said on stderr) where the tool to make one is missing.
fn make(kind: &str, dir: &TempDir) -> Option<Vec<u8>> {
    let image = dir.path().join(kind);
    let source = dir.path().join("source");
    fs::create_dir_all(&source).unwrap();
    // Hardly compressible, so that half of an image is less than its content.
    let mut random = Random(1);
    let noise: Vec<u8> = (0..100_000).map(|_| random.below(256) as u8).collect();
    fs::write(source.join("file"), noise).unwrap();
    if kind.starts_with("ext") {
        File::create(&image).unwrap().set_len(8 * MIB).unwrap();
    }
    let mut command = match kind {
        "squashfs" => {
            let mut command = Command::new("mksquashfs");
            command.arg(&source).arg(&image);
            command
        }
        "erofs" => {
            let mut command = Command::new("mkfs.erofs");
            command.arg(&image).arg(&source);
            command
        }
        ext => {
            let mut command = Command::new(format!("mkfs.{ext}"));
            command.arg("-q").arg("-F").arg(&image);
            command
        }
    };
    let made = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    match made {
        Ok(status) => assert!(status.success(), "{command:?} failed: {status}"),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            eprintln!("SKIPPED: {:?} is not installed", command.get_program());
            return None;
        }
        Err(error) => panic!("{command:?}: {error}"),
    }
    Some(fs::read(image).unwrap())
}

fn probe_bytes(bytes: &[u8]) -> Result<Image, ImageError> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    probe(&file)
}

fn message(bytes: &[u8]) -> String {
    probe_bytes(bytes).expect_err("must be refused").to_string()
}

/// A minimal ext4 superblock without checksums, for a filesystem of `blocks` KiB.
fn small_ext4(blocks: u32) -> Vec<u8> {
    let mut bytes = vec![0; blocks as usize * 1024];
    let mut put = |at: usize, value: u32| {
        bytes[1024 + at..1024 + at + 4].copy_from_slice(&value.to_le_bytes());
    };
    put(0, 16);
    put(4, blocks);
    put(0x20, 8192);
    put(0x38, 0xef53);
    put(0x4c, 1);
    bytes
}

struct GptEntry<'a> {
    kind: [u8; 16],
    content: &'a [u8],
}

const LINUX: [u8; 16] = *b"\xaf\x3d\xc6\x0f\x83\x84\x72\x47\x8e\x79\x3d\x69\xd8\x47\x7d\xe4";
const ESP: [u8; 16] = *b"\x28\x73\x2a\xc1\x1f\xf8\xd2\x11\xba\x4b\x00\xa0\xc9\x3e\xc9\x3b";
const ROOT: [u8; 16] = *b"\xe3\xbc\x68\x4f\xcd\xe8\xb1\x4d\x96\xe7\xfb\xca\xf9\x84\xb7\x09";
const XBOOTLDR: [u8; 16] = *b"\xff\xc2\x13\xbc\xe6\x59\x62\x42\xa3\x52\xb2\x75\xfd\x6f\x71\x72";

/// A disk with a GPT of 128 entries, the partitions from sector 64 on.
fn gpt(entries: &[GptEntry]) -> Vec<u8> {
    let mut table = vec![0; 128 * 128];
    let mut body = Vec::new();
    for (slot, entry) in table.chunks_exact_mut(128).zip(entries) {
        let first = 64 + body.len() as u64 / SECTOR;
        body.extend(entry.content);
        body.resize(body.len().next_multiple_of(SECTOR as usize), 0);
        let last = 64 + body.len() as u64 / SECTOR - 1;
        slot[..16].copy_from_slice(&entry.kind);
        slot[32..40].copy_from_slice(&first.to_le_bytes());
        slot[40..48].copy_from_slice(&last.to_le_bytes());
    }
    let mut header = vec![0; 92];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..12].copy_from_slice(&0x1_0000_u32.to_le_bytes());
    header[12..16].copy_from_slice(&92_u32.to_le_bytes());
    header[24..32].copy_from_slice(&1_u64.to_le_bytes());
    header[72..80].copy_from_slice(&2_u64.to_le_bytes());
    header[80..84].copy_from_slice(&128_u32.to_le_bytes());
    header[84..88].copy_from_slice(&128_u32.to_le_bytes());
    let sum = !crc_register(CRC32, table.iter().copied());
    header[88..92].copy_from_slice(&sum.to_le_bytes());
    let sum = !crc_register(CRC32, header.iter().copied());
    header[16..20].copy_from_slice(&sum.to_le_bytes());

    let mut disk = mbr(&[(0xee, 1, u32::MAX)]);
    disk.extend(header);
    disk.resize(1024, 0);
    disk.extend(table);
    disk.resize(64 * SECTOR as usize, 0);
    disk.extend(body);
    disk
}

/// One boot sector with these entries: type, first sector, sectors.
fn mbr(entries: &[(u8, u32, u32)]) -> Vec<u8> {
    let mut sector = vec![0; 512];
    for (slot, (kind, first, count)) in sector[446..510].chunks_exact_mut(16).zip(entries) {
        slot[4] = *kind;
        slot[8..12].copy_from_slice(&first.to_le_bytes());
        slot[12..16].copy_from_slice(&count.to_le_bytes());
    }
    sector[510] = 0x55;
    sector[511] = 0xaa;
    sector
}

fn put(disk: &mut Vec<u8>, sector: usize, bytes: &[u8]) {
    let at = sector * SECTOR as usize;
    let end = at + bytes.len();
    disk.resize(disk.len().max(end), 0);
    disk[at..end].copy_from_slice(bytes);
}

#[test]
fn checksums_have_their_published_check_values() {
    assert_eq!(!crc_register(CRC32, *b"123456789"), 0xcbf4_3926);
    assert_eq!(!crc_register(CRC32C, *b"123456789"), 0xe306_9283);
}

#[test]
fn a_filesystem_on_the_whole_disk_is_found() {
    let dir = TempDir::new().unwrap();
    for (kind, name) in [
        ("ext2", "ext4"),
        ("ext3", "ext4"),
        ("ext4", "ext4"),
        ("squashfs", "squashfs"),
        ("erofs", "erofs"),
    ] {
        let Some(bytes) = make(kind, &dir) else {
            continue;
        };
        let found = probe_bytes(&bytes).unwrap_or_else(|error| panic!("{kind}: {error}"));
        let expected = Image {
            filesystem: name,
            partition: None,
        };
        assert_eq!(found, expected, "{kind}");
    }
}

#[test]
fn a_truncated_image_is_told() {
    let dir = TempDir::new().unwrap();
    for kind in ["ext4", "squashfs", "erofs"] {
        let Some(bytes) = make(kind, &dir) else {
            continue;
        };
        let message = message(&bytes[..bytes.len() / 2]);
        assert!(message.contains("truncated"), "{kind}: {message}");
    }
}

#[test]
fn a_flipped_bit_in_a_summed_superblock_is_told() {
    let dir = TempDir::new().unwrap();
    for kind in ["ext4", "erofs"] {
        let Some(mut bytes) = make(kind, &dir) else {
            continue;
        };
        bytes[1024 + 0x30] ^= 4;
        let message = message(&bytes);
        assert!(message.contains("checksum"), "{kind}: {message}");
        assert!(message.contains(kind), "{kind}: {message}");
    }
}

#[test]
fn impossible_sizes_in_a_superblock_are_told() {
    let broken = |at: usize, value: u32| {
        let mut bytes = small_ext4(64);
        bytes[1024 + at..1024 + at + 4].copy_from_slice(&value.to_le_bytes());
        message(&bytes)
    };
    assert!(probe_bytes(&small_ext4(64)).is_ok());
    for (at, value) in [(0, 0), (4, 0), (0x18, 7), (0x18, u32::MAX), (0x20, 0)] {
        let message = broken(at, value);
        assert!(message.contains("impossible"), "{at:#x}: {message}");
    }
    assert!(broken(4, u32::MAX).contains("truncated"));
    let mut cut = small_ext4(64);
    cut.truncate(1024 + 0x40);
    assert!(message(&cut).contains("cut off"));
}

#[test]
fn empty_blank_and_unknown_images_are_told_apart() {
    assert!(matches!(probe_bytes(&[]), Err(ImageError::Empty)));
    assert!(matches!(probe_bytes(&[0; 10]), Err(ImageError::Blank)));
    assert!(matches!(probe_bytes(&[0; 1 << 20]), Err(ImageError::Blank)));
    let text = b"#!/bin/sh\necho this is no image\n".repeat(1000);
    assert!(matches!(probe_bytes(&text), Err(ImageError::Unrecognised)));
    let directory = File::open(Path::new("/")).unwrap();
    assert!(matches!(probe(&directory), Err(ImageError::NotADisk(_))));
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(probe(&null), Err(ImageError::NotADisk(_))));
}

#[test]
fn filesystems_and_formats_that_cannot_be_a_root_are_named() {
    let with = |at: usize, magic: &[u8]| {
        let mut bytes = vec![0; 1 << 18];
        bytes[at..at + magic.len()].copy_from_slice(magic);
        message(&bytes)
    };
    assert!(with(0, b"XFSB").contains("unsupported filesystem xfs"));
    assert!(with(0x1_0040, b"_BHRfS_M").contains("btrfs"));
    assert!(with(0x8001, b"CD001").contains("iso9660"));
    assert!(with(82, b"FAT32   ").contains("FAT32"));
    let qcow2 = with(0, b"QFI\xfb");
    assert!(qcow2.contains("qcow2") && qcow2.contains("qemu-img convert"));
    assert!(with(0, b"\x1f\x8b\x08").contains("gunzip"));
}

#[test]
fn the_first_linux_partition_of_a_gpt_is_found() {
    let root = small_ext4(64);
    let disk = gpt(&[
        GptEntry {
            kind: ESP,
            content: &[1; 4096],
        },
        GptEntry {
            kind: [0; 16],
            content: &[],
        },
        GptEntry {
            kind: LINUX,
            content: &root,
        },
        GptEntry {
            kind: LINUX,
            content: &root,
        },
    ]);
    let found = probe_bytes(&disk).unwrap();
    assert_eq!((found.filesystem, found.partition), ("ext4", Some(3)));
}

#[test]
fn a_partition_marked_as_the_root_goes_before_others_and_boot_partitions_are_no_root() {
    let ext4 = small_ext4(64);
    let entry = |kind| GptEntry {
        kind,
        content: &ext4,
    };
    let disk = gpt(&[entry(XBOOTLDR), entry(LINUX), entry(ROOT)]);
    assert_eq!(probe_bytes(&disk).unwrap().partition, Some(3));
    let disk = gpt(&[entry(XBOOTLDR), entry(LINUX)]);
    assert_eq!(probe_bytes(&disk).unwrap().partition, Some(2));
    let disk = gpt(&[entry(XBOOTLDR)]);
    assert!(message(&disk).contains("none of the 1 partitions"));
}

#[test]
fn a_damaged_gpt_is_refused() {
    let root = small_ext4(64);
    let good = gpt(&[GptEntry {
        kind: LINUX,
        content: &root,
    }]);
    let broken = |at: usize| {
        let mut disk = good.clone();
        disk[at] ^= 1;
        message(&disk)
    };
    assert!(broken(510).contains("protective MBR"));
    assert!(broken(512 + 40).contains("checksum of its header"));
    assert!(broken(512 + 14).contains("impossible length"));
    assert!(broken(1024 + 33).contains("checksum of its entries"));
    assert!(message(&good[..2048]).contains("entries do not lie inside"));
    let cut = message(&good[..64 * 512 + 8192]);
    assert!(
        cut.contains("partition 1") && cut.contains("truncated"),
        "{cut}"
    );
}

#[test]
fn a_corrupt_or_unsupported_filesystem_on_a_partition_is_named_with_its_number() {
    let mut xfs = vec![0; 65536];
    xfs[..4].copy_from_slice(b"XFSB");
    let disk = gpt(&[GptEntry {
        kind: LINUX,
        content: &xfs,
    }]);
    assert!(message(&disk).contains("xfs on partition 1"));
    let mut long = small_ext4(64);
    long[1024 + 4] = 65;
    let disk = gpt(&[
        GptEntry {
            kind: ESP,
            content: &[9; 512],
        },
        GptEntry {
            kind: LINUX,
            content: &long,
        },
    ]);
    assert!(message(&disk).contains("ext4 filesystem on partition 2 is corrupt"));
}

#[test]
fn primary_and_logical_partitions_of_an_mbr_have_linuxs_numbers() {
    let root = small_ext4(64);
    let sectors = root.len() as u32 / 512;
    let mut disk = mbr(&[(0x0c, 8, 8), (0x83, 64, sectors)]);
    put(&mut disk, 64, &root);
    assert_eq!(probe_bytes(&disk).unwrap().partition, Some(2));

    // An extended partition from 100 to 1000: swap as number 5, the root as number 6.
    let mut disk = mbr(&[(0x0c, 8, 8), (0x05, 100, 900)]);
    put(&mut disk, 100, &mbr(&[(0x82, 8, 16), (0x05, 200, 400)]));
    put(&mut disk, 300, &mbr(&[(0x83, 8, sectors)]));
    put(&mut disk, 308, &root);
    put(&mut disk, 1000, &[0; 512]);
    assert_eq!(probe_bytes(&disk).unwrap().partition, Some(6));
}

#[test]
fn an_extended_partition_that_loops_or_leaves_the_disk_ends() {
    let mut disk = mbr(&[(0x05, 100, 900)]);
    put(&mut disk, 100, &mbr(&[(0x82, 8, 16), (0x05, 0, 900)]));
    put(&mut disk, 1000, &[0; 512]);
    let looped = message(&disk);
    assert!(looped.contains("no end"), "{looped}");
    put(
        &mut disk,
        100,
        &mbr(&[(0x82, 8, 16), (0x05, u32::MAX, u32::MAX)]),
    );
    assert!(message(&disk).contains("none of the 1 partitions"));
    let outside = message(&mbr(&[(0x83, u32::MAX, u32::MAX)]));
    assert!(outside.contains("does not lie inside"), "{outside}");
}

/// A small generator with a fixed seed, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}

#[test]
fn mutated_images_never_panic_and_never_name_what_is_not_there() {
    let root = small_ext4(64);
    let mut logical = mbr(&[(0x05, 100, 900)]);
    put(&mut logical, 100, &mbr(&[(0x82, 8, 16), (0x05, 200, 400)]));
    put(&mut logical, 300, &mbr(&[(0x83, 8, 128)]));
    put(&mut logical, 308, &root);
    let dir = TempDir::new().unwrap();
    let mut seeds = vec![
        gpt(&[GptEntry {
            kind: LINUX,
            content: &root,
        }]),
        logical,
        root,
    ];
    seeds.extend(
        ["squashfs", "erofs"]
            .into_iter()
            .filter_map(|kind| make(kind, &dir)),
    );
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for seed in &seeds {
        let interesting = seed.len().min(2048 + 512 * 400);
        for _ in 0..2000 {
            let mut bytes = seed.clone();
            for _ in 0..=random.below(8) {
                let at = random.below(interesting);
                bytes[at] = [0, 1, 0x7f, 0x80, 0xff, random.below(256) as u8][random.below(6)];
            }
            if random.below(4) == 0 {
                bytes.truncate(random.below(bytes.len()));
            }
            if let Ok(image) = probe_bytes(&bytes) {
                assert!(["ext4", "squashfs", "erofs"].contains(&image.filesystem));
                assert!(
                    image
                        .partition
                        .is_none_or(|number| (1..=255).contains(&number))
                );
            }
        }
    }
}
