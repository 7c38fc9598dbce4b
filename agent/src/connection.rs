//! One connection to the host: a vsock stream in a machine, a Unix socket pair in the tests.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::Shutdown;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

/// A connected stream socket of any family.
#[derive(Debug)]
pub struct Connection(OwnedFd);

impl Connection {
    /// Takes over a connected, blocking stream socket.
    pub fn new(socket: impl Into<OwnedFd>) -> Self {
        Self(socket.into())
    }

    /// Bounds how long one read or write may block; None is for ever.
    pub fn set_timeouts(&self, timeout: Option<Duration>) -> io::Result<()> {
        set_socket_timeout(&self.0, Timeout::Recv, timeout)?;
        set_socket_timeout(&self.0, Timeout::Send, timeout)?;
        Ok(())
    }

    /// Tells the peer that no more bytes will come.
    pub fn end_output(&self) {
        self.shut(Shutdown::Write);
    }

    /// Tells the peer that no more bytes are read.
    pub fn end_input(&self) {
        self.shut(Shutdown::Read);
    }

    /// Ends both directions; a thread that is blocked on this connection wakes.
    pub fn hang_up(&self) {
        self.shut(Shutdown::Both);
    }

    fn shut(&self, how: Shutdown) {
        // It fails only where the peer is gone already (ENOTCONN), which is what was wanted.
        let _ = rustix::net::shutdown(&self.0, how);
    }
}

impl From<Connection> for OwnedFd {
    fn from(connection: Connection) -> Self {
        connection.0
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Read for &Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.0, buffer)?)
    }
}

impl Write for &Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(&self.0, buffer)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
