//! Datagrams between the host and sockets of the guest.
//!
//! What the host does not take stays in the sockets' own buffers, where the kernel drops what comes
//! once they are full: nothing is queued here but the rest of one message.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use agent::protocol::{DialError, Target};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use serde::{Deserialize, Serialize};

use super::flow::Flow;
use super::frames::{self, Arrival, Frames};
use super::pair::Side;
use super::poller::Token;
use super::reactor::{Reactor, State};
use super::resolve::{Answer, Found, Plan, Question};
use super::slots::Index;

/// Flows of one connection; the one that was not used for longest makes room for another.
const MAX_FLOWS: usize = 4096;

/// Connections for datagrams at a time.
const MAX_CARRIERS: usize = 64;

/// The longest message: the longest datagram, the longest name, and what is around them.
const MAX_MESSAGE: usize = 66 << 10;

/// Sockets that are read in one turn, and datagrams of each.
const BATCH: usize = 64;
const BATCH_OF_ONE: usize = 16;

/// How often idle flows are looked for.
const SWEEP: Duration = Duration::from_secs(5);

/// Names whose address is known or asked for, how long it is known, and datagrams that wait for it.
const MAX_NAMES: usize = 256;
const NAME_KEPT: Duration = Duration::from_secs(60);
const MAX_WAITING: usize = 16;
const NAME_TIMEOUT: Duration = Duration::from_secs(10);

/// [`agent::protocol::Datagram`] with the payload where it is.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Message<'a> {
    Send {
        flow: u32,
        to: Target,
        #[serde(borrow, with = "payload")]
        payload: &'a [u8],
    },
    Received {
        flow: u32,
        from: SocketAddr,
        #[serde(borrow, with = "payload")]
        payload: &'a [u8],
    },
    Closed {
        flow: u32,
    },
}

/// A connection that carries datagrams.
#[derive(Debug)]
pub struct Carrier {
    frames: Frames,
    flows: Flows,
    /// When to look for idle flows next.
    pub sweep: Option<Instant>,
}

#[derive(Debug)]
struct Flows {
    by_number: HashMap<u32, Flow>,
    /// An epoll set of their sockets.
    ready: OwnedFd,
    /// Each with the time at which it is forgotten.
    names: HashMap<String, (Name, Instant)>,
    /// Names to ask for.
    asked: Vec<String>,
    /// Flows whose end the host is to be told.
    closed: Vec<u32>,
}

/// What is known of a name.
#[derive(Debug)]
enum Name {
    Known(IpAddr),
    /// Asked for under this number; flow, port and payload of what waits.
    Asked(u64, Vec<(u32, u16, Vec<u8>)>),
}

impl Reactor {
    /// Takes over a connection that is to carry datagrams.
    pub(super) fn carrier(&mut self, index: Index, connection: OwnedFd) -> Option<State> {
        if self
            .states
            .count(|state| matches!(state, State::Carrier(_)))
            >= MAX_CARRIERS
        {
            eprintln!("mvm-agent: more than {MAX_CARRIERS} connections for datagrams at a time");
            return None;
        }
        let made = epoll::create(CreateFlags::CLOEXEC).map_err(io::Error::from);
        let made = made.and_then(|ready| {
            self.poller
                .watch(&ready, Token::Entry(index, Side::Guest))?;
            Ok(ready)
        });
        match made {
            Ok(ready) => {
                self.states.enqueue(index);
                Some(State::Carrier(Box::new(Carrier::new(connection, ready))))
            }
            Err(error) => {
                eprintln!("mvm-agent: datagrams cannot be carried: {error}");
                None
            }
        }
    }

