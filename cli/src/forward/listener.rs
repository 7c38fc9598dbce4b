//! The host's ends of published ports: TCP ports, Unix sockets and UDP sockets.
//!
//! A TCP port is bound for as long as it is published and listens only while the guest does, so that
//! otherwise the host's kernel refuses, as it would refuse without any forwarder. `shutdown(SHUT_RD)`
//! takes a listening socket back to one that is only bound (`tcp_disconnect` in Linux), and `listen` makes it
//! listen again. The kernel keeps the port only where it was asked for by number, never where it
//! was chosen by the kernel (`SOCK_BINDPORT_LOCK`), so there is no binding to port 0 here.
//!
//! `SO_REUSEADDR` is set while a socket listens: the connections it accepts inherit it, and only with
//! it on both sides can the port be bound again while old ones are in TIME_WAIT. It is cleared while the
//! socket does not listen, as two sockets that have it may be bound to one port while neither listens.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    self, AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use super::error::BindError;
use super::spec::{GuestEnd, HostEnd, Protocol, Rule, addresses};

/// Connections that wait for being accepted; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// Ports tried when one is to be free.
const TRIES: u16 = 1000;

/// Where a port is tried that is like a privileged one, without the right to the latter: 80 becomes 8080.
const UNPRIVILEGED: u16 = 8000;

/// One socket of the host that stands for something in the guest.
#[derive(Debug)]
pub enum HostSocket {
    /// A TCP port.
    Tcp(TcpPort),
    /// A Unix socket.
    Unix(UnixPath),
    /// A UDP port.
    Udp(UdpPort),
}

impl HostSocket {
    /// Takes one connection off the queue; WouldBlock where none waits.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let stream = net::accept_with(self, flags)?;
        if let Self::Tcp(_) = self {
            // Whoever wrote decided already how much goes into one packet.
            sockopt::set_tcp_nodelay(&stream, true)?;
            // A peer that vanished must not hold a connection in the guest for ever.
            sockopt::set_socket_keepalive(&stream, true)?;
            // Urgent data has no place in a vsock stream; here it arrives at least in its order.
            sockopt::set_socket_oobinline(&stream, true)?;
        }
        Ok(stream)
    }
}

impl AsFd for HostSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(port) => port.socket.as_fd(),
            Self::Unix(path) => path.socket.as_fd(),
            Self::Udp(port) => port.socket.as_fd(),
        }
    }
}

/// A TCP port of one address: bound, and listening only when told to.
#[derive(Debug)]
pub struct TcpPort {
    socket: OwnedFd,
    listening: bool,
}

impl TcpPort {
    /// Takes the port; it refuses connections until [`TcpPort::listen`].
    pub fn bind(at: SocketAddr) -> io::Result<Self> {
        let socket = socket(at.ip(), SocketType::STREAM)?;
        if let Err(error) = net::bind(&socket, &at) {
            if error != Errno::ADDRINUSE {
                return Err(error.into());
            }
            // It may be that only connections of an earlier listener are winding down.
            sockopt::set_socket_reuseaddr(&socket, true)?;
            net::bind(&socket, &at)?;
            sockopt::set_socket_reuseaddr(&socket, false)?;
        }
        Ok(Self {
            socket,
            listening: false,
        })
    }

    /// Whether it listens.
    pub fn is_listening(&self) -> bool {
        self.listening
    }

    /// Takes connections from now on.
    pub fn listen(&mut self) -> io::Result<()> {
        if !self.listening {
            sockopt::set_socket_reuseaddr(&self.socket, true)?;
            if let Err(error) = net::listen(&self.socket, BACKLOG) {
                sockopt::set_socket_reuseaddr(&self.socket, false)?;
                return Err(error.into());
            }
            self.listening = true;
        }
        Ok(())
    }

    /// Refuses connections from now on, resets those that wait for being accepted, and keeps the port.
    pub fn unlisten(&mut self) -> io::Result<()> {
        if self.listening {
            self.listening = false;
            sockopt::set_socket_reuseaddr(&self.socket, false)?;
            net::shutdown(&self.socket, Shutdown::Read)?;
        }
        Ok(())
    }
}

/// A listening Unix socket that only its user can connect to; its file is removed with it.
#[derive(Debug)]
pub struct UnixPath {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the file, which may have been replaced since.
    file: (u64, u64),
}

impl UnixPath {
    /// Listens at `path`, in place of a socket that nobody listens at.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // The file gets the mode of its socket: there is no moment when others can connect.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        let address = SocketAddrUnix::new(path)?;
        match net::bind(&socket, &address) {
            Err(Errno::ADDRINUSE) if is_abandoned(path) => {
                fs::remove_file(path)?;
                net::bind(&socket, &address)?;
            }
            result => result?,
        }
        let file = fs::symlink_metadata(path)?;
        net::listen(&socket, BACKLOG)?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            file: (file.dev(), file.ino()),
        })
    }
}

