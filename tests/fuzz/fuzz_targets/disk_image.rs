//! The search for a filesystem in a disk image: superblocks and partition tables.
//!
//! The first four bytes are the image's size in 512-byte sectors, so that tables may point far. A
//! GPT gets the checksums that it should have, or next to none would be looked at.

#![no_main]

use libfuzzer_sys::fuzz_target;

/// Sectors of the largest image.
const MAX_SECTORS: u32 = 1 << 24;
const SECTOR: usize = 512;

fuzz_target!(|data: &[u8]| {
    let Some((sectors, contents)) = data.split_first_chunk() else {
        return;
    };
    let mut contents = contents.to_vec();
    // It has no table, or one that is cut off.
    let _ = sign_gpt(&mut contents);
    let image = fuzz::file_of(&contents).expect("room for an image");
    let len = u64::from(u32::from_le_bytes(*sectors) % MAX_SECTORS) * SECTOR as u64;
    image
        .set_len(len.max(contents.len() as u64))
        .expect("a sparse image");
    // Whichever it is: an answer.
    let _ = vmm::image::probe(&image);
});

/// Puts the right checksums into a GPT (UEFI 2.10, section 5.3); None where there is none.
fn sign_gpt(image: &mut [u8]) -> Option<()> {
    let header = image.get(SECTOR..2 * SECTOR)?;
    if !header.starts_with(b"EFI PART") {
        return None;
    }
    let word = |at: usize| Some(u32::from_le_bytes(*header.get(at..)?.first_chunk()?) as usize);
    let (first, count, size, len) = (word(72)?, word(80)?, word(84)?, word(12)?);
    let start = first.checked_mul(SECTOR)?;
    let end = start.checked_add(count.checked_mul(size)?)?;
    let entries = crc32fast::hash(image.get(start..end)?);
    let header = image.get_mut(SECTOR..2 * SECTOR)?;
    header[88..92].copy_from_slice(&entries.to_le_bytes());
    header[16..20].fill(0);
    let sum = crc32fast::hash(header.get(..len)?);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
    Some(())
}
