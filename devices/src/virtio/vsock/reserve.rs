//! Connections to the guest that are made before there is anybody to use them, so that whoever comes
//! does not wait for the guest's answer.

use std::fmt;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, recv};

use super::mux::table::Key;

/// A connection to a port of the guest that is nobody's yet ([`super::VsockHandle::reserve`]). The guest
/// has accepted it and may close it at any time; dropping it resets it.
pub struct Reserved {
    pub(super) key: Key,
    /// What the guest is sent first.
    pub(super) prelude: Vec<u8>,
    /// The far end of the stream that the connection has until it gets its own.
    pub(super) near: UnixStream,
}

impl Reserved {
    /// Whether the guest has kept it open so far.
    pub fn is_open(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let peeked = recv(&self.near, &mut [0; 1], flags);
        peeked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }
}

impl fmt::Debug for Reserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reserved")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}
