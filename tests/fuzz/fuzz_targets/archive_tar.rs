//! A tar archive, plain or compressed; the first byte chooses.
//!
//! The headers of a plain one get the checksums that they should have, or next to none would be
//! looked at.

#![no_main]

use std::io::{self, Read};
use std::path::Component;

use kernels::archive::{self, Limits, Member};
use libfuzzer_sys::fuzz_target;

const NAMES: [&str; 4] = ["data.tar", "data.tar.gz", "data.tar.xz", "data.tar.zst"];
const BLOCK: usize = 512;
const LIMITS: Limits = Limits {
    bytes: 1 << 20,
    entries: 100,
};

fuzz_target!(|data: &[u8]| {
    let Some((choice, archive)) = data.split_first() else {
        return;
    };
    let name = NAMES[usize::from(*choice) % NAMES.len()];
    let mut archive = archive.to_vec();
    if name == "data.tar" {
        archive.chunks_exact_mut(BLOCK).for_each(sign);
    }
    let Ok(tar) = archive::decoder(name, archive.as_slice()) else {
        return;
    };
    let mut total = 0;
    let mut visit = |member: &Member, contents: &mut dyn Read| {
        let inside = |part| matches!(part, Component::Normal(_));
        assert!(
            member.path.components().all(inside),
            "{:?} leads elsewhere",
            member.path
        );
        total += io::copy(contents, &mut io::sink())?;
        Ok(())
    };
    // Whichever it is: an answer.
    let _ = archive::for_each_file(tar, LIMITS, &mut visit);
    assert!(total <= LIMITS.bytes, "more came out than may");
});

/// Puts the right checksum into what may be a header (POSIX.1-2024, "ustar Interchange Format").
fn sign(block: &mut [u8]) {
    if block[257..].starts_with(b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
}
