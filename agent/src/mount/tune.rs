//! Fewer wake-ups on the way of a message: how much the host may send at once, and how much the kernel asks for that
//! reads a file from its beginning to its end.

use std::fs;

use crate::connection::Connection;
use crate::socket_option;

/// What the host may send before it has to wait for the guest: the longest message, and the next one's beginning.
const WINDOW: u64 = (1 << 20) + (128 << 10);

/// Of the kernel's include/uapi/linux/vm_sockets.h.
const SO_VM_SOCKETS_BUFFER_SIZE: libc::c_int = 0;
const SO_VM_SOCKETS_BUFFER_MAX_SIZE: libc::c_int = 2;

/// How much the kernel reads ahead: as much as one message holds, where it would be an eighth of that.
const READ_AHEAD_KIB: u32 = 1024;

/// Lets the kernel read ahead on the filesystem with this number, as [`device_of`](super::attach::device_of) has it.
pub fn read_ahead(device: u64) {
    let (major, minor) = (device >> 20, device & 0xf_ffff);
    let file = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    // Only speed depends on it.
    let _ = fs::write(file, READ_AHEAD_KIB.to_string());
}

/// Lets the host send long messages in one go, where the connection is one over vsock.
pub fn widen(connection: &Connection) {
    for option in [SO_VM_SOCKETS_BUFFER_MAX_SIZE, SO_VM_SOCKETS_BUFFER_SIZE] {
        // Only speed depends on it.
        let _ = socket_option::set(connection, libc::AF_VSOCK, option, WINDOW);
    }
}
