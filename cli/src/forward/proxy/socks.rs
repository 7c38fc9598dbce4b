//! The messages of SOCKS5 (RFC 1928), SOCKS4 and SOCKS4a, to and from bytes.
//!
//! Ours, since the crates for it bring an async runtime with them or leave UDP out, and the whole is short.
//! A parser is given all that has arrived and says None until its message is complete; it uses up
//! nothing. Messages have a fixed greatest length, so a client that goes on sending gets an answer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use agent::protocol::{DialError, Target};

use super::target;

/// The first byte of SOCKS5's messages.
pub const VERSION_5: u8 = 5;
/// The first byte of SOCKS4's requests.
pub const VERSION_4: u8 = 4;

/// The answer to a greeting: no authentication.
pub const METHOD_NONE: [u8; 2] = [VERSION_5, 0];
/// The answer to a greeting that offers nothing we take.
pub const METHOD_UNACCEPTABLE: [u8; 2] = [VERSION_5, 0xff];

const CONNECT: u8 = 1;
const UDP_ASSOCIATE: u8 = 3;

const IPV4: u8 = 1;
const DOMAIN: u8 = 3;
const IPV6: u8 = 4;

/// The longest user or host name in SOCKS4, where it ends with a zero.
const MAX_NAME: usize = 255;

/// How a request ended: the REP field of SOCKS5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Reply {
    /// It did what it was to do.
    Succeeded = 0,
    /// None of the others.
    GeneralFailure = 1,
    /// There is no way there.
    NetworkUnreachable = 3,
    /// There is no such host.
    HostUnreachable = 4,
    /// Nobody listens there.
    ConnectionRefused = 5,
    /// No answer in time.
    TtlExpired = 6,
    /// A command that this proxy does not know.
    CommandNotSupported = 7,
    /// An address of a type that this proxy does not know.
    AddressTypeNotSupported = 8,
}

impl From<&DialError> for Reply {
    fn from(error: &DialError) -> Self {
        match error {
            DialError::Refused => Self::ConnectionRefused,
            DialError::Unreachable => Self::NetworkUnreachable,
            DialError::NoSuchHost => Self::HostUnreachable,
            DialError::TimedOut => Self::TtlExpired,
            DialError::Other(_) => Self::GeneralFailure,
        }
    }
}

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// A connection to this.
    Connect(Target),
    /// A relay for datagrams.
    Associate {
        /// The port that the client will send from; 0 where it does not know.
        port: u16,
    },
}

/// A message and its length in bytes.
pub type Parsed<T> = Option<(T, usize)>;

/// The greeting: whether "no authentication" is among the methods that it offers.
pub fn greeting(bytes: &[u8]) -> Parsed<bool> {
    let [_version, count, rest @ ..] = bytes else {
        return None;
    };
    let methods = rest.get(..usize::from(*count))?;
    Some((methods.contains(&0), 2 + methods.len()))
}

/// SOCKS5's request, or the reply that it deserves.
pub fn request(bytes: &[u8]) -> Result<Parsed<Request>, Reply> {
    let [version, command, _reserved, rest @ ..] = bytes else {
        return Ok(None);
    };
    if *version != VERSION_5 {
        return Err(Reply::GeneralFailure);
    }
    if ![CONNECT, UDP_ASSOCIATE].contains(command) {
        return Err(Reply::CommandNotSupported);
    }
    let Some((address, port, len)) = address(rest)? else {
        return Ok(None);
    };
    let request = if *command == UDP_ASSOCIATE {
        Request::Associate { port }
    } else {
        Request::Connect(address.target(port)?)
    };
    Ok(Some((request, 3 + len)))
}

/// SOCKS5's answer to a request; `bound` is where a relay takes datagrams.
pub fn reply(reply: Reply, bound: Option<SocketAddr>) -> Vec<u8> {
    let bound = bound.unwrap_or_else(|| (Ipv4Addr::UNSPECIFIED, 0).into());
    let mut message = vec![VERSION_5, reply as u8, 0];
    put_address(&mut message, bound);
    message
}

