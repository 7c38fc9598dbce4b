//! Connecting to something in the guest, without waiting for it.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use agent::protocol::DialError;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

/// A connection on its way: addresses are tried one after the other.
#[derive(Debug)]
pub struct Dialing {
    /// Addresses still to try.
    addresses: VecDeque<SocketAddr>,
    /// The attempt that is under way.
    attempt: Option<(SocketAddr, OwnedFd)>,
    /// Why the best attempt so far failed.
    failure: Option<DialError>,
}

/// Where dialing stands.
#[derive(Debug)]
pub enum Dialed {
    /// Connected.
    Connected(OwnedFd),
    /// A new socket is connecting: its next event tells more.
    Waiting,
    /// No address could be connected to.
    Failed(DialError),
}

/// Both addresses of the guest's loopback.
pub fn loopback(port: u16) -> [SocketAddr; 2] {
    [
        SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port),
        SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port),
    ]
}

impl Dialing {
    /// To the first of `addresses` that can be connected to.
    pub fn new(addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self {
            addresses: addresses.into_iter().collect(),
            attempt: None,
            failure: None,
        }
    }

    /// Goes on: looks at the attempt that is under way, and starts the next where it failed.
    ///
    /// `watch` is called with each new socket before it connects.
    pub fn proceed(&mut self, mut watch: impl FnMut(&OwnedFd) -> io::Result<()>) -> Dialed {
        loop {
            let (address, socket) = match self.attempt.take() {
                Some(attempt) => attempt,
                None => match self.next_attempt(&mut watch) {
                    Some(attempt) => attempt,
                    None => {
                        return Dialed::Failed(
                            self.failure.take().unwrap_or(DialError::NoSuchHost),
                        );
                    }
                },
            };
            // Connecting once more is how to ask: an event may be stale, and says nothing.
            match connect(&socket, &address) {
                Ok(()) | Err(Errno::ISCONN) => return Dialed::Connected(socket),
                Err(Errno::INPROGRESS | Errno::ALREADY) => {
                    self.attempt = Some((address, socket));
                    return Dialed::Waiting;
                }
                Err(Errno::INTR) => self.attempt = Some((address, socket)),
                Err(error) => self.failed(error),
            }
        }
    }

    fn next_attempt(
        &mut self,
        watch: &mut impl FnMut(&OwnedFd) -> io::Result<()>,
    ) -> Option<(SocketAddr, OwnedFd)> {
        while let Some(address) = self.addresses.pop_front() {
            let socket = stream_socket(&address).map_err(io::Error::from);
            match socket.and_then(|socket| watch(&socket).map(|()| socket)) {
                Ok(socket) => return Some((address, socket)),
                Err(error) => {
                    self.failed(Errno::from_io_error(&error).unwrap_or(Errno::NOMEM));
                }
            }
        }
        None
    }

    /// A refusal says more than that another family has no route.
    fn failed(&mut self, error: Errno) {
        if self.failure != Some(DialError::Refused) {
            self.failure = Some(dial_error(error));
        }
    }
}

fn stream_socket(address: &SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = match address.ip() {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    // Bytes come as their sender wrote them; to wait for more of them is the sender's decision.
    sockopt::set_tcp_nodelay(&socket, true)?;
    Ok(socket)
}

/// What the host is told of a failed connection.
pub fn dial_error(error: Errno) -> DialError {
    match error {
        Errno::CONNREFUSED => DialError::Refused,
        Errno::TIMEDOUT => DialError::TimedOut,
        Errno::NETUNREACH
        | Errno::HOSTUNREACH
        | Errno::NETDOWN
        | Errno::HOSTDOWN
        | Errno::ADDRNOTAVAIL
        | Errno::AFNOSUPPORT => DialError::Unreachable,
        error => DialError::Other(format!(
            "the guest could not connect: {}",
            io::Error::from(error)
        )),
    }
}
