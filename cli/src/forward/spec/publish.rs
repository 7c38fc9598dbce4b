//! Published ports, as `-p` has them.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{
    Bracketed, GuestEnd, HostEnd, PortRange, Protocol, SpecError, guest_path, host_path,
    listen_address, pieces,
};

/// The grammar.
const FORM: &str = "[[IP:]HOST:]GUEST[/udp]";

/// One host end and what of the guest answers there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Where the host listens.
    pub host: HostEnd,
    /// Where the guest does.
    pub guest: GuestEnd,
    /// What is carried.
    pub protocol: Protocol,
}

/// What one `-p` asks for: `[[IP:]HOST:]GUEST[/udp]`.
///
/// HOST and GUEST are ports, ranges of the same length, or paths of Unix sockets; without HOST the host
/// port is one that is free.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Publish {
    host: Ends,
    guest: Ends,
    protocol: Protocol,
}

/// One side of a [`Publish`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Ends {
    /// None: any port that is free, on the host only.
    Ports(Option<IpAddr>, Option<PortRange>),
    Unix(PathBuf),
}

impl Publish {
    /// One rule for each port.
    pub fn rules(&self) -> Vec<Rule> {
        let rule = |host, guest| Rule {
            host,
            guest,
            protocol: self.protocol,
        };
        let guests: Vec<GuestEnd> = match &self.guest {
            Ends::Ports(_, ports) => {
                let ports = ports.iter().flat_map(|ports| ports.ports());
                ports.map(GuestEnd::Port).collect()
            }
            Ends::Unix(path) => vec![GuestEnd::Unix(path.clone())],
        };
        match &self.host {
            Ends::Unix(path) => guests
                .into_iter()
                .map(|guest| rule(HostEnd::Unix(path.clone()), guest))
                .collect(),
            Ends::Ports(address, ports) => {
                let mut ports = ports.iter().flat_map(|ports| ports.ports());
                let end = |port| HostEnd::Port {
                    address: *address,
                    port,
                };
                guests
                    .into_iter()
                    .map(|guest| rule(end(ports.next()), guest))
                    .collect()
            }
        }
    }

    /// Whether others than this host's own programs can reach it.
    pub fn is_wide(&self) -> bool {
        matches!(&self.host, Ends::Ports(Some(address), _) if !address.is_loopback())
    }
}

impl FromStr for Publish {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        if text.trim().is_empty() {
            return Err(SpecError::Empty);
        }
        let (text, protocol) = split_protocol(text);
        let pieces = pieces(text, FORM)?;
        let (address, host, guest) = match pieces.as_slice() {
            [guest] => (None, None, *guest),
            [host, guest] => (None, Some(*host), *guest),
            [address, host, guest] => (listen_address(address)?, Some(*host), *guest),
            _ => return Err(SpecError::Form(FORM)),
        };
        let guest = guest_ends(guest)?;
        let host = match host {
            Some(path) if path.contains('/') => match pieces.len() {
                2 => Ends::Unix(host_path(path)?),
                _ => return Err(SpecError::Form(FORM)),
            },
            // `IP::GUEST`: a free port of that address.
            Some("") if pieces.len() == 3 => Ends::Ports(address, None),
            Some(ports) => Ends::Ports(address, Some(ports.parse()?)),
            None => Ends::Ports(None, None),
        };
        check_ends(&host, &guest, protocol)?;
        Ok(Self {
            host,
            guest,
            protocol,
        })
    }
}

/// The suffix, where the last part is not a path.
fn split_protocol(text: &str) -> (&str, Protocol) {
    for (suffix, protocol) in [("/udp", Protocol::Udp), ("/tcp", Protocol::Tcp)] {
        if let Some(rest) = text.strip_suffix(suffix)
            && rest
                .rsplit(':')
                .next()
                .is_some_and(|last| !last.is_empty() && !last.contains('/'))
        {
            return (rest, protocol);
        }
    }
    (text, Protocol::Tcp)
}

fn guest_ends(text: &str) -> Result<Ends, SpecError> {
    match text.split_once('/') {
        None => Ok(Ends::Ports(None, Some(text.parse()?))),
        Some((ports, protocol)) if ports.starts_with(|c: char| c.is_ascii_digit()) => {
            Err(SpecError::Protocol(protocol.to_owned()))
        }
        Some(_) => Ok(Ends::Unix(guest_path(text)?)),
    }
}

fn check_ends(host: &Ends, guest: &Ends, protocol: Protocol) -> Result<(), SpecError> {
    let count = |ends: &Ends| match ends {
        Ends::Ports(_, ports) => ports.map(PortRange::count),
        Ends::Unix(_) => Some(1),
    };
    let is_path = |ends: &Ends| matches!(ends, Ends::Unix(_));
    if protocol == Protocol::Udp && (is_path(host) || is_path(guest)) {
        return Err(SpecError::DatagramsAtPath);
    }
    match (count(host), count(guest)) {
        (Some(host), Some(guest)) if host != guest => Err(SpecError::Unequal { host, guest }),
        // A free port is picked to be like the guest's, and a path is not like any port.
        (None, _) if is_path(guest) => Err(SpecError::Form("HOST:/GUEST/PATH")),
        _ => Ok(()),
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Ends::Unix(path) => write!(f, "{}:", path.display())?,
            Ends::Ports(address, ports) => {
                if let Some(address) = address {
                    write!(f, "{}:", Bracketed(*address))?;
                }
                match ports {
                    Some(ports) => write!(f, "{ports}:")?,
                    None if address.is_some() => f.write_str(":")?,
                    None => {}
                }
            }
        }
        match &self.guest {
            Ends::Unix(path) => write!(f, "{}", path.display())?,
            Ends::Ports(_, ports) => {
                if let Some(ports) = ports {
                    write!(f, "{ports}")?;
                }
            }
        }
        match self.protocol {
            Protocol::Tcp => Ok(()),
            Protocol::Udp => f.write_str("/udp"),
        }
    }
}