impl Drop for UnixPath {
    fn drop(&mut self) {
        let ours = |file: fs::Metadata| (file.dev(), file.ino()) == self.file;
        if fs::symlink_metadata(&self.path).is_ok_and(ours)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!("{} cannot be removed: {error}", self.path.display());
        }
    }
}

/// Whether `path` is a socket left by a program that has ended.
fn is_abandoned(path: &Path) -> bool {
    let socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == ErrorKind::ConnectionRefused;
    socket && UnixStream::connect(path).is_err_and(refused)
}

/// A UDP port of one address.
#[derive(Debug)]
pub struct UdpPort {
    socket: OwnedFd,
}

impl UdpPort {
    /// Takes the port.
    pub fn bind(at: SocketAddr) -> io::Result<Self> {
        let socket = socket(at.ip(), SocketType::DGRAM)?;
        net::bind(&socket, &at)?;
        Ok(Self { socket })
    }
}

/// Takes what `rule` says on the host; the port is the one that was picked where the rule names none, and 0
/// for a path.
pub fn bind(rule: &Rule) -> Result<(u16, Vec<HostSocket>), BindError> {
    match (&rule.host, &rule.guest) {
        (HostEnd::Unix(path), _) => match UnixPath::bind(path) {
            Ok(path) => Ok((0, vec![HostSocket::Unix(path)])),
            Err(error) => Err(BindError::path(path, error)),
        },
        (
            HostEnd::Port {
                address,
                port: Some(port),
            },
            _,
        ) => Ok((*port, bind_port(*address, *port, rule.protocol)?)),
        (HostEnd::Port { address, .. }, GuestEnd::Port(like)) => {
            bind_like(*address, *like, rule.protocol)
        }
        // The grammar has no such rule: a path is like no port.
        (HostEnd::Port { .. }, GuestEnd::Unix(path)) => {
            Err(BindError::path(path, ErrorKind::InvalidInput.into()))
        }
    }
}

/// Takes the host port of the same number, or else the next that is free.
pub fn bind_like(
    address: Option<IpAddr>,
    like: u16,
    protocol: Protocol,
) -> Result<(u16, Vec<HostSocket>), BindError> {
    let mut port = like;
    let mut tries = TRIES;
    loop {
        let error = match bind_port(address, port, protocol) {
            Ok(sockets) => return Ok((port, sockets)),
            Err(error) => error,
        };
        let next = match error.source.kind() {
            ErrorKind::AddrInUse => port.checked_add(1),
            ErrorKind::PermissionDenied if port < UNPRIVILEGED => like.checked_add(UNPRIVILEGED),
            _ => None,
        };
        tries -= 1;
        match next {
            Some(next) if tries > 0 => port = next,
            _ => return Err(error),
        }
    }
}

/// Takes `port` of all addresses that `address` stands for and this host has.
pub fn bind_port(
    address: Option<IpAddr>,
    port: u16,
    protocol: Protocol,
) -> Result<Vec<HostSocket>, BindError> {
    let mut sockets = Vec::new();
    let mut missing = None;
    for (index, ip) in addresses(address).into_iter().enumerate() {
        let at = SocketAddr::new(ip, port);
        let bound = match protocol {
            Protocol::Tcp => TcpPort::bind(at).map(HostSocket::Tcp),
            Protocol::Udp => UdpPort::bind(at).map(HostSocket::Udp),
        };
        let asked_for = address.is_some() && index == 0;
        match bound {
            Ok(socket) => sockets.push(socket),
            Err(error) => {
                let error = BindError::port(at, protocol, error);
                // A host may be without IPv6, or without IPv4; and what stands for another address
                // than the one that was written may be taken.
                let optional = is_missing(&error.source) || (address.is_some() && index > 0);
                if asked_for || !optional {
                    return Err(error);
                }
                missing = Some(error);
            }
        }
    }
    match (sockets.is_empty(), missing) {
        (true, Some(error)) => Err(error),
        _ => Ok(sockets),
    }
}

/// Whether the error says that the host does not have the address, or its family.
fn is_missing(error: &io::Error) -> bool {
    let missing = [Errno::ADDRNOTAVAIL, Errno::AFNOSUPPORT];
    Errno::from_io_error(error).is_some_and(|errno| missing.contains(&errno))
}

fn socket(ip: IpAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let family = match ip {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = net::socket_with(family, kind, flags, None)?;
    if ip.is_ipv6() {
        // The IPv4 addresses have sockets of their own.
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    Ok(socket)
}
