//! The TCP sockets of this network namespace, asked of the kernel over netlink (`sock_diag(7)`): the agent looks
//! for what listens in the guest, and the host for who has a port already.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{bind, recv, sendto, socket_with};

/// The state of a socket that listens, of linux/tcp_states.h.
pub const LISTEN: u32 = 10;

/// The state of one that has a port and neither listens nor is connected; older kernels than 6.8 tell of none.
pub const BOUND_INACTIVE: u32 = 13;

/// `NLMSG_ERROR`, `NLMSG_DONE`, `SOCK_DIAG_BY_FAMILY`.
const ERROR: u16 = 2;
const DONE: u16 = 3;
const BY_FAMILY: u16 = 20;

/// `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP: u16 = 0x301;

const NETLINK_HEADER: usize = 16;

/// `struct inet_diag_msg`.
const DIAG_MESSAGE: usize = 72;

/// The kernel sends no longer datagrams in a dump than what it is given room for, up to this.
const BUFFER: usize = 32 << 10;

/// The kernel answers at once; this only keeps a surprise from becoming a hang.
const TIMEOUT: Duration = Duration::from_secs(1);

/// A TCP socket of this namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    /// The address and port that it has.
    pub local: SocketAddr,
    /// The user who made it.
    pub uid: u32,
    /// The inode by which its owner knows it.
    pub inode: u64,
}

/// A socket for questions to the kernel, at which it tells of what happens to `groups` besides.
///
/// # Errors
/// Those of socket(2); `EPROTONOSUPPORT` where the kernel has no `sock_diag`.
pub fn open(flags: SocketFlags, groups: u32) -> rustix::io::Result<OwnedFd> {
    let (kind, protocol) = (SocketType::DGRAM, Some(netlink::SOCK_DIAG));
    let flags = flags | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::NETLINK, kind, flags, protocol)?;
    bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(TIMEOUT))?;
    Ok(socket)
}

/// All TCP sockets of `family` that are in `state`, in no order. `socket` is one of [`open`]'s, without groups.
///
/// # Errors
/// What the kernel says where it cannot tell.
pub fn list(socket: &OwnedFd, family: AddressFamily, state: u32) -> io::Result<Vec<Socket>> {
    let kernel = SocketAddrNetlink::new(0, 0);
    let request = request(family, state);
    sendto(socket, &request, SendFlags::empty(), &kernel)?;
    let mut found = Vec::new();
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = match recv(socket, &mut buffer[..], RecvFlags::empty()) {
            Ok((_, length)) => length,
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        for (kind, body) in messages(buffer.get(..length).unwrap_or_default()) {
            match kind {
                BY_FAMILY => found.extend(parse(body)),
                // Both carry an error number, which is 0 where there is none.
                DONE | ERROR => match number(body, 0) {
                    Some(0) | None => return Ok(found),
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

fn request(family: AddressFamily, state: u32) -> Vec<u8> {
    // `struct inet_diag_req_v2`, whose socket identity stays zero: any.
    let mut body = [0; 56];
    body[0] = u8::try_from(family.as_raw()).unwrap_or_default();
    body[1] = libc::IPPROTO_TCP as u8;
    body[4..8].copy_from_slice(&(1u32 << state).to_ne_bytes());
    let length = (NETLINK_HEADER + body.len()) as u32;
    let mut request = Vec::with_capacity(NETLINK_HEADER + body.len());
    request.extend_from_slice(&length.to_ne_bytes());
    request.extend_from_slice(&BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&DUMP.to_ne_bytes());
    // Its number and our address, which the kernel fills in.
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(&body);
    request
}

/// The messages of a datagram: type and body.
pub fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
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
fn parse(body: &[u8]) -> Option<Socket> {
    let message = body.get(..DIAG_MESSAGE)?;
    let source = message.get(8..24)?;
    let address = match i32::from(*message.first()?) {
        libc::AF_INET => IpAddr::from(*source.first_chunk::<4>()?),
        libc::AF_INET6 => IpAddr::from(*source.first_chunk::<16>()?),
        _ => return None,
    };
    let port = u16::from_be_bytes(*message.get(4..)?.first_chunk()?);
    Some(Socket {
        local: SocketAddr::new(address, port),
        uid: number(message, 64)?,
        inode: number(message, 68)?.into(),
    })
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_would_never_say_is_passed_over() {
        assert_eq!(messages(&[]).count(), 0);
        // Lengths of less than a header, and of more than there is.
        let mut datagram = vec![0xff; 100];
        for length in [0u32, 1, 15, 101, u32::MAX] {
            datagram[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(messages(&datagram).count(), 0, "{length}");
        }
        for length in [16u32, 17, 72, 88, 100] {
            datagram[..4].copy_from_slice(&length.to_ne_bytes());
            for (_, body) in messages(&datagram).take(1000) {
                assert_eq!(parse(body), None, "a family that is none");
            }
        }
        assert_eq!(parse(&[libc::AF_INET as u8; DIAG_MESSAGE - 1]), None);
        assert_eq!(parse(&[0; DIAG_MESSAGE]), None);
    }
}
