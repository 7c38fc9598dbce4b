//! The published ports: which there are, which of them listen, and what becomes of a connection.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::protocol::Open;
use rustix::io::Errno;

use super::error::BindError;
use super::listener::{self, HostSocket};
use super::poll::{Poller, Token};
use super::ports::PortSet;
use super::spec::{self, GuestEnd, HostEnd, Protocol, Publish, Rule, addresses};
use super::{Forward, Guest, Kind, frame};

/// Connections accepted from one listener before others have their turn.
const ACCEPT_BATCH: usize = 64;

/// How long a listener rests when the process or the host is out of descriptors or memory.
const REST: Duration = Duration::from_millis(100);

/// One published port.
#[derive(Debug)]
pub struct Published {
    kind: Kind,
    rule: Rule,
    /// The host port; 0 for a path.
    port: u16,
    sockets: Vec<HostSocket>,
    /// What a connection to the agent begins with.
    prelude: Vec<u8>,
    connections: u64,
}

impl Published {
    /// What it is for the guest.
    pub fn rule(&self) -> &Rule {
        &self.rule
    }

    /// Its host port; 0 for a path.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its sockets.
    pub fn sockets(&self) -> &[HostSocket] {
        &self.sockets
    }

    /// Counts one connection or flow.
    pub fn count(&mut self) {
        self.connections = self.connections.saturating_add(1);
    }

    /// Whether it carries datagrams.
    pub fn is_udp(&self) -> bool {
        self.rule.protocol == Protocol::Udp
    }

    /// Whether it was published because the guest listens.
    pub fn is_auto(&self) -> bool {
        self.kind == Kind::Auto
    }

    /// The TCP port of the guest behind it.
    pub fn guest_port(&self) -> Option<u16> {
        match (&self.rule.guest, self.rule.protocol) {
            (GuestEnd::Port(port), Protocol::Tcp) => Some(*port),
            _ => None,
        }
    }

    /// The host's end as it is typed.
    pub fn host(&self) -> String {
        match &self.rule.host {
            HostEnd::Unix(path) => path.display().to_string(),
            HostEnd::Port { address, .. } => {
                let shown = addresses(*address).into_iter().next();
                let shown = shown.map(|ip| SocketAddr::new(ip, self.port).to_string());
                shown.unwrap_or_default()
            }
        }
    }

    /// Waits for the sockets that always listen.
    fn wait(&self, id: u32, poller: &Poller) -> io::Result<()> {
        for (which, socket) in (0..).zip(&self.sockets) {
            if !matches!(socket, HostSocket::Tcp(_)) {
                poller.add(socket, Token::Host(id, which))?;
            }
        }
        Ok(())
    }

    fn forward(&self) -> Forward {
        let listens = self.sockets.iter().any(|socket| match socket {
            HostSocket::Tcp(port) => port.is_listening(),
            _ => false,
        });
        Forward {
            kind: self.kind,
            protocol: self.rule.protocol,
            host: self.host(),
            guest: match &self.rule.guest {
                GuestEnd::Port(port) => port.to_string(),
                GuestEnd::Unix(path) => path.display().to_string(),
            },
            answers: match (&self.rule.host, self.guest_port()) {
                (HostEnd::Port { .. }, Some(_)) => Some(listens),
                _ => None,
            },
            connections: self.connections,
        }
    }

    /// Whether `publish` means this one ([`super::Forwarder::remove`]).
    fn is_meant(&self, wanted: &Rule) -> bool {
        let host = match (&wanted.host, &self.rule.host) {
            (HostEnd::Unix(wanted), HostEnd::Unix(path)) => wanted == path,
            (
                HostEnd::Port { address, port },
                HostEnd::Port {
                    address: actual, ..
                },
            ) => {
                (address.is_none() || address == actual)
                    && port.is_none_or(|port| port == self.port)
            }
            _ => false,
        };
        host && wanted.guest == self.rule.guest && wanted.protocol == self.rule.protocol
    }

    /// Whether its host port is the guest port of `wanted`, which names nothing else.
    fn is_meant_by_host(&self, wanted: &Rule) -> bool {
        let alone = HostEnd::Port {
            address: None,
            port: None,
        };
        wanted.host == alone
            && wanted.guest == GuestEnd::Port(self.port)
            && wanted.protocol == self.rule.protocol
    }
}

