//! TCP sockets that have a port and neither listen nor are connected, which `/proc` does not show: other
//! machines' published ports are such while nobody listens in their guests. The kernel tells of them over
//! netlink (`sock_diag(7)`), as of Linux 6.8.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

use super::Socket;

/// `NLMSG_ERROR`, `NLMSG_DONE`, `SOCK_DIAG_BY_FAMILY`.
const ERROR: u16 = 2;
const DONE: u16 = 3;
const BY_FAMILY: u16 = 20;

/// `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP: u16 = 0x301;

/// `IPPROTO_TCP`.
const TCP: u8 = 6;

/// `TCP_BOUND_INACTIVE` of linux/tcp_states.h, which older kernels have no sockets in.
const BOUND_INACTIVE: u32 = 13;

const NETLINK_HEADER: usize = 16;

/// More than the kernel puts into one datagram of a dump.
const BUFFER: usize = 64 << 10;

/// The kernel answers at once; this only keeps a surprise from becoming a hang.
const TIMEOUT: Duration = Duration::from_secs(1);

/// All of them, of both families.
pub fn sockets() -> io::Result<Vec<Socket>> {
    let diag = Some(netlink::SOCK_DIAG);
    let kind = SocketType::DGRAM;
    let socket = socket_with(AddressFamily::NETLINK, kind, SocketFlags::CLOEXEC, diag)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(TIMEOUT))?;
    let mut found = Vec::new();
    for family in [AddressFamily::INET, AddressFamily::INET6] {
        dump(&socket, family, &mut found)?;
    }
    Ok(found)
}

fn dump(socket: &OwnedFd, family: AddressFamily, found: &mut Vec<Socket>) -> io::Result<()> {
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(socket, &request(family), SendFlags::empty(), &kernel)?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let (_, len) = recv(socket, &mut buffer[..], RecvFlags::empty())?;
        for (kind, body) in messages(buffer.get(..len).unwrap_or_default()) {
            match kind {
                BY_FAMILY => found.extend(parse(body)),
                // What is not there is not found; it only makes a sentence say less.
                DONE | ERROR => return Ok(()),
                _ => {}
            }
        }
    }
}

fn request(family: AddressFamily) -> Vec<u8> {
    // `struct inet_diag_req_v2`, whose socket identity stays zero: any.
    let mut body = [0; 56];
    body[0] = u8::try_from(family.as_raw()).unwrap_or_default();
    body[1] = TCP;
    body[4..8].copy_from_slice(&(1u32 << BOUND_INACTIVE).to_ne_bytes());
    let len = (NETLINK_HEADER + body.len()) as u32;
    let mut request = Vec::with_capacity(NETLINK_HEADER + body.len());
    request.extend_from_slice(&len.to_ne_bytes());
    request.extend_from_slice(&BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&DUMP.to_ne_bytes());
    // A number of ours, and our address, which the kernel knows.
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(&body);
    request
}

/// The messages of a datagram: type and body.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = number(datagram, 0)? as usize;
        let kind = u16::from_ne_bytes(*datagram.get(4..)?.first_chunk()?);
        let body = datagram.get(NETLINK_HEADER..len)?;
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// Reads a `struct inet_diag_msg`.
fn parse(body: &[u8]) -> Option<Socket> {
    let source = body.get(8..24)?;
    let family = u16::from(*body.first()?);
    let ip = match AddressFamily::from_raw(family) {
        AddressFamily::INET => IpAddr::from(*source.first_chunk::<4>()?),
        AddressFamily::INET6 => IpAddr::from(*source.first_chunk::<16>()?),
        _ => return None,
    };
    let port = u16::from_be_bytes(*body.get(4..)?.first_chunk()?);
    Some(Socket {
        local: SocketAddr::new(ip, port),
        uid: number(body, 64)?,
        inode: number(body, 68)?.into(),
    })
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_answer_makes_it_panic_or_go_on_for_ever() {
        let mut message = vec![0xff; 100];
        for len in [0u32, 1, 15, 16, 17, 72, 88, 100, 101, u32::MAX] {
            message[..4].copy_from_slice(&len.to_ne_bytes());
            for (_, body) in messages(&message).take(1000) {
                assert_eq!(parse(body), None, "a family that is none");
            }
        }
    }
}
