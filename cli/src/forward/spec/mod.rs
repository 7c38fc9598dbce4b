//! The grammar of published ports (`-p`) and reverse forwards (`-R`): what was typed, checked, and
//! written back in the same grammar for listing and storing.

mod publish;
mod reverse;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use agent::protocol::Target;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::publish::{Publish, Rule};
pub use self::reverse::{HostTarget, Reverse};

/// The longest path of a Unix socket: `sun_path` of unix(7) without its terminating zero.
const MAX_SOCKET_PATH: usize = 107;

/// The longest host name of the DNS.
const MAX_HOST_NAME: usize = 253;

/// Why a forward that was typed is none. Each is one sentence that stands behind what was typed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpecError {
    /// Nothing there.
    #[error("it is empty")]
    Empty,
    /// Neither a number from 1 to 65535 nor, where one may stand, a range of them.
    #[error("{0:?} is not a port: ports are numbers from 1 to 65535")]
    Port(String),
    /// A range from a higher to a lower port.
    #[error("the range {0} ends before it begins")]
    Backwards(String),
    /// Ranges of different lengths.
    #[error("{host} host ports do not fit {guest} guest ports: both ranges need the same length")]
    Unequal {
        /// Ports of the host.
        host: usize,
        /// Ports of the guest.
        guest: usize,
    },
    /// Not an address to listen at.
    #[error(
        "{0:?} is not an IP address to listen at (IPv6 addresses stand in brackets, as in [::1])"
    )]
    Address(String),
    /// Not a host name or address.
    #[error("{0:?} is not a host name or address (IPv6 addresses stand in brackets, as in [::1])")]
    Host(String),
    /// A path that no socket can have.
    #[error("{path:?} cannot be the path of a Unix socket: {reason}")]
    Path {
        /// What was typed.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A suffix that is neither `/tcp` nor `/udp`.
    #[error("{0:?} is neither tcp nor udp")]
    Protocol(String),
    /// UDP and a Unix socket.
    #[error("UDP goes between ports, not to or from Unix sockets")]
    DatagramsAtPath,
    /// More or fewer parts than the grammar has.
    #[error("it is not of the form {0} (IPv6 addresses stand in brackets, as in [::1])")]
    Form(&'static str),
}

/// What a published port carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Streams, also those of Unix sockets.
    Tcp,
    /// Datagrams.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// One or more ports in a row, none of them 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// From `first` to `last`, both included; None where that is no range of ports.
    pub fn new(first: u16, last: u16) -> Option<Self> {
        (first != 0 && first <= last).then_some(Self { first, last })
    }

    /// Whether `port` is one of them.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// How many ports.
    pub fn count(self) -> usize {
        usize::from(self.last - self.first) + 1
    }

    /// The ports, ascending.
    pub fn ports(self) -> impl Iterator<Item = u16> {
        self.first..=self.last
    }
}

impl FromStr for PortRange {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(text)?, port(text)?),
        };
        if first > last {
            return Err(SpecError::Backwards(text.to_owned()));
        }
        Ok(Self { first, last })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(f, "{}", self.first),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

/// Where the host takes connections or datagrams.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostEnd {
    /// A port.
    Port {
        /// At this address (see [`Publish::addresses`]); None is the host's loopback.
        address: Option<IpAddr>,
        /// This one, or one that is free.
        port: Option<u16>,
    },
    /// A Unix socket at this absolute path.
    Unix(PathBuf),
}

/// What of the guest answers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GuestEnd {
    /// A port of its loopback.
    Port(u16),
    /// A Unix socket at this absolute path.
    Unix(PathBuf),
}

impl GuestEnd {
    /// The same, as the agent is told.
    pub fn target(&self) -> Target {
        match self {
            Self::Port(port) => Target::Loopback(*port),
            Self::Unix(path) => Target::Unix(path_bytes(path)),
        }
    }
}

