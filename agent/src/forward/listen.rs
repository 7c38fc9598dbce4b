//! Sockets in the guest at which the agent listens for the host.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Instant;

use agent::protocol::{Bind, FromForwarder};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, socket_with, sockopt};

use super::control::Owner;
use super::pair::Side;
use super::poller::Token;
use super::reactor::{ACCEPT_BATCH, ACCEPT_PAUSE, Reactor, State};
use super::slots::Index;
use super::unix;

/// Connections that wait to be accepted: the kernel's own default limit (`net.core.somaxconn`).
pub(super) const BACKLOG: i32 = 4096;

/// How often a port that is free on both loopback addresses is looked for.
const ATTEMPTS: usize = 16;

/// A socket that listens for the host.
#[derive(Debug)]
pub struct Listening {
    socket: OwnedFd,
    /// The number by which the host knows it.
    pub id: u32,
    /// Whom it is for.
    pub owner: Owner,
    /// No connection is accepted before.
    pub paused: Option<Instant>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// The inode of the socket, by which the kernel lists it.
    Tcp(u64),
    Unix(unix::Name),
}

impl Reactor {
    /// Listens for a control, which is told of how that ended.
    pub(super) fn listen(&mut self, owner: Owner, id: u32, at: Bind) {
        let result = match at {
            Bind::Unix(path) => return self.listen_unix(owner, id, path),
            Bind::Tcp { address, port } => self.listen_tcp(owner, id, address, port),
        };
        self.told.push((owner, FromForwarder::Bound { id, result }));
    }

    fn listen_tcp(
        &mut self,
        owner: Owner,
        id: u32,
        address: Option<IpAddr>,
        port: u16,
    ) -> Result<u16, String> {
        let place = match address {
            None => format!("port {port} of the guest's loopback"),
            Some(address) => format!("{} of the guest", SocketAddr::new(address, port)),
        };
        let failed = |error| format!("{place} cannot be listened at: {error}");
        let (sockets, port) = bind(address, port).map_err(failed)?;
        for socket in sockets {
            let inode = rustix::fs::fstat(&socket)
                .map_err(|error| failed(error.into()))?
                .st_ino;
            let index = self.states.reserve();
            match self.add_listening(index, owner, id, socket, Kind::Tcp(inode)) {
                Ok(state) => {
                    self.own_listeners.insert(inode);
                    self.states.put(index, state);
                }
                Err(error) => {
                    self.states.free(index);
                    self.unlisten(owner, id);
                    return Err(failed(error));
                }
            }
        }
        Ok(port)
    }

    /// Goes on where a Unix socket listens.
    pub(super) fn listening(
        &mut self,
        index: Index,
        owner: Owner,
        id: u32,
        bound: unix::Bound,
    ) -> Option<State> {
        let unix::Bound { socket, name } = bound;
        let (result, state) = match self.add_listening(index, owner, id, socket, Kind::Unix(name)) {
            Ok(state) => (Ok(0), Some(state)),
            Err(error) => (
                Err(format!("the guest's socket cannot be watched: {error}")),
                None,
            ),
        };
        self.told.push((owner, FromForwarder::Bound { id, result }));
        state
    }

    fn add_listening(
        &mut self,
        index: Index,
        owner: Owner,
        id: u32,
        socket: OwnedFd,
        kind: Kind,
    ) -> io::Result<State> {
        self.poller
            .watch(&socket, Token::Entry(index, Side::Guest))?;
        self.states.enqueue(index);
        Ok(State::Listening(Box::new(Listening {
            socket,
            id,
            owner,
            paused: None,
            kind,
        })))
    }

    /// Takes connections, and offers them to the host.
    pub(super) fn accept(&mut self, index: Index, mut listening: Box<Listening>) -> State {
        if listening.paused.is_some_and(|until| Instant::now() < until) {
            return State::Listening(listening);
        }
        listening.paused = None;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        for _ in 0..ACCEPT_BATCH {
            match accept_with(&listening.socket, flags) {
                Ok(guest) => self.offer(guest, &listening),
                Err(Errno::AGAIN) => return State::Listening(listening),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                // Out of memory or descriptors: later ones may succeed.
                Err(error) => {
                    eprintln!("mvm-agent: a connection to the host cannot be accepted: {error}");
                    let until = Instant::now() + ACCEPT_PAUSE;
                    self.poller.look_at(index, until);
                    listening.paused = Some(until);
                    return State::Listening(listening);
                }
            }
        }
        self.states.enqueue(index);
        State::Listening(listening)
    }

    /// Takes no more connections.
    pub(super) fn unlisten(&mut self, owner: Owner, id: u32) {
        for state in self.states.drain(|state| state.listens_as(owner, id)) {
            self.drop_state(state);
        }
    }

    /// Lets go of a socket that listened.
    pub(super) fn close(&mut self, listening: Listening) {
        match listening.kind {
            Kind::Tcp(inode) => {
                self.own_listeners.remove(&inode);
            }
            Kind::Unix(name) => self.resolver.remove(name),
        }
    }
}

/// Listens at `address`, or at both loopback addresses; tells at which port.
fn bind(address: Option<IpAddr>, port: u16) -> io::Result<(Vec<OwnedFd>, u16)> {
    let Some(address) = address else {
        return bind_loopback(port);
    };
    let (socket, port) = bind_one(address, port)?;
    Ok((vec![socket], port))
}

fn bind_loopback(port: u16) -> io::Result<(Vec<OwnedFd>, u16)> {
    let mut attempt = 0;
    loop {
        let (v4, bound) = bind_one(Ipv4Addr::LOCALHOST.into(), port)?;
        match bind_one(Ipv6Addr::LOCALHOST.into(), bound) {
            Ok((v6, _)) => return Ok((vec![v4, v6], bound)),
            // A guest without IPv6.
            Err(Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT) => return Ok((vec![v4], bound)),
            Err(Errno::ADDRINUSE) if port == 0 && attempt < ATTEMPTS => attempt += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

fn bind_one(address: IpAddr, port: u16) -> rustix::io::Result<(OwnedFd, u16)> {
    let family = match address {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &SocketAddr::new(address, port))?;
    rustix::net::listen(&socket, BACKLOG)?;
    let bound = SocketAddr::try_from(rustix::net::getsockname(&socket)?)?;
    Ok((socket, bound.port()))
}
