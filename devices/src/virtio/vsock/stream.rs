//! The host end of a connection: a stream socket that data goes to and comes from without a copy.
//!
//! The epoll registration is edge-triggered, and what the last events and calls said is kept
//! here: nothing has to be disarmed when the guest gives no buffers or no credit, so a stream
//! that cannot be served now causes no wake-up at all.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::packet::GuestIoVec;

/// A stream socket (Unix or TCP) and what is known about its readiness.
#[derive(Debug)]
pub(super) struct HostStream {
    socket: OwnedFd,
    /// A read may give something.
    pub readable: bool,
    /// A write may take something.
    pub writable: bool,
    /// The far end is closed in both directions, or broken.
    pub hung_up: bool,
}

/// A direction for shutdown(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

impl HostStream {
    /// Takes `socket` over; refuses what is not a stream socket.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let kind = rustix::net::sockopt::socket_type(&socket)?;
        if kind != rustix::net::SocketType::STREAM {
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                "only stream sockets can be joined to a vsock connection",
            ));
        }
        Ok(Self {
            socket,
            readable: true,
            writable: true,
            hung_up: false,
        })
    }

    /// Reads into guest memory. `WouldBlock` and `Interrupted` are told apart by the caller;
    /// 0 is the end of the stream, unless `into` has no room.
    pub fn read(&mut self, into: &GuestIoVec<'_>) -> io::Result<usize> {
        let mut message = message(into.as_raw());
        let result = retry(|| {
            // SAFETY: `message` names `msg_iovlen` iovecs that live until the call returns; each
            // was made from a `VolatileSlice` whose guest memory stays mapped and writable for the
            // lifetime that `into` carries. No Rust reference to that memory exists. The kernel
            // checks the descriptor, which is open because `self` owns it.
            unsafe { libc::recvmsg(self.socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) }
        });
        if would_block(&result) {
            self.readable = false;
        }
        result
    }

    /// Writes guest memory; returns how many bytes the socket took.
    pub fn write_guest(&mut self, from: &GuestIoVec<'_>) -> io::Result<usize> {
        self.write(from.as_raw())
    }

    /// Writes the two parts of a backlog; returns how many bytes the socket took.
    pub fn write_parts(&mut self, parts: [&[u8]; 2]) -> io::Result<usize> {
        self.write(&parts.map(|part| libc::iovec {
            iov_base: part.as_ptr().cast_mut().cast(),
            iov_len: part.len(),
        }))
    }

    fn write(&mut self, from: &[libc::iovec]) -> io::Result<usize> {
        let message = message(from);
        let result = retry(|| {
            // SAFETY: `message` names `msg_iovlen` iovecs that live until the call returns. They
            // come from `write_guest` (guest memory that stays mapped for the lifetime of its
            // argument) or from `write_parts` (borrowed slices); sendmsg only reads them.
            unsafe {
                libc::sendmsg(
                    self.socket.as_raw_fd(),
                    &message,
                    libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                )
            }
        });
        if would_block(&result) {
            self.writable = false;
        }
        result
    }

    /// Closes one direction. A far end that is gone already is no error.
    pub fn shutdown(&self, direction: Direction) {
        let how = match direction {
            Direction::Read => rustix::net::Shutdown::Read,
            Direction::Write => rustix::net::Shutdown::Write,
        };
        if let Err(error) = rustix::net::shutdown(&self.socket, how)
            && error != rustix::io::Errno::NOTCONN
        {
            tracing::debug!("a vsock host stream refused shutdown: {error}");
        }
    }
}

impl AsRawFd for HostStream {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn message(pieces: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is plain data for which all zeroes is a valid value (no name, no control).
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_ptr().cast_mut();
    message.msg_iovlen = pieces.len();
    message
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn would_block(result: &io::Result<usize>) -> bool {
    matches!(result, Err(error) if error.kind() == ErrorKind::WouldBlock)
}
