//! Reverse forwards, as `-R` has them.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use agent::protocol::Bind;
use serde::{Deserialize, Serialize};

use super::{
    Bracketed, GuestEnd, SpecError, guest_path, host_name, host_path, is_number, listen_address,
    path_bytes, pieces, port,
};

/// The grammar.
const FORM: &str = "[GUEST_IP:]GUEST:HOST[:PORT]";

/// What one `-R` asks for: `[GUEST_IP:]GUEST:HOST[:PORT]`.
///
/// GUEST is a port or the path of a Unix socket; HOST is a host name or address (PORT is the guest's
/// where it is left out), the path of a Unix socket, or only a port, which is then one of localhost.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reverse {
    at: GuestEnd,
    address: Option<IpAddr>,
    target: HostTarget,
}

/// Something on the host that the guest is let reach.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostTarget {
    /// A host as this one resolves and routes it.
    Host {
        /// A name or an address, without brackets.
        host: String,
        /// Its port.
        port: u16,
    },
    /// A Unix socket at this absolute path.
    Unix(PathBuf),
}

impl Reverse {
    /// Where the guest's programs connect to.
    pub fn at(&self) -> Bind {
        match &self.at {
            GuestEnd::Port(port) => Bind::Tcp {
                address: self.address,
                port: *port,
            },
            GuestEnd::Unix(path) => Bind::Unix(path_bytes(path)),
        }
    }

    /// What they reach.
    pub fn target(&self) -> &HostTarget {
        &self.target
    }
}

impl FromStr for Reverse {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        if text.trim().is_empty() {
            return Err(SpecError::Empty);
        }
        let pieces = pieces(text, FORM)?;
        let (address, at, target) = match pieces.as_slice() {
            [at, target @ ..] if is_guest_end(at) => (None, *at, target),
            [address, at, target @ ..] => (listen_address(address)?, *at, target),
            _ => return Err(SpecError::Form(FORM)),
        };
        let at = match at.contains('/') {
            true if address.is_some() => return Err(SpecError::Form(FORM)),
            true => GuestEnd::Unix(guest_path(at)?),
            false => GuestEnd::Port(port(at)?),
        };
        let target = match target {
            [path] if path.contains('/') => HostTarget::Unix(host_path(path)?),
            [number] if is_number(number) => HostTarget::Host {
                host: "localhost".to_owned(),
                port: port(number)?,
            },
            [name] => match at {
                GuestEnd::Port(port) => HostTarget::Host {
                    host: host_name(name)?,
                    port,
                },
                GuestEnd::Unix(_) => return Err(SpecError::Form("/GUEST/PATH:HOST:PORT")),
            },
            [name, number] => HostTarget::Host {
                host: host_name(name)?,
                port: port(number)?,
            },
            _ => return Err(SpecError::Form(FORM)),
        };
        Ok(Self {
            at,
            address,
            target,
        })
    }
}

impl fmt::Display for Reverse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(address) = self.address {
            write!(f, "{}:", Bracketed(address))?;
        }
        match &self.at {
            GuestEnd::Port(port) => write!(f, "{port}:")?,
            GuestEnd::Unix(path) => write!(f, "{}:", path.display())?,
        }
        write!(f, "{}", self.target)
    }
}

impl fmt::Display for HostTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Host { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Whether the first part of a reverse forward is a guest's port or path, and not an address.
fn is_guest_end(text: &str) -> bool {
    text.contains('/') || is_number(text)
}
