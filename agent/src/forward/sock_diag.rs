//! The listening TCP sockets of this network namespace: asked of the kernel over netlink (`sock_diag(7)`),
//! or read from `/proc` where it was built or loaded without that.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use agent::protocol::Listener;
use agent::sock_diag::{self, LISTEN, messages};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, recv};

/// `SKNLGRP_INET_TCP_DESTROY` and `SKNLGRP_INET6_TCP_DESTROY` as a set.
const DESTROYED: u32 = 1 | 1 << 2;

/// A listening socket, and the inode by which its owner knows it.
pub type Entry = (Listener, u64);

/// Where listening sockets are looked up.
#[derive(Debug)]
pub enum Source {
    /// The kernel, asked over this socket.
    Netlink(OwnedFd),
    /// `/proc/net/tcp` and `/proc/net/tcp6`.
    Proc,
}

impl Source {
    /// The best source that this kernel has.
    pub fn new() -> Self {
        let asked = sock_diag::open(SocketFlags::empty(), 0)
            .map_err(io::Error::from)
            .and_then(|socket| {
                sock_diag::list(&socket, AddressFamily::INET, LISTEN)?;
                Ok(socket)
            });
        asked.map_or(Self::Proc, Self::Netlink)
    }

    /// All listening sockets, in no order.
    pub fn list(&self) -> io::Result<Vec<Entry>> {
        let mut found = Vec::new();
        match self {
            Self::Netlink(socket) => {
                found.extend(over_netlink(socket, AddressFamily::INET)?);
                found.extend(over_netlink(socket, AddressFamily::INET6)?);
            }
            Self::Proc => {
                found.extend(
                    fs::read_to_string("/proc/net/tcp")?
                        .lines()
                        .filter_map(in_proc),
                );
                // A kernel without IPv6 has no such file.
                if let Ok(text) = fs::read_to_string("/proc/net/tcp6") {
                    found.extend(text.lines().filter_map(in_proc));
                }
            }
        }
        Ok(found)
    }
}

/// A non-blocking socket at which the kernel tells of TCP sockets that were destroyed.
pub fn destroyed() -> io::Result<OwnedFd> {
    Ok(sock_diag::open(SocketFlags::NONBLOCK, DESTROYED)?)
}

/// Takes what the kernel told; whether a socket that listened may have been among it.
pub fn listener_destroyed(socket: &OwnedFd) -> bool {
    let mut buffer = [0; 1024];
    let mut destroyed = false;
    loop {
        match recv(socket, &mut buffer, RecvFlags::empty()) {
            Ok((_, length)) => {
                let datagram = buffer.get(..length).unwrap_or_default();
                destroyed |= has_listener(datagram);
            }
            Err(Errno::INTR) => {}
            // More happened than there was room to tell.
            Err(Errno::NOBUFS) => destroyed = true,
            Err(_) => return destroyed,
        }
    }
}

/// Whether a socket that is told of listened: it has no port on another side.
fn has_listener(datagram: &[u8]) -> bool {
    let mut ports = messages(datagram).filter_map(|(_, body)| body.get(6..8));
    ports.any(|port| port == [0, 0])
}

fn over_netlink(
    socket: &OwnedFd,
    family: AddressFamily,
) -> io::Result<impl Iterator<Item = Entry>> {
    let sockets = sock_diag::list(socket, family, LISTEN)?;
    Ok(sockets.into_iter().map(|socket| {
        let listener = Listener {
            port: socket.local.port(),
            address: socket.local.ip().to_canonical(),
            uid: socket.uid,
        };
        (listener, socket.inode)
    }))
}

/// Reads a line of `/proc/net/tcp` or `/proc/net/tcp6`.
fn in_proc(line: &str) -> Option<Entry> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    if u32::from_str_radix(words.get(3)?, 16).ok()? != LISTEN {
        return None;
    }
    let (address, port) = words.get(1)?.split_once(':')?;
    // Words of 32 bits, each printed as a number of this machine.
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok();
    let address = match address.len() {
        8 => IpAddr::from(Ipv4Addr::from(word(0)?.to_ne_bytes())),
        32 => {
            let mut bytes = [0; 16];
            for (index, place) in bytes.chunks_mut(4).enumerate() {
                place.copy_from_slice(&word(index * 8)?.to_ne_bytes());
            }
            IpAddr::from(Ipv6Addr::from(bytes)).to_canonical()
        }
        _ => return None,
    };
    let listener = Listener {
        port: u16::from_str_radix(port, 16).ok()?,
        address,
        uid: words.get(7)?.parse().ok()?,
    };
    Some((listener, words.get(9)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::fd::AsFd;
    use std::time::Duration;

    fn inode(socket: impl AsFd) -> u64 {
        rustix::fs::fstat(socket).unwrap().st_ino
    }

    fn find(source: &Source, listener: &TcpListener) -> Option<Listener> {
        let inode = inode(listener);
        let list = source.list().unwrap();
        let entry = list.into_iter().find(|(_, of)| *of == inode);
        entry.map(|(listener, _)| listener)
    }

    #[test]
    fn listening_sockets_are_found_over_netlink_and_in_proc_alike() {
        let uid = rustix::process::getuid().as_raw();
        let sources = [Source::new(), Source::Proc];
        for address in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                continue;
            };
            let bound = listener.local_addr().unwrap();
            let expected = Listener {
                port: bound.port(),
                address: bound.ip(),
                uid,
            };
            for source in &sources {
                assert_eq!(
                    find(source, &listener),
                    Some(expected.clone()),
                    "{source:?}"
                );
            }
        }
    }

    #[test]
    fn hundreds_of_listening_sockets_are_all_there() {
        let source = Source::new();
        let listeners: Vec<_> = (0..300)
            .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let list = source.list().unwrap();
        for listener in &listeners {
            let inode = inode(listener);
            assert!(list.iter().any(|(_, of)| *of == inode));
        }
    }

    #[test]
    fn the_end_of_a_listening_socket_is_told_and_that_of_a_connection_is_not_taken_for_one() {
        let socket = destroyed().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let message = |port: [u8; 2]| {
            let mut datagram = 88u32.to_ne_bytes().to_vec();
            datagram.resize(16, 0);
            datagram.resize(88, 0);
            datagram.splice(22..24, port);
            datagram
        };
        assert!(has_listener(&message([0, 0])));
        assert!(!has_listener(&message([0x1f, 0x90])));
        assert!(!has_listener(&[]));
        drop(listener);
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while !listener_destroyed(&socket) {
            assert!(std::time::Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn lines_that_are_none_are_passed_over() {
        for line in ["", "  sl  local_address", "0: \u{e4}:1 x 0A 0 0 0 0 0 0"] {
            assert_eq!(in_proc(line), None, "{line}");
        }
    }
}
