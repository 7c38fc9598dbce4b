//! What the agent looks at of the kernel's FUSE messages (include/uapi/linux/fuse.h), which have the byte order of the
//! machine: little endian here.

/// The length of `fuse_in_header`.
pub const IN_HEADER: usize = 40;

/// The length of `fuse_out_header`, which is all of a reply that only says how it went.
pub const OUT_HEADER: usize = 16;

/// `FUSE_NOTIFY_INVAL_INODE` and `FUSE_NOTIFY_INVAL_ENTRY`.
const INVAL_INODE: i32 = 2;
const INVAL_ENTRY: i32 = 3;

/// What a request asks for: `fuse_in_header.opcode`.
pub fn opcode(request: &[u8]) -> Option<u32> {
    word(request, 4)
}

/// Which file it asks about: `fuse_in_header.nodeid`.
pub fn node(request: &[u8]) -> Option<u64> {
    number(request, 16)
}

/// The number that a reply has of its request: `fuse_in_header.unique`, `fuse_out_header.unique`.
pub fn unique(message: &[u8]) -> Option<u64> {
    number(message, 8)
}

/// The reply to a request, with `fuse_out_header.error` as given; what is behind the header is zero.
pub fn reply<const LENGTH: usize>(request: &[u8], error: i32) -> Option<[u8; LENGTH]> {
    const { assert!(LENGTH >= OUT_HEADER) };
    let unique: &[u8; 8] = request.get(8..)?.first_chunk()?;
    let mut reply = [0; LENGTH];
    reply[..4].copy_from_slice(&(LENGTH as u32).to_le_bytes());
    reply[4..8].copy_from_slice(&error.to_le_bytes());
    reply[8..OUT_HEADER].copy_from_slice(unique);
    Some(reply)
}

/// What a notification is of: `fuse_out_header.error`. Replies have an error there, which is never positive.
pub fn kind(notification: &[u8]) -> Option<i32> {
    word(notification, 4).map(u32::cast_signed)
}

/// Whose attributes and data the kernel is to forget: `fuse_notify_inval_inode_out.ino`.
pub fn invalidated(notification: &[u8]) -> Option<u64> {
    (kind(notification)? == INVAL_INODE).then(|| number(notification, OUT_HEADER))?
}

/// In which directory the kernel is to look a name up anew: `fuse_notify_inval_entry_out.parent`.
pub fn changed_directory(notification: &[u8]) -> Option<u64> {
    (kind(notification)? == INVAL_ENTRY).then(|| number(notification, OUT_HEADER))?
}

/// The u32 at an offset.
pub fn word(message: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*message.get(at..)?.first_chunk()?))
}

/// The u64 at an offset.
pub fn number(message: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*message.get(at..)?.first_chunk()?))
}
