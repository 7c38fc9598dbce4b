//! A copy from a hostile machine: the first byte chooses how it is unpacked; the rest is the archive, or
//! with the chunks around it, what comes over the connection.
//!
//! The headers of an archive get the checksums that they should have, or next to none would be looked at.

#![no_main]

use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use agent::archive::{self, ChunkReader, ChunkWriter, Policy, Root};
use agent::protocol::Landing;
use libfuzzer_sys::fuzz_target;

const BLOCK: usize = 512;

/// What may come besides permissions and the sticky bit.
const SET_ID: u32 = 0o6000;

fuzz_target!(|data: &[u8]| {
    let Some((choice, data)) = data.split_first() else {
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let outside = directory.path().join("outside");
    let to = directory.path().join("to");
    fs::create_dir(&outside).expect("a directory");
    fs::create_dir(&to).expect("a directory");
    fs::write(outside.join("kept"), "kept").expect("a file");
    // Short names, which the fuzzer finds.
    symlink("../outside", to.join("l")).expect("a link");

    let wire = match choice & 1 {
        0 => framed(data),
        _ => data.to_vec(),
    };
    let landing = match choice >> 1 & 3 {
        0 => Landing::Members,
        1 => Landing::Tree(None),
        2 => Landing::Tree(Some(b"n".to_vec())),
        _ => Landing::Tree(Some(b"l".to_vec())),
    };
    let policy = Policy {
        owned: false,
        devices: false,
    };
    let chunks = ChunkReader::new(wire.as_slice(), |_| {});
    // Whichever it is: an answer.
    let _ = archive::unpack(
        Root::Own,
        to.as_os_str().as_bytes(),
        &landing,
        policy,
        chunks,
        &mut |_| {},
    );

    let mut entries = fs::read_dir(directory.path()).expect("the directory");
    assert_eq!(entries.by_ref().count(), 2, "something beside the destination");
    let entries = fs::read_dir(&outside).expect("the directory outside");
    assert_eq!(entries.count(), 1, "something outside of the destination");
    let kept = outside.join("kept");
    assert_eq!(fs::read(&kept).expect("the file outside"), b"kept");
    assert_eq!(kept.metadata().expect("the file outside").nlink(), 1);
    check(&to);
});

/// Nothing below `directory` has a set-id bit or is a device.
fn check(directory: &Path) {
    // Closed directories are root's business; without that right they are passed over.
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        if !metadata.is_symlink() {
            assert_eq!(metadata.mode() & SET_ID, 0, "{entry:?}");
            assert_eq!(metadata.rdev(), 0, "{entry:?}");
        }
        if metadata.is_dir() {
            check(&entry.path());
        }
    }
}

fn framed(archive: &[u8]) -> Vec<u8> {
    let mut archive = archive.to_vec();
    archive.chunks_exact_mut(BLOCK).for_each(sign);
    let mut out = ChunkWriter::new(Vec::new());
    out.write_all(&archive).expect("a vector takes all");
    out.end(Ok(())).expect("a vector takes all")
}

/// Puts the right checksum into what may be a header (POSIX.1-2024, "ustar Interchange Format").
fn sign(block: &mut [u8]) {
    if block[257..].starts_with(b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
}
