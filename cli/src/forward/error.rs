//! Why a forward could not be made, in one sentence for a person.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::occupant;
use super::spec::Protocol;

/// What of the host could not be taken, and why.
#[derive(Debug)]
pub struct BindError {
    at: Place,
    /// What the kernel said.
    pub source: io::Error,
}

#[derive(Debug)]
enum Place {
    Port(SocketAddr, Protocol),
    Path(PathBuf),
    Nowhere,
}

impl BindError {
    /// It was to be had, and the forwarder cannot use it.
    pub fn broken(source: io::Error) -> Self {
        let at = Place::Nowhere;
        Self { at, source }
    }

    /// A port was not to be had.
    pub fn port(at: SocketAddr, protocol: Protocol, source: io::Error) -> Self {
        let at = Place::Port(at, protocol);
        Self { at, source }
    }

    /// A path was not to be had.
    pub fn path(at: &Path, source: io::Error) -> Self {
        let at = Place::Path(at.to_owned());
        Self { at, source }
    }

    /// The same for a person; this looks for who is in the way, which takes a while on a busy host.
    pub fn explain(self) -> ForwardError {
        match self.at {
            Place::Nowhere => ForwardError::Broken(self.source),
            Place::Path(path) => ForwardError::Path {
                in_use: self.source.kind() == ErrorKind::AddrInUse,
                path,
                source: self.source,
            },
            Place::Port(at, protocol) => match self.source.kind() {
                ErrorKind::AddrInUse => ForwardError::InUse {
                    by: occupant::of(at, protocol),
                    at,
                    protocol,
                },
                ErrorKind::PermissionDenied => ForwardError::Privileged { port: at.port() },
                ErrorKind::AddrNotAvailable => ForwardError::NoSuchAddress { at },
                _ => ForwardError::Port {
                    at,
                    protocol,
                    source: self.source,
                },
            },
        }
    }
}

/// Why a forward could not be made or taken away.
#[derive(Debug, Error)]
pub enum ForwardError {
    /// Somebody has the port.
    #[error("the {protocol} port {at} is in use by {by}: publish another host port")]
    InUse {
        /// Where.
        at: SocketAddr,
        /// What for.
        protocol: Protocol,
        /// Who, as far as it can be known.
        by: String,
    },
    /// A port that only some users may take.
    #[error(
        "port {port} of the host is privileged: publish a higher one (such as {}), or let every user \
         take it with `sysctl net.ipv4.ip_unprivileged_port_start={port}`, or mvm with \
         `setcap cap_net_bind_service=+ep` on its file", 8000u16.saturating_add(*port)
    )]
    Privileged {
        /// Its number.
        port: u16,
    },
    /// The host has no such address.
    #[error("{} is no address of this host, so nothing can listen at it", at.ip())]
    NoSuchAddress {
        /// What was asked for.
        at: SocketAddr,
    },
    /// Anything else about a port.
    #[error("the {protocol} port {at} cannot be taken: {source}")]
    Port {
        /// Where.
        at: SocketAddr,
        /// What for.
        protocol: Protocol,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something about a Unix socket.
    #[error("{}", path_sentence(path, *in_use, source))]
    Path {
        /// Where.
        path: PathBuf,
        /// Whether something is there already.
        in_use: bool,
        /// What the kernel said.
        source: io::Error,
    },
    /// The guest could not listen.
    #[error("the guest cannot listen at {at}: {reason}")]
    Guest {
        /// Where.
        at: String,
        /// What its agent said.
        reason: String,
    },
    /// What was to be taken away is not there.
    #[error("no forward is {0}: see `mvm port ls`")]
    NoSuchForward(String),
    /// What was to be made is there already.
    #[error("{0} is forwarded already")]
    Exists(String),
    /// The forwarder itself does not work.
    #[error("the port forwarder does not work: {0}")]
    Broken(#[from] io::Error),
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
}

fn path_sentence(path: &Path, in_use: bool, source: &io::Error) -> String {
    let path = path.display();
    match in_use {
        true => format!("{path} exists and is in use: give another path, or remove it"),
        false => format!("no socket can be made at {path}: {source}"),
    }
}
