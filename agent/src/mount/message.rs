//! Numbers in the kernel's FUSE messages, which have the byte order of the machine: little endian here.

/// The u32 at an offset.
pub fn word(message: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*message.get(at..)?.first_chunk()?))
}

/// The u64 at an offset.
pub fn number(message: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*message.get(at..)?.first_chunk()?))
}
