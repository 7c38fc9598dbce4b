//! Fewer wake-ups on the way of a message: how much the host may send at once, at how much of it a thread is
//! woken, and how much the kernel asks for that reads a file from its beginning to its end.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::connection::Connection;

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
        let _ = set(connection, libc::AF_VSOCK, option, &WINDOW);
    }
}

/// From now on, whoever waits for `connection` with poll(2) is woken when so many bytes are there, or it has ended.
pub fn wake_at(connection: &Connection, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    set(connection, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &bytes)
}

fn set<T>(
    connection: &Connection,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0);
    let socket = connection.as_fd().as_raw_fd();
    let value: *const T = value;
    // SAFETY: the value outlives the call, which is told its size.
    match unsafe { libc::setsockopt(socket, level, option, value.cast(), length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