    /// Carries datagrams both ways.
    pub(super) fn carry(&mut self, index: Index, mut carrier: Box<Carrier>) -> Option<State> {
        let now = Instant::now();
        let carried = self.with_buffer(|buffer| carrier.turn(buffer, now));
        match carried {
            Ok(Arrival::More) => self.states.enqueue(index),
            Ok(Arrival::Dry) => {}
            Ok(Arrival::End) => return None,
            Err(error) => {
                eprintln!("mvm-agent: the host's connection for datagrams ended early: {error}");
                return None;
            }
        }
        for name in std::mem::take(&mut carrier.flows.asked) {
            let number = self.number();
            let question = Question::Name(name.clone(), 0);
            let asked = self
                .resolver
                .ask(index, number, question, now + NAME_TIMEOUT);
            carrier.flows.was_asked(&name, number, asked);
        }
        let is_empty = carrier.flows.by_number.is_empty() && carrier.flows.names.is_empty();
        if carrier.sweep.is_none() && !is_empty {
            carrier.sweep = Some(now + SWEEP);
            self.poller.look_at(index, now + SWEEP);
        }
        Some(State::Carrier(carrier))
    }
}

impl Carrier {
    fn new(connection: OwnedFd, ready: OwnedFd) -> Self {
        Self {
            frames: Frames::new(connection, MAX_MESSAGE),
            flows: Flows {
                by_number: HashMap::new(),
                ready,
                names: HashMap::new(),
                asked: Vec::new(),
                closed: Vec::new(),
            },
            sweep: None,
        }
    }

    fn turn(&mut self, buffer: &mut [u8], now: Instant) -> io::Result<Arrival> {
        if self.sweep.is_some_and(|at| at <= now) {
            self.sweep = None;
            self.flows.sweep(now);
        }
        self.frames.flush()?;
        let flows = &mut self.flows;
        let arrival = self.frames.read(buffer, |frame| {
            let message = postcard::from_bytes(frame).map_err(frames::invalid)?;
            flows.take(message, now);
            Ok(())
        })?;
        match (arrival, self.return_datagrams(buffer, now)?) {
            (Arrival::Dry, more) => Ok(more),
            (arrival, _) => Ok(arrival),
        }
    }

    /// Passes on what came from the guest, as far as the host takes it.
    fn return_datagrams(&mut self, buffer: &mut [u8], now: Instant) -> io::Result<Arrival> {
        while self.frames.backlog() == 0
            && let Some(flow) = self.flows.closed.pop()
        {
            self.frames.push(&Message::Closed { flow })?;
        }
        let mut ready: Vec<Event> = Vec::with_capacity(BATCH);
        if self.frames.backlog() == 0 {
            let at_once = Timespec::default();
            let spare = rustix::buffer::spare_capacity(&mut ready);
            epoll::wait(&self.flows.ready, spare, Some(&at_once))?;
        }
        for event in &ready {
            // It was put in as one.
            let number = event.data.u64() as u32;
            let Some(flow) = self.flows.by_number.get_mut(&number) else {
                continue;
            };
            for _ in 0..BATCH_OF_ONE {
                if self.frames.backlog() > 0 {
                    return Ok(Arrival::Dry);
                }
                let Some((length, from)) = flow.receive(buffer, now) else {
                    break;
                };
                self.frames.push(&Message::Received {
                    flow: number,
                    from,
                    payload: buffer.get(..length).unwrap_or_default(),
                })?;
            }
        }
        match ready.is_empty() {
            true => Ok(Arrival::Dry),
            false => Ok(Arrival::More),
        }
    }

    /// Sends what waited for a name, if this was asked by it.
    pub fn resolved(&mut self, question: u64, answer: Answer) {
        self.flows.resolved(question, answer);
    }
}

impl Flows {
    /// Does what a message of the host says.
    fn take(&mut self, message: Message<'_>, now: Instant) {
        match message {
            Message::Send { flow, to, payload } => self.send(flow, to, payload, now),
            Message::Closed { flow } => {
                self.by_number.remove(&flow);
            }
            // Only the guest receives.
            Message::Received { .. } => {}
        }
    }

    fn send(&mut self, number: u32, to: Target, payload: &[u8], now: Instant) {
        let Some(flow) = self.flow(number, now) else {
            return;
        };
        match to {
            Target::Loopback(port) => flow.send_to_loopback(port, payload, now),
            to => match Plan::of(to) {
                Plan::Connect(addresses) => match addresses.as_slice() {
                    [address] => flow.send(*address, payload, now),
                    [address, ..] => flow.send_to_loopback(address.port(), payload, now),
                    [] => {}
                },
                Plan::Ask(Question::Name(name, port)) => {
                    self.send_to_name(number, name, port, payload, now);
                }
                // There is no such peer, so nothing arrives there.
                Plan::Ask(_) | Plan::Impossible(_) => {}
            },
        }
    }

