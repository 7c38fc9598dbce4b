//! The host end of a connection: a stream socket that data goes to and comes from without a copy.
//!
//! The epoll registration is edge-triggered, and what the last events and calls said is kept
//! here: nothing has to be disarmed when the guest gives no buffers or no credit, so a stream
//! that cannot be served now causes no wake-up at all.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketType, sockopt};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::EventSet;

use super::packet::GuestIoVec;

/// Pieces of guest memory that one write takes: more than Linux makes of a packet.
const WRITE_PIECES: usize = 32;

const EMPTY: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// What a stream is watched for, once: each is told when it comes true, and not again.
pub(super) const WATCHED: EventSet = EventSet::IN
    .union(EventSet::READ_HANG_UP)
    .union(EventSet::PRIORITY)
    .union(EventSet::EDGE_TRIGGERED);

/// What one is watched for from when it was full for the first time. Before, whatever its reader takes would
/// wake up this thread.
pub(super) const WATCHED_FOR_ROOM: EventSet = WATCHED.union(EventSet::OUT);

/// A stream socket (TCP, Unix or AF_VSOCK) and what is known about its readiness.
#[derive(Debug)]
pub(super) struct HostStream {
    socket: OwnedFd,
    /// What is read before anything that the socket gives.
    prelude: Prelude,
    /// A read may give something.
    pub readable: bool,
    /// A write may take something.
    pub writable: bool,
    /// The far end is closed in both directions, or broken. What it had sent may be unread.
    pub hung_up: bool,
    /// Whether it is [`WATCHED_FOR_ROOM`].
    watched_for_room: bool,
    /// A read that gives less than there was room for has emptied the socket, and the next event
    /// tells of more. Not so where there is urgent data, and at the end of the stream, which has to be read too.
    short_read_empties: bool,
    /// Closing the socket resets it, until the guest has ended in order.
    resets: bool,
    family: AddressFamily,
}

/// Bytes that precede a stream's own.
#[derive(Debug, Default)]
struct Prelude {
    bytes: Box<[u8]>,
    read: usize,
}

impl Prelude {
    fn rest(&self) -> &[u8] {
        self.bytes.get(self.read..).unwrap_or(&[])
    }

    fn consume(&mut self, count: usize) {
        self.read += count;
        if self.rest().is_empty() {
            *self = Self::default();
        }
    }
}

