//! The listening TCP sockets of this network namespace: asked of the kernel over netlink (`sock_diag(7)`),
//! or read from `/proc` where it was built or loaded without that.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use agent::protocol::Listener;
use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{bind, recv, sendto, socket_with};

/// `NLMSG_ERROR`, `NLMSG_DONE`, `SOCK_DIAG_BY_FAMILY`.
const ERROR: u16 = 2;
const DONE: u16 = 3;
const BY_FAMILY: u16 = 20;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP: u16 = 0x301;
/// `SKNLGRP_INET_TCP_DESTROY` and `SKNLGRP_INET6_TCP_DESTROY` as a set.
const DESTROYED: u32 = 1 | 1 << 2;
/// The state of a TCP socket that listens.
const LISTEN: u32 = 10;

const NETLINK_HEADER: usize = 16;
/// `struct inet_diag_msg`.
const DIAG_MESSAGE: usize = 72;
/// The kernel sends no longer datagrams in a dump than what it is given room for, up to this.
const BUFFER: usize = 32 << 10;

/// The kernel answers at once; this only keeps a surprise from becoming a hang.
const TIMEOUT: Duration = Duration::from_secs(1);

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
        let socket = netlink(SocketFlags::CLOEXEC, 0);
        let asked = socket.map_err(io::Error::from).and_then(|socket| {
            set_socket_timeout(&socket, Timeout::Recv, Some(TIMEOUT))?;
            dump(&socket, AddressFamily::INET, &mut Vec::new())?;
            Ok(socket)
        });
        asked.map_or(Self::Proc, Self::Netlink)
    }

    /// All listening sockets, in no order.
    pub fn list(&self) -> io::Result<Vec<Entry>> {
        let mut found = Vec::new();
        match self {
            Self::Netlink(socket) => {
                dump(socket, AddressFamily::INET, &mut found)?;
                dump(socket, AddressFamily::INET6, &mut found)?;
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
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(netlink(flags, DESTROYED)?)
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

fn netlink(flags: SocketFlags, groups: u32) -> rustix::io::Result<OwnedFd> {
    let protocol = Some(netlink::SOCK_DIAG);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol)?;
    bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

fn dump(socket: &OwnedFd, family: AddressFamily, found: &mut Vec<Entry>) -> io::Result<()> {
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(socket, &request(family), SendFlags::empty(), &kernel)?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = match recv(socket, &mut buffer[..], RecvFlags::empty()) {
            Ok((_, length)) => length,
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        for (kind, body) in messages(buffer.get(..length).unwrap_or_default()) {
            match kind {
                BY_FAMILY => found.extend(in_message(body)),
                // Both carry an error number, which is 0 where there is none.
                DONE | ERROR => match number(body, 0) {
                    Some(0) | None => return Ok(()),
                    Some(error) => {
                        let error = (error as i32).wrapping_neg();
                        return Err(io::Error::from_raw_os_error(error));
                    }
                },
                _ => {}
            }
        }
    }
}

/// Asks for all TCP sockets of `family` that listen.
fn request(family: AddressFamily) -> Vec<u8> {
    // `struct inet_diag_req_v2`, whose socket identity stays zero: any.
    let mut body = vec![0; 56];
    let family = u8::try_from(family.as_raw()).unwrap_or_default();
    body.splice(..2, [family, libc::IPPROTO_TCP as u8]);
    body.splice(4..8, (1u32 << LISTEN).to_ne_bytes());
    let length = (NETLINK_HEADER + body.len()) as u32;
    let mut request = Vec::new();
    request.extend_from_slice(&length.to_ne_bytes());
    request.extend_from_slice(&BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&DUMP.to_ne_bytes());
    // Its number and our address, which the kernel fills in.
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(&body);
    request
}

/// The messages of a datagram: type and body.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = number(datagram, 0)? as usize;
        let kind = u16::from_ne_bytes(*datagram.get(4..)?.first_chunk()?);
        let body = datagram.get(NETLINK_HEADER..length)?;
        datagram = datagram
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
        Some((kind, body))
    })
}

/// Reads a `struct inet_diag_msg`.
fn in_message(body: &[u8]) -> Option<Entry> {
    let message = body.get(..DIAG_MESSAGE)?;
    let source = message.get(8..24)?;
    let address = match i32::from(*message.first()?) {
        libc::AF_INET => IpAddr::from(*source.first_chunk::<4>()?),
        libc::AF_INET6 => IpAddr::from(*source.first_chunk::<16>()?).to_canonical(),
        _ => return None,
    };
    let listener = Listener {
        port: u16::from_be_bytes(*message.get(4..)?.first_chunk()?),
        address,
        uid: number(message, 64)?,
    };
    Some((listener, number(message, 68)?.into()))
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

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::fd::AsFd;

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
    fn what_the_kernel_would_never_say_is_passed_over() {
        assert_eq!(messages(&[]).count(), 0);
        // A length of less than a header, and one of more than there is.
        for length in [0u32, 15, 17, u32::MAX] {
            let mut datagram = length.to_ne_bytes().to_vec();
            datagram.resize(16, 0);
            assert_eq!(messages(&datagram).count(), 0, "{length}");
        }
        assert_eq!(in_message(&[libc::AF_INET as u8; DIAG_MESSAGE - 1]), None);
        assert_eq!(in_message(&[0; DIAG_MESSAGE]), None);
        for line in ["", "  sl  local_address", "0: \u{e4}:1 x 0A 0 0 0 0 0 0"] {
            assert_eq!(in_proc(line), None, "{line}");
        }
    }
}
