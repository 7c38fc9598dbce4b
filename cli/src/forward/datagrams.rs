//! UDP ports: one flow for each source on the host, all of them over one connection to the agent.
//!
//! Where the guest does not keep up, datagrams are dropped, as a network would.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::protocol::{self, Datagram, Open};
use rustix::net::{RecvFlags, SendFlags, recvfrom, sendto};

use super::Guest;
use super::framed::Framed;
use super::listener::HostSocket;
use super::poll::{Poller, Ready, Token};
use super::published::PublishedPorts;
use super::spec::GuestEnd;

/// Flows at once; the one that was idle for the longest makes way.
const MAX_FLOWS: usize = 4096;

/// How long a flow may be idle.
const IDLE: Duration = Duration::from_secs(120);

/// Bytes that may wait for the guest.
const BACKLOG: usize = 1 << 20;

/// Datagrams taken from one socket before others have their turn.
const BATCH: usize = 64;

/// The longest datagram of UDP over IPv4.
const MAX_DATAGRAM: usize = 65_507;

/// How long to wait before another connection to the agent is tried.
const PAUSE: Duration = Duration::from_secs(1);

/// Where a flow comes from: the rule, which of its sockets, and who sent to it.
type Source = (u32, u8, SocketAddr);

#[derive(Debug)]
struct Flow {
    source: Source,
    /// Its place in the order of use.
    used: u64,
    when: Instant,
}

/// All flows.
#[derive(Debug)]
pub struct Datagrams {
    /// Opened for the first datagram.
    connection: Option<Framed>,
    /// Whether room to write is waited for.
    waiting: bool,
    /// No connection is tried before.
    retry: Instant,
    flows: HashMap<u32, Flow>,
    by_source: HashMap<Source, u32>,
    /// The flows, the one that was used last at the end.
    order: BTreeMap<u64, u32>,
    uses: u64,
    next: u32,
    buffer: Vec<u8>,
}

impl Datagrams {
    /// No flows.
    pub fn new() -> Self {
        Self {
            connection: None,
            waiting: false,
            retry: Instant::now(),
            flows: HashMap::new(),
            by_source: HashMap::new(),
            order: BTreeMap::new(),
            uses: 0,
            next: 0,
            buffer: vec![0; MAX_DATAGRAM + 1],
        }
    }

    /// Passes on what arrived at a UDP socket of the host.
    pub fn take(
        &mut self,
        (id, which): (u32, u8),
        published: &mut PublishedPorts,
        guest: Option<&Arc<dyn Guest>>,
        poller: &Poller,
    ) {
        let Some(rule) = published.get_mut(id) else {
            return;
        };
        for _ in 0..BATCH {
            let Some(socket) = rule.sockets().get(usize::from(which)) else {
                return;
            };
            let (len, from) = match receive(socket, &mut self.buffer) {
                Ok(Some(received)) => received,
                Ok(None) => return,
                // An error of a datagram sent earlier; there may be others behind it.
                Err(_) => continue,
            };
            let Some(guest) = guest else {
                continue;
            };
            let source = (id, which, from);
            let target = rule.rule().guest.target();
            if !self.is_open(guest, poller) {
                continue;
            }
            let known = self.by_source.get(&source).copied();
            let flow = match known {
                Some(flow) => flow,
                None => {
                    rule.count();
                    self.begin(source)
                }
            };
            self.touch(flow);
            let payload = self.buffer.get(..len).unwrap_or_default().to_vec();
            self.send(&Datagram::Send {
                flow,
                to: target,
                payload,
            });
        }
    }