impl HostStream {
    /// Takes `socket` over; refuses what is not a stream socket.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        if sockopt::socket_type(&socket)? != SocketType::STREAM {
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                "only stream sockets can be joined to a vsock connection",
            ));
        }
        let family = sockopt::socket_domain(&socket)?;
        if matches!(family, AddressFamily::INET | AddressFamily::INET6)
            // The guest decided what makes a packet; waiting for more would only add delay.
            && let Err(error) = sockopt::set_tcp_nodelay(&socket, true)
        {
            tracing::debug!("a vsock host stream may be slow with small writes: {error}");
        }
        Ok(Self {
            socket,
            prelude: Prelude::default(),
            readable: true,
            writable: true,
            hung_up: false,
            watched_for_room: false,
            short_read_empties: true,
            resets: false,
            family,
        })
    }

    /// As [`HostStream::new`], with bytes that are read first; the socket is reset when it is
    /// closed, until [`HostStream::end_write`].
    pub fn abortive(socket: OwnedFd, prelude: Vec<u8>) -> io::Result<Self> {
        reset_on_close(&socket)?;
        let mut stream = Self::new(socket)?;
        stream.prelude.bytes = prelude.into_boxed_slice();
        stream.resets = true;
        Ok(stream)
    }

    /// Has what another stream was to give first, and did not yet, come before its own.
    pub fn take_prelude(&mut self, from: &mut Self) {
        let rest = std::mem::take(&mut from.prelude);
        if !rest.rest().is_empty() {
            let bytes = [rest.rest(), self.prelude.rest()].concat();
            self.prelude = Prelude {
                bytes: bytes.into_boxed_slice(),
                read: 0,
            };
        }
    }

    /// Whether closing the stream now is a reset for its far end.
    pub fn resets(&self) -> bool {
        self.resets
    }

    /// Takes over what an event says.
    pub fn note(&mut self, events: EventSet) {
        self.hung_up |= events.intersects(EventSet::HANG_UP | EventSet::ERROR)
            || events.contains(EventSet::READ_HANG_UP) && self.is_abandoned();
        self.readable |= self.hung_up || events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        self.writable |= events.contains(EventSet::OUT);
        self.short_read_empties &=
            !self.hung_up && !events.intersects(EventSet::READ_HANG_UP | EventSet::PRIORITY);
    }

    /// Whether the far end of an AF_VSOCK stream takes nothing any more: poll does not say that,
    /// as long as our end is not shut down itself.
    fn is_abandoned(&self) -> bool {
        self.family == AddressFamily::VSOCK
            && rustix::net::send(&self.socket, &[], SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
                .is_err_and(|error| error != rustix::io::Errno::AGAIN)
    }

    /// Whether the stream is full and has to be [`WATCHED_FOR_ROOM`] from now on; says so once.
    pub fn begins_to_wait_for_room(&mut self) -> bool {
        !self.writable && !std::mem::replace(&mut self.watched_for_room, true)
    }

    /// Reads into guest memory. `WouldBlock` and `Interrupted` are told apart by the caller;
    /// 0 is the end of the stream, unless `into` has no room.
    pub fn read(&mut self, into: &GuestIoVec<'_>) -> io::Result<usize> {
        if !self.prelude.rest().is_empty() {
            let copied = copy(self.prelude.rest(), into);
            self.prelude.consume(copied);
            return Ok(copied);
        }
        let mut message = message(into.as_raw());
        let result = retry(|| {
            // SAFETY: `message` names `msg_iovlen` iovecs that live until the call returns; each
            // was made from a `VolatileSlice` whose guest memory stays mapped and writable for the
            // lifetime that `into` carries. No Rust reference to that memory exists. The kernel
            // checks the descriptor, which is open because `self` owns it.
            unsafe { libc::recvmsg(self.socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) }
        });
        let emptied = match &result {
            // On Unix sockets, a message with descriptors ends a read too.
            Ok(bytes) => {
                self.short_read_empties
                    && message.msg_flags & libc::MSG_CTRUNC == 0
                    && (1..into.len()).contains(bytes)
            }
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        };
        if emptied {
            self.readable = false;
        }
        result
    }

    /// Writes guest memory; returns how many bytes the socket took.
    pub fn write_guest(&mut self, from: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let mut taken = 0;
        for pieces in from.chunks(WRITE_PIECES) {
            let mut iovecs = [EMPTY; WRITE_PIECES];
            let mut len = 0;
            for (iovec, piece) in iovecs.iter_mut().zip(pieces) {
                iovec.iov_base = piece.ptr_guard().as_ptr().cast_mut().cast();
                iovec.iov_len = piece.len();
                len += piece.len();
            }
            let bytes = match self.write(&iovecs[..pieces.len()]) {
                Ok(bytes) => bytes,
                Err(_) if taken > 0 => break,
                Err(error) => return Err(error),
            };
            taken += bytes;
            if bytes < len {
                break;
            }
        }
        Ok(taken)
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
        let is_full = match &result {
            Ok(bytes) => *bytes < from.iter().map(|piece| piece.iov_len).sum(),
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        };
        if is_full {
            self.writable = false;
        }
        result
    }

    /// Reads no more.
    pub fn end_read(&self) {
        self.shutdown(Shutdown::Read);
    }

    /// Passes on the end of what is written: from here on, closing the socket is no reset.
    pub fn end_write(&mut self) {
        self.shutdown(Shutdown::Write);
        if std::mem::take(&mut self.resets)
            && let Err(error) = sockopt::set_socket_linger(&self.socket, None)
        {
            tracing::debug!("a vsock host stream will be reset though it ended: {error}");
        }
    }

    /// Closes one direction. A far end that is gone already is no error.
    fn shutdown(&self, how: Shutdown) {
        if let Err(error) = rustix::net::shutdown(&self.socket, how)
            && error != rustix::io::Errno::NOTCONN
        {
            tracing::debug!("a vsock host stream refused shutdown: {error}");
        }
    }
}

/// Makes the close of `socket` a reset where it is TCP. For Unix and AF_VSOCK streams a close
/// without shutdown before it says the same; the option means nothing to them.
pub(super) fn reset_on_close(socket: &OwnedFd) -> io::Result<()> {
    Ok(sockopt::set_socket_linger(socket, Some(Duration::ZERO))?)
}

/// Copies as much of `bytes` as there is room for.
fn copy(bytes: &[u8], into: &GuestIoVec<'_>) -> usize {
    let mut copied = 0;
    for piece in into.as_raw() {
        // SAFETY: the piece was made from a `VolatileSlice` whose guest memory stays mapped and
        // writable for the lifetime that `into` carries.
        let room = unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) };
        let rest = bytes.get(copied..).unwrap_or(&[]);
        room.copy_from(rest);
        copied += rest.len().min(piece.iov_len);
    }
    copied
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
