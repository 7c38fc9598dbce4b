//! A bzImage's header, its payload in all compressions, and the ELF file that comes out.
//!
//! Where the input is no bzImage it is taken for the payload of one.

#![no_main]

use kernels::bzimage::SetupHeader;
use kernels::{elf, payload};
use libfuzzer_sys::fuzz_target;

/// Bytes that may come out.
const LIMIT: u64 = 1 << 20;

/// A sector of the boot code, of which there are two.
const SECTOR: usize = 512;

fuzz_target!(|data: &[u8]| {
    let _ = elf::check_kernel_in(data, data.len() as u64);
    let _ = elf::kernel_release(data);
    let image = match SetupHeader::is_present(data) {
        true => data.to_vec(),
        false => wrap(data),
    };
    // Whichever it is: an answer.
    if let Ok(kernel) = payload::unpack(&image, LIMIT) {
        assert!(kernel.len() as u64 <= LIMIT, "more came out than may");
        let _ = elf::check_kernel_in(kernel.as_slice(), kernel.len() as u64);
    }
});

/// A bzImage around `payload` (Linux, "The Linux/x86 Boot Protocol").
fn wrap(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 2 * SECTOR];
    image.extend_from_slice(payload);
    image.resize(image.len().next_multiple_of(16), 0);
    let paragraphs = (image.len() - 2 * SECTOR) as u32 / 16;
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x1f1, &[1]); // setup_sects
    set(0x1f4, &paragraphs.to_le_bytes()); // syssize
    set(0x1fe, &0xaa55u16.to_le_bytes()); // boot_flag
    set(0x202, b"HdrS"); // header
    set(0x206, &0x020fu16.to_le_bytes()); // version
    set(0x236, &1u16.to_le_bytes()); // xloadflags: XLF_KERNEL_64
    set(0x24c, &(payload.len() as u32).to_le_bytes()); // payload_length; payload_offset is 0
    image
}
