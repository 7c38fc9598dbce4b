//! The socket of one flow of datagrams.
//!
//! It is bound to nothing and connected to nothing, so that a flow may speak with more than one
//! peer; but it only takes datagrams from those that it sent some to, as a NAT would.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recvfrom, sendto, socket_with,
    sockopt,
};

use crate::socket_option;

/// Peers that may answer: the latest.
const MAX_PEERS: usize = 32;

/// Datagrams of strangers that are thrown away before others get their turn.
const MAX_DISCARDED: usize = 64;

/// How long a flow stays after its last datagram: of one that was never answered, and of others.
/// Both are what Linux's connection tracking has.
const UNANSWERED: Duration = Duration::from_secs(30);
const ANSWERED: Duration = Duration::from_secs(120);

/// A socket in the guest for one peer of the host.
#[derive(Debug)]
pub struct Flow {
    socket: OwnedFd,
    /// It takes IPv4 addresses as mapped ones.
    is_dual: bool,
    /// Whom it sent to, the latest last.
    peers: Vec<SocketAddr>,
    /// Ports of the loopback at which 127.0.0.1 refuses.
    on_ipv6: Vec<u16>,
    is_answered: bool,
    used: Instant,
}

impl Flow {
    /// A socket for both families where the guest has both.
    pub fn new(now: Instant) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let open = |family| socket_with(family, SocketType::DGRAM, flags, None);
        let (socket, is_dual) = match open(AddressFamily::INET6) {
            Ok(socket) => {
                sockopt::set_ipv6_v6only(&socket, false)?;
                ask_for_errors(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVERR)?;
                (socket, true)
            }
            Err(Errno::AFNOSUPPORT) => (open(AddressFamily::INET)?, false),
            Err(error) => return Err(error.into()),
        };
        ask_for_errors(&socket, libc::IPPROTO_IP, libc::IP_RECVERR)?;
        Ok(Self {
            socket,
            is_dual,
            peers: Vec::new(),
            on_ipv6: Vec::new(),
            is_answered: false,
            used: now,
        })
    }

    /// When it was last used.
    pub fn used(&self) -> Instant {
        self.used
    }

    /// Whether it has been idle for too long.
    pub fn is_over(&self, now: Instant) -> bool {
        let patience = match self.is_answered {
            true => ANSWERED,
            false => UNANSWERED,
        };
        now.saturating_duration_since(self.used) > patience
    }

    /// Sends a datagram. Like any network, this loses what cannot be sent.
    pub fn send(&mut self, to: SocketAddr, payload: &[u8], now: Instant) {
        self.used = now;
        self.expect(to);
        self.send_once(to, payload);
    }

    /// Sends a datagram to a port of the guest's loopback: to 127.0.0.1, and to ::1 where that refuses.
    pub fn send_to_loopback(&mut self, port: u16, payload: &[u8], now: Instant) {
        let v4 = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let v6 = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port);
        if self.on_ipv6.contains(&port) {
            return self.send(v6, payload, now);
        }
        self.send(v4, payload, now);
        // On the loopback a refusal is there when sending comes back.
        if !self.is_answered {
            self.take_errors();
            if self.on_ipv6.contains(&port) {
                self.send(v6, payload, now);
            }
        }
    }

    fn send_once(&self, to: SocketAddr, payload: &[u8]) {
        let to = match (self.is_dual, to.ip()) {
            (true, IpAddr::V4(v4)) => SocketAddr::new(v4.to_ipv6_mapped().into(), to.port()),
            _ => to,
        };
        let send = || sendto(&self.socket, payload, SendFlags::NOSIGNAL, &to);
        // An error may be that of an earlier datagram, which says nothing about this one.
        if let Err(Errno::CONNREFUSED | Errno::INTR) = send() {
            let _ = send();
        }
    }

    /// Lets `peer` answer.
    fn expect(&mut self, peer: SocketAddr) {
        let peer = canonical(peer);
        if self.peers.last() == Some(&peer) {
            return;
        }
        self.peers.retain(|known| *known != peer);
        if self.peers.len() >= MAX_PEERS {
            self.peers.remove(0);
        }
        self.peers.push(peer);
    }

    /// Takes a datagram that arrived: how long it is, and who sent it.
    pub fn receive(&mut self, buffer: &mut [u8], now: Instant) -> Option<(usize, SocketAddr)> {
        for _ in 0..MAX_DISCARDED {
            match recvfrom(&self.socket, &mut *buffer, RecvFlags::empty()) {
                Ok((_, length, Some(from))) => {
                    let Some(from) = SocketAddr::try_from(from).ok().map(canonical) else {
                        continue;
                    };
                    if self.peers.contains(&from) {
                        self.is_answered = true;
                        self.used = now;
                        return Some((length.min(buffer.len()), from));
                    }
                }
                Ok((_, _, None)) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.take_errors();
                    return None;
                }
                // What a datagram that was sent has led to.
                Err(_) => self.take_errors(),
            }
        }
        None
    }

    /// Takes word of datagrams that did not arrive, and notes who refused them.
    fn take_errors(&mut self) {
        let mut payload = [0; 1];
        for _ in 0..MAX_DISCARDED {
            match recvfrom(&self.socket, &mut payload, RecvFlags::ERRQUEUE) {
                Ok((_, _, Some(to))) => {
                    if let Ok(to) = SocketAddr::try_from(to) {
                        self.refused(canonical(to));
                    }
                }
                Ok((_, _, None)) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    fn refused(&mut self, by: SocketAddr) {
        if by.ip() == Ipv4Addr::LOCALHOST && !self.on_ipv6.contains(&by.port()) {
            self.on_ipv6.truncate(MAX_PEERS);
            self.on_ipv6.insert(0, by.port());
        } else if by.ip() == Ipv6Addr::LOCALHOST {
            self.on_ipv6.retain(|port| *port != by.port());
        }
    }
}

impl AsFd for Flow {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// One spelling for one address: IPv4 as such, and nothing but address and port.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Has refused datagrams told of, which a socket that is not connected is not otherwise.
fn ask_for_errors(socket: &OwnedFd, level: i32, option: i32) -> io::Result<()> {
    let on: libc::c_int = 1;
    socket_option::set(socket, level, option, on)
}