    fn send_to_name(&mut self, number: u32, name: String, port: u16, payload: &[u8], now: Instant) {
        if self.names.len() >= MAX_NAMES && !self.names.contains_key(&name) {
            return;
        }
        match self.names.get_mut(&name) {
            Some((Name::Known(address), _)) => {
                let to = SocketAddr::new(*address, port);
                if let Some(flow) = self.by_number.get_mut(&number) {
                    flow.send(to, payload, now);
                }
            }
            Some((Name::Asked(_, waiting), _)) => {
                if waiting.len() < MAX_WAITING {
                    waiting.push((number, port, payload.to_vec()));
                }
            }
            None => {
                let asked = Name::Asked(0, vec![(number, port, payload.to_vec())]);
                self.names.insert(name.clone(), (asked, now + NAME_TIMEOUT));
                self.asked.push(name);
            }
        }
    }

    /// Notes the number under which a name was asked for.
    fn was_asked(&mut self, name: &str, number: u64, asked: Result<(), String>) {
        match (asked, self.names.get_mut(name)) {
            (Ok(()), Some((Name::Asked(question, _), _))) => *question = number,
            _ => {
                self.names.remove(name);
            }
        }
    }

    fn resolved(&mut self, question: u64, answer: Answer) {
        let is_meant = |name: &Name| matches!(name, Name::Asked(number, _) if *number == question);
        let mut names = self.names.iter();
        let Some(name) = names.find_map(|(name, (state, _))| is_meant(state).then(|| name.clone()))
        else {
            return;
        };
        let Some((Name::Asked(_, waiting), _)) = self.names.remove(&name) else {
            return;
        };
        let address = match answer {
            Ok(Found::Addresses(addresses)) => addresses.first().map(SocketAddr::ip),
            Ok(_) | Err(DialError::NoSuchHost) => None,
            Err(error) => {
                eprintln!("mvm-agent: datagrams to {name} are lost: {error:?}");
                None
            }
        };
        let Some(address) = address else {
            return;
        };
        let now = Instant::now();
        for (number, port, payload) in waiting {
            if let Some(flow) = self.by_number.get_mut(&number) {
                flow.send(SocketAddr::new(address, port), &payload, now);
            }
        }
        self.names
            .insert(name, (Name::Known(address), now + NAME_KEPT));
    }

    /// The flow of that number, made where it is new; none where it cannot be.
    fn flow(&mut self, number: u32, now: Instant) -> Option<&mut Flow> {
        if !self.by_number.contains_key(&number) {
            if self.by_number.len() >= MAX_FLOWS {
                self.make_room();
            }
            match self.open(number, now) {
                Ok(flow) => {
                    self.by_number.insert(number, flow);
                }
                Err(error) => {
                    eprintln!("mvm-agent: a flow of datagrams cannot begin: {error}");
                    self.closed.push(number);
                }
            }
        }
        self.by_number.get_mut(&number)
    }

    fn open(&self, number: u32, now: Instant) -> io::Result<Flow> {
        let flow = Flow::new(now)?;
        let data = EventData::new_u64(number.into());
        epoll::add(&self.ready, &flow, data, EventFlags::IN)?;
        Ok(flow)
    }

    fn make_room(&mut self) {
        let oldest = self.by_number.iter().min_by_key(|(_, flow)| flow.used());
        if let Some((&number, _)) = oldest {
            self.by_number.remove(&number);
            self.closed.push(number);
        }
    }

    fn sweep(&mut self, now: Instant) {
        for (number, _) in self.by_number.extract_if(|_, flow| flow.is_over(now)) {
            self.closed.push(number);
        }
        self.names.retain(|_, (_, until)| *until > now);
    }
}

/// A payload in one piece, as postcard writes a sequence of bytes too.
mod payload {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(payload: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(payload)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<&'de [u8], D::Error> {
        <&[u8]>::deserialize(deserializer)
    }
}