/// All published ports.
#[derive(Debug, Default)]
pub struct PublishedPorts {
    all: BTreeMap<u32, Published>,
    next: u32,
    /// Listeners that rest, and until when.
    resting: Vec<(Instant, u32, u8)>,
}

impl PublishedPorts {
    /// Takes what `rule` says of the host, and holds it until [`PublishedPorts::insert`].
    pub fn bind(kind: Kind, rule: Rule) -> Result<Published, BindError> {
        let (port, sockets) = listener::bind(&rule)?;
        Self::made(kind, rule, port, sockets)
    }

    /// Takes the port that is like the guest's, or else like `before`.
    pub fn bind_auto(guest: u16, before: u16) -> Result<Published, BindError> {
        let (port, sockets) = listener::bind_like(None, before, Protocol::Tcp)?;
        let rule = Rule {
            host: HostEnd::Port {
                address: None,
                port: Some(port),
            },
            guest: GuestEnd::Port(guest),
            protocol: Protocol::Tcp,
        };
        Self::made(Kind::Auto, rule, port, sockets)
    }

    fn made(
        kind: Kind,
        rule: Rule,
        port: u16,
        sockets: Vec<HostSocket>,
    ) -> Result<Published, BindError> {
        let target = rule.guest.target();
        let prelude = frame(&Open::Dial(target));
        let prelude = prelude.map_err(BindError::broken)?;
        Ok(Published {
            kind,
            rule,
            port,
            sockets,
            prelude,
            connections: 0,
        })
    }

    /// Adds all of them or none; listeners that always listen are waited for from now on.
    pub fn insert_all(
        &mut self,
        published: Vec<Published>,
        poller: &Poller,
    ) -> io::Result<Vec<Forward>> {
        let (mut ids, mut forwards) = (Vec::new(), Vec::new());
        for one in published {
            while self.all.contains_key(&self.next) {
                self.next = self.next.wrapping_add(1);
            }
            let id = self.next;
            self.next = self.next.wrapping_add(1);
            let waits = one.wait(id, poller);
            ids.push(id);
            forwards.push(one.forward());
            self.all.insert(id, one);
            if let Err(error) = waits {
                self.take(&ids, poller);
                return Err(error);
            }
        }
        Ok(forwards)
    }

    /// Adds one.
    pub fn insert(&mut self, published: Published, poller: &Poller) -> io::Result<()> {
        self.insert_all(vec![published], poller).map(drop)
    }

    /// Takes away what `chosen` says, closing its sockets, and returns it.
    pub fn remove(
        &mut self,
        poller: &Poller,
        mut chosen: impl FnMut(&Published) -> bool,
    ) -> Vec<Published> {
        let of_chosen = |(id, published): (&u32, &Published)| chosen(published).then_some(*id);
        let ids: Vec<_> = self.all.iter().filter_map(of_chosen).collect();
        self.take(&ids, poller)
    }

    /// Takes away what `publish` means. Connections that were made go on, also those that wait for being
    /// accepted.
    pub fn remove_meant(
        &mut self,
        publish: &Publish,
        guest: Option<&Arc<dyn Guest>>,
        poller: &Poller,
    ) -> Vec<Published> {
        let wanted = publish.rules();
        let find = |meant: fn(&Published, &Rule) -> bool| -> Vec<u32> {
            let is_meant = |one: &Published| wanted.iter().any(|rule| meant(one, rule));
            let found = self.all.iter().filter(|(_, one)| is_meant(one));
            found.map(|(id, _)| *id).collect()
        };
        let mut ids = find(Published::is_meant);
        if ids.is_empty() {
            ids = find(Published::is_meant_by_host);
        }
        for id in &ids {
            let sockets = self.all.get(id).map_or(0, |one| one.sockets.len());
            for which in (0..=u8::MAX).take(sockets) {
                self.accept(*id, which, guest, poller);
            }
        }
        self.take(&ids, poller)
    }

    fn take(&mut self, ids: &[u32], poller: &Poller) -> Vec<Published> {
        let taken: Vec<_> = ids.iter().filter_map(|id| self.all.remove(id)).collect();
        for published in &taken {
            for socket in &published.sockets {
                poller.remove(socket);
            }
        }
        taken
    }

