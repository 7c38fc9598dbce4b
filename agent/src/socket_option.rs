//! Socket options that no crate here has a safe call for.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Sets a socket's option, whose value has the layout that the kernel expects at this level (setsockopt(2)).
pub fn set<T: Copy>(
    socket: impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: T,
) -> io::Result<()> {
    let socket = socket.as_fd().as_raw_fd();
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value outlives the call, which is told its size and only reads it.
    match unsafe { libc::setsockopt(socket, level, option, (&raw const value).cast(), length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// From now on, whoever waits for `socket` with poll(2) or epoll(7) is woken when so many bytes are there, or it has
/// ended; what is there already is told of no more.
pub fn wake_at(socket: impl AsFd, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    set(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, bytes)
}