/// Where the host listens for `address`: a loopback address stands for that of both families, and so does
/// an unspecified one.
pub fn addresses(address: Option<IpAddr>) -> Vec<IpAddr> {
    match address {
        None => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
        Some(written) => {
            let other: Option<IpAddr> = match written {
                IpAddr::V4(Ipv4Addr::LOCALHOST) => Some(Ipv6Addr::LOCALHOST.into()),
                IpAddr::V6(Ipv6Addr::LOCALHOST) => Some(Ipv4Addr::LOCALHOST.into()),
                IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Some(Ipv6Addr::UNSPECIFIED.into()),
                IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Some(Ipv4Addr::UNSPECIFIED.into()),
                _ => None,
            };
            std::iter::once(written).chain(other).collect()
        }
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Splits at colons outside of brackets; fails where a bracket is not closed.
fn pieces<'a>(text: &'a str, form: &'static str) -> Result<Vec<&'a str>, SpecError> {
    let mut inside = false;
    let at_colon = |c| {
        inside = (inside || c == '[') && c != ']';
        c == ':' && !inside
    };
    let pieces = text.split(at_colon).collect();
    match inside {
        true => Err(SpecError::Form(form)),
        false => Ok(pieces),
    }
}

fn port(text: &str) -> Result<u16, SpecError> {
    let refused = || SpecError::Port(text.to_owned());
    // `u16::from_str` takes a plus sign.
    match text.parse() {
        Ok(port) if port != 0 && is_number(text) => Ok(port),
        _ => Err(refused()),
    }
}

/// An address to listen at; None is the loopback of both families.
fn listen_address(text: &str) -> Result<Option<IpAddr>, SpecError> {
    let refused = || SpecError::Address(text.to_owned());
    match text {
        "localhost" => return Ok(None),
        "*" => return Ok(Some(Ipv4Addr::UNSPECIFIED.into())),
        _ => {}
    }
    let address = match in_brackets(text) {
        Some(inner) => inner.parse::<Ipv6Addr>().map(IpAddr::V6),
        None => text.parse::<Ipv4Addr>().map(IpAddr::V4),
    };
    let address = address.map_err(|_| refused())?.to_canonical();
    match address.is_multicast() {
        true => Err(refused()),
        false => Ok(Some(address)),
    }
}

/// A host to connect to, without brackets.
fn host_name(text: &str) -> Result<String, SpecError> {
    let refused = || SpecError::Host(text.to_owned());
    if let Some(inner) = in_brackets(text) {
        let address: Ipv6Addr = inner.parse().map_err(|_| refused())?;
        return Ok(address.to_string());
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if text.is_empty() || text.len() > MAX_HOST_NAME || !text.chars().all(fits) {
        return Err(refused());
    }
    // What looks like an address has to be one: `1.2.3` is no name.
    let numeric = text.chars().all(|c| c.is_ascii_digit() || c == '.');
    if text.starts_with('-') || (numeric && text.parse::<Ipv4Addr>().is_err()) {
        return Err(refused());
    }
    Ok(text.to_owned())
}

fn in_brackets(text: &str) -> Option<&str> {
    text.strip_prefix('[')?.strip_suffix(']')
}

/// A path in the guest.
fn guest_path(text: &str) -> Result<PathBuf, SpecError> {
    if !text.starts_with('/') {
        return Err(refused_path(text, "in the guest it has to be absolute"));
    }
    socket_path(text, PathBuf::from(text))
}

/// A path on the host; absolute from here on, as it may be used where the working directory is another.
fn host_path(text: &str) -> Result<PathBuf, SpecError> {
    let path = std::path::absolute(text)
        .map_err(|_| refused_path(text, "the working directory cannot be found"))?;
    socket_path(text, path)
}

fn socket_path(text: &str, path: PathBuf) -> Result<PathBuf, SpecError> {
    if text.contains('\0') {
        return Err(refused_path(text, "it holds a zero byte"));
    }
    if text.ends_with('/') {
        return Err(refused_path(text, "it is a directory"));
    }
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(refused_path(text, "it is longer than 107 bytes"));
    }
    // It is written back in this grammar, which has no way to quote a colon.
    if path
        .to_str()
        .is_none_or(|path| path.contains([':', '[', ']']))
    {
        return Err(refused_path(
            text,
            "it holds a colon, a bracket or what is not UTF-8",
        ));
    }
    Ok(path)
}

fn refused_path(text: &str, reason: &'static str) -> SpecError {
    SpecError::Path {
        path: text.to_owned(),
        reason,
    }
}

fn path_bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_encoded_bytes().to_vec()
}

/// An address as it stands before a colon.
struct Bracketed(IpAddr);

impl fmt::Display for Bracketed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(address) => write!(f, "{address}"),
            IpAddr::V6(address) => write!(f, "[{address}]"),
        }
    }
}

/// These are stored as they are typed.
macro_rules! stored_as_typed {
    ($($type:ty),*) => {$(
        impl TryFrom<String> for $type {
            type Error = SpecError;

            fn try_from(text: String) -> Result<Self, SpecError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(spec: $type) -> Self {
                spec.to_string()
            }
        }
    )*};
}

stored_as_typed!(PortRange, Publish, Reverse);

#[cfg(test)]
mod tests;