    /// Lets those TCP ports listen behind which the guest answers, and no others; without a guest none.
    pub fn follow(&mut self, guest: Option<&PortSet>, poller: &Poller) {
        for (id, published) in &mut self.all {
            let answers = match (&published.rule.guest, guest) {
                (_, None) => false,
                (GuestEnd::Port(port), Some(ports)) => ports.contains(*port),
                // Only a connection shows whether anybody listens at a path.
                (GuestEnd::Unix(_), Some(_)) => true,
            };
            for (which, socket) in (0..).zip(&mut published.sockets) {
                let token = Token::Host(*id, which);
                if let Err(error) = follow(socket, answers, token, poller) {
                    let host = published.rule.host.clone();
                    tracing::warn!("{host:?} cannot be listened at any more: {error}");
                }
            }
        }
    }

    /// Accepts what waits at one listener, and joins it to the guest.
    pub fn accept(&mut self, id: u32, which: u8, guest: Option<&Arc<dyn Guest>>, poller: &Poller) {
        let Some(published) = self.all.get_mut(&id) else {
            return;
        };
        let Some(socket) = published.sockets.get(usize::from(which)) else {
            return;
        };
        for _ in 0..ACCEPT_BATCH {
            let stream = match socket.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if is_lasting(&error) => {
                    tracing::warn!("connections wait at {}: {error}", published.host());
                    poller.remove(socket);
                    self.resting.push((Instant::now() + REST, id, which));
                    return;
                }
                // Not listening any more.
                Err(error) if error.kind() == ErrorKind::InvalidInput => return,
                // The client's connection broke before it was accepted.
                Err(_) => continue,
            };
            published.connections = published.connections.saturating_add(1);
            let joined = match guest {
                Some(guest) => guest.join(published.prelude.clone(), stream),
                None => Err(ErrorKind::NotConnected.into()),
            };
            if let Err(error) = joined {
                tracing::debug!("a connection does not reach the guest: {error}");
            }
        }
    }

    /// When the next listener has rested.
    pub fn deadline(&self) -> Option<Instant> {
        self.resting.iter().map(|(until, ..)| *until).min()
    }

    /// Waits again for those that have rested.
    pub fn expire(&mut self, now: Instant, poller: &Poller) {
        let all = &self.all;
        self.resting.retain(|(until, id, which)| {
            if *until > now {
                return true;
            }
            let published = all.get(id);
            let socket = published.and_then(|p| p.sockets.get(usize::from(*which)));
            let listens = |socket: &HostSocket| match socket {
                HostSocket::Tcp(port) => port.is_listening(),
                _ => true,
            };
            if let Some(socket) = socket
                && listens(socket)
                && let Err(error) = poller.add(socket, Token::Host(*id, *which))
                && error.kind() != ErrorKind::AlreadyExists
            {
                tracing::error!("a listener cannot be waited for: {error}");
            }
            false
        });
    }

    /// One of them.
    pub fn get(&self, id: u32) -> Option<&Published> {
        self.all.get(&id)
    }

    /// One of them.
    pub fn get_mut(&mut self, id: u32) -> Option<&mut Published> {
        self.all.get_mut(&id)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Published> {
        self.all.values()
    }

    /// All of them, for listing.
    pub fn list(&self) -> impl Iterator<Item = Forward> {
        self.all.values().map(Published::forward)
    }
}

/// Whether the process or the host has run out of something, so that trying again at once is of no use.
fn is_lasting(error: &io::Error) -> bool {
    let lasting = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| lasting.contains(&errno))
}

fn follow(socket: &mut HostSocket, answers: bool, token: Token, poller: &Poller) -> io::Result<()> {
    let HostSocket::Tcp(port) = socket else {
        return Ok(());
    };
    match (answers, port.is_listening()) {
        (true, false) => {
            port.listen()?;
            poller.add(&*socket, token)
        }
        (false, true) => {
            port.unlisten()?;
            poller.remove(&*socket);
            Ok(())
        }
        _ => Ok(()),
    }
}

impl From<&Published> for Forward {
    fn from(published: &Published) -> Self {
        published.forward()
    }
}

/// The ports of the host that `publish` takes by number.
pub fn host_ports(publish: &Publish) -> Vec<u16> {
    let rules = publish.rules().into_iter();
    let named = rules.filter_map(|rule| match rule {
        spec::Rule {
            host: HostEnd::Port { port, .. },
            protocol: Protocol::Tcp,
            ..
        } => port,
        _ => None,
    });
    named.collect()
}