/// SOCKS4's request, with SOCKS4a's name of a host; an error deserves [`reply4`] with false.
pub fn request4(bytes: &[u8]) -> Result<Parsed<Target>, ()> {
    let [_version, command, high, low, a, b, c, d, rest @ ..] = bytes else {
        return Ok(None);
    };
    if *command != CONNECT {
        return Err(());
    }
    let port = u16::from_be_bytes([*high, *low]);
    let Some((_user, user_len)) = text4(rest)? else {
        return Ok(None);
    };
    let len = 8 + user_len;
    // 0.0.0.x announces a name.
    if (*a, *b, *c) != (0, 0, 0) || *d == 0 {
        let ip = Ipv4Addr::new(*a, *b, *c, *d);
        let target = target::address(ip.into(), port).ok_or(())?;
        return Ok(Some((target, len)));
    }
    let Some((name, name_len)) = text4(bytes.get(len..).unwrap_or_default())? else {
        return Ok(None);
    };
    let name = std::str::from_utf8(name).map_err(|_| ())?;
    let target = target::target(name, port).ok_or(())?;
    Ok(Some((target, len + name_len)))
}

/// SOCKS4's answer: granted or not.
pub fn reply4(granted: bool) -> Vec<u8> {
    vec![0, if granted { 90 } else { 91 }, 0, 0, 0, 0, 0, 0]
}

/// What a client's datagram is for and carries; None is to be dropped: garbage, or a fragment.
pub fn datagram(bytes: &[u8]) -> Option<(Target, &[u8])> {
    let [_, _, 0, rest @ ..] = bytes else {
        return None;
    };
    let (address, port, len) = address(rest).ok()??;
    Some((address.target(port).ok()?, rest.get(len..)?))
}

/// A datagram for a client: `payload` as `from` sent it.
pub fn put_datagram(from: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(22 + payload.len());
    message.extend([0, 0, 0]);
    put_address(&mut message, from);
    message.extend_from_slice(payload);
    message
}

/// The address field of requests and datagrams.
enum Address<'a> {
    Ip(IpAddr),
    Name(&'a [u8]),
}

impl Address<'_> {
    fn target(&self, port: u16) -> Result<Target, Reply> {
        // Linux refuses connections to port 0.
        if port == 0 {
            return Err(Reply::ConnectionRefused);
        }
        let target = match self {
            Self::Ip(ip) => target::address(*ip, port),
            Self::Name(name) => {
                let name = std::str::from_utf8(name).map_err(|_| Reply::HostUnreachable)?;
                target::target(name, port)
            }
        };
        target.ok_or(Reply::HostUnreachable)
    }
}

/// The type of an address, the address, and the port, and how long that was.
fn address(bytes: &[u8]) -> Result<Option<(Address<'_>, u16, usize)>, Reply> {
    let Some((kind, rest)) = bytes.split_first() else {
        return Ok(None);
    };
    let found = match *kind {
        IPV4 => rest
            .first_chunk::<4>()
            .map(|ip| (Address::Ip(Ipv4Addr::from(*ip).into()), 4)),
        IPV6 => rest
            .first_chunk::<16>()
            .map(|ip| (Address::Ip(Ipv6Addr::from(*ip).into()), 16)),
        DOMAIN => rest.split_first().and_then(|(len, rest)| {
            let name = rest.get(..usize::from(*len))?;
            Some((Address::Name(name), 1 + name.len()))
        }),
        _ => return Err(Reply::AddressTypeNotSupported),
    };
    Ok(found.and_then(|(address, len)| {
        let port = rest.get(len..)?.first_chunk::<2>()?;
        Some((address, u16::from_be_bytes(*port), 1 + len + 2))
    }))
}

fn put_address(message: &mut Vec<u8>, address: SocketAddr) {
    match address.ip() {
        IpAddr::V4(ip) => {
            message.push(IPV4);
            message.extend(ip.octets());
        }
        IpAddr::V6(ip) => {
            message.push(IPV6);
            message.extend(ip.octets());
        }
    }
    message.extend(address.port().to_be_bytes());
}

/// SOCKS4's text that ends with a zero, and its length with it.
fn text4(bytes: &[u8]) -> Result<Parsed<&[u8]>, ()> {
    match bytes.iter().take(MAX_NAME + 1).position(|byte| *byte == 0) {
        Some(end) => Ok(bytes.get(..end).map(|text| (text, end + 1))),
        None if bytes.len() > MAX_NAME => Err(()),
        None => Ok(None),
    }
}