    /// Passes on what the guest sent, and sends what waits for it.
    pub fn handle(&mut self, ready: Ready, published: &PublishedPorts, poller: &Poller) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        let mut alive = Ok(true);
        if ready.writable {
            alive = connection.flush().map(|()| true);
        }
        if ready.readable && alive.is_ok() {
            alive = connection.fill();
        }
        while let Some(connection) = &mut self.connection {
            match connection.next() {
                Ok(Some(message)) => self.deliver(message, published),
                Ok(None) => break,
                Err(error) => {
                    alive = Err(error);
                    break;
                }
            }
        }
        match alive {
            Ok(true) => {}
            Ok(false) => self.close(poller),
            Err(error) => {
                tracing::debug!("the connection for datagrams broke: {error}");
                self.close(poller);
            }
        }
    }

    /// Ends the flows of ports that are published no more.
    pub fn forget(&mut self, published: &PublishedPorts) {
        let gone = |flow: &Flow| published.get(flow.source.0).is_none();
        let ids = self.flows.iter().filter(|(_, flow)| gone(flow));
        for flow in ids.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.end(flow);
        }
    }

    /// Ends all flows and the connection.
    pub fn close(&mut self, poller: &Poller) {
        if let Some(connection) = self.connection.take() {
            poller.remove(&connection);
        }
        self.waiting = false;
        self.flows.clear();
        self.by_source.clear();
        self.order.clear();
    }

    /// Waits for room where something waits for it.
    pub fn tend(&mut self, poller: &Poller) {
        let Some(connection) = &self.connection else {
            return;
        };
        let waiting = connection.is_waiting();
        if waiting != self.waiting {
            self.waiting = waiting;
            if let Err(error) = poller.change(connection, Token::Datagrams, waiting) {
                tracing::error!("the connection for datagrams cannot be waited for: {error}");
                self.close(poller);
            }
        }
    }

    /// When the flow that was idle for the longest is over.
    pub fn deadline(&self) -> Option<Instant> {
        let flow = self.flows.get(self.order.first_key_value()?.1)?;
        Some(flow.when + IDLE)
    }

    /// Ends flows that were idle for too long.
    pub fn expire(&mut self, now: Instant) {
        while let Some((_, flow)) = self.order.first_key_value()
            && let (flow, Some(last)) = (*flow, self.flows.get(flow))
            && last.when + IDLE <= now
        {
            self.end(flow);
        }
    }

    /// Whether there is a connection, which is opened where there is none.
    fn is_open(&mut self, guest: &Arc<dyn Guest>, poller: &Poller) -> bool {
        if self.connection.is_some() {
            return true;
        }
        let now = Instant::now();
        if now < self.retry {
            return false;
        }
        self.retry = now + PAUSE;
        match open(guest, poller) {
            Ok(connection) => {
                self.connection = Some(connection);
                true
            }
            Err(error) => {
                tracing::warn!("no datagrams reach the guest: {error}");
                false
            }
        }
    }

    fn send(&mut self, message: &Datagram) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        match connection.send(message) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                tracing::trace!("a datagram is dropped: the guest does not keep up");
            }
            // Its end is found when it is read.
            Err(error) => tracing::debug!("a datagram is lost: {error}"),
        }
    }

    fn begin(&mut self, source: Source) -> u32 {
        if self.flows.len() >= MAX_FLOWS
            && let Some((_, oldest)) = self.order.first_key_value()
        {
            self.end(*oldest);
        }
        while self.flows.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let id = self.next;
        // A datagram that comes late must not be taken for one of another flow.
        self.next = self.next.wrapping_add(1);
        self.uses += 1;
        let flow = Flow {
            source,
            used: self.uses,
            when: Instant::now(),
        };
        self.order.insert(flow.used, id);
        self.flows.insert(id, flow);
        self.by_source.insert(source, id);
        id
    }

    fn touch(&mut self, id: u32) {
        if let Some(flow) = self.flows.get_mut(&id) {
            self.order.remove(&flow.used);
            self.uses += 1;
            flow.used = self.uses;
            flow.when = Instant::now();
            self.order.insert(flow.used, id);
        }
    }

    /// Ends a flow here and in the guest.
    fn end(&mut self, id: u32) {
        if self.drop_flow(id) {
            self.send(&Datagram::Closed { flow: id });
        }
    }

    fn drop_flow(&mut self, id: u32) -> bool {
        let Some(flow) = self.flows.remove(&id) else {
            return false;
        };
        self.order.remove(&flow.used);
        self.by_source.remove(&flow.source);
        true
    }

    fn deliver(&mut self, message: Datagram, published: &PublishedPorts) {
        let (id, from, payload) = match message {
            Datagram::Received {
                flow,
                from,
                payload,
            } => (flow, from, payload),
            Datagram::Closed { flow } => {
                self.drop_flow(flow);
                return;
            }
            // Only ever from the host.
            Datagram::Send { .. } => return,
        };
        let Some(flow) = self.flows.get(&id) else {
            return;
        };
        let (rule, which, peer) = flow.source;
        let Some(published) = published.get(rule) else {
            return;
        };
        // To whoever asks, the host's port is one of the guest's, so nothing else answers for it.
        let expected = published.rule().guest == GuestEnd::Port(from.port());
        if !expected || !from.ip().to_canonical().is_loopback() {
            return;
        }
        if let Some(socket) = published.sockets().get(usize::from(which))
            && let Err(error) = sendto(socket, &payload, SendFlags::empty(), &peer)
        {
            tracing::trace!("a datagram to {peer} is dropped: {error}");
        }
        self.touch(id);
    }
}

fn open(guest: &Arc<dyn Guest>, poller: &Poller) -> io::Result<Framed> {
    let mut stream = guest.connect()?;
    protocol::send(&mut stream, &Open::Datagrams)?;
    let connection = Framed::new(stream, BACKLOG)?;
    poller.add(&connection, Token::Datagrams)?;
    Ok(connection)
}

/// One datagram; None where none waits.
fn receive(socket: &HostSocket, buffer: &mut [u8]) -> io::Result<Option<(usize, SocketAddr)>> {
    match recvfrom(socket, buffer, RecvFlags::empty()) {
        Ok((len, _, Some(from))) => Ok(Some((len, SocketAddr::try_from(from)?))),
        Ok((_, _, None)) => Err(ErrorKind::InvalidData.into()),
        Err(rustix::io::Errno::AGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
