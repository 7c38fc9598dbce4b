//! The event loop: a table of what each descriptor is for, and a turn for each that has work.
//!
//! An event only says that an entry may have work, as it may be for a former user of its number
//! ([`super::poller::Token`]). A turn is bounded (one buffer each way, a batch of connections), so
//! that nothing holds up anything else, and waits for nothing.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::protocol::{FromForwarder, Open};
use anyhow::{Context, Result};

use super::buffers::Buffers;
use super::control::{Control, Owner};
use super::datagram::Carrier;
use super::greeting::{Greeting, Heard};
use super::handle::{Handle, Message};
use super::joining::{Dial, Held, Resolving};
use super::listen::Listening;
use super::pair::{Pair, Progress, Side};
use super::poller::{Poller, Token};
use super::resolve::Resolver;
use super::slots::{Index, Slots};
use super::watch::Watch;
use crate::connection::Connection;
use crate::tree::Tree;

/// Connections at a time, those included that have not said yet what they are for.
const MAX_CONNECTIONS: usize = 16_384;

/// How long a connection may take over its first message, once that has begun.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait after a connection could not be accepted, so that a lasting failure does not spin.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections of the guest's programs accepted in one turn.
pub(super) const ACCEPT_BATCH: usize = 64;

/// Connections from the host accepted in one turn: all that can wait to be, as the kernel refuses what comes then.
const DOOR_BATCH: usize = 4096;

/// Turns of others after which connections from the host are accepted all the same: a round may have thousands.
const DOOR_INTERVAL: usize = 32;

const INBOX: Token = Token::Single(0);

/// A non-blocking socket to which the host connects.
pub trait Listener: AsFd {
    /// The next connection; fails with WouldBlock where there is none.
    fn accept(&self) -> io::Result<Connection>;
}

/// Takes connections that are not for the reactor, blocking again, with their first message.
pub type HandOn = Box<dyn FnMut(Connection, Open)>;

/// The event loop.
pub struct Reactor {
    pub(super) poller: Poller,
    pub(super) states: Slots<State>,
    /// Where the host's connections are accepted.
    door: Index,
    pub(super) resolver: Resolver,
    /// Connections that have a token, or get one once they are there.
    pub(super) tokens: HashMap<u64, Index>,
    pub(super) controls: HashMap<Owner, Index>,
    /// What controls are to be told, after the current turn.
    pub(super) told: Vec<(Owner, FromForwarder)>,
    /// The inodes of the sockets at which the agent listens for the host.
    pub(super) own_listeners: HashSet<u64>,
    /// The number of the latest of those things that need one of their own.
    pub(super) latest: u64,
    /// What watches the guest's listening sockets, while `watchers` do.
    pub(super) watch: Option<Index>,
    pub(super) watchers: Vec<Owner>,
    pub(super) handle: Handle,
    pub(super) buffers: Buffers,
    hand_on: HandOn,
}

/// What an entry of the table is.
pub(super) enum State {
    /// Where the host connects; what comes is paused until the time given.
    Door(Box<dyn Listener>, Option<Instant>),
    Greeting(Greeting),
    Resolving(Box<Resolving>),
    Dialing(Box<Dial>),
    Held(Held),
    Pair(Pair),
    Control(Box<Control>),
    Listening(Box<Listening>),
    Watch(Box<Watch>),
    Carrier(Box<Carrier>),
}

impl Reactor {
    /// A reactor for the connections that come to `listener`, in a machine with this root.
    pub fn new(
        listener: Box<dyn Listener>,
        handle: Handle,
        root: Arc<Tree>,
        hand_on: HandOn,
    ) -> Result<Self> {
        let poller = Poller::new().context("no epoll set can be made")?;
        poller
            .watch(&handle, INBOX)
            .context("the agent's own messages cannot be watched")?;
        let mut states = Slots::default();
        let door = states.reserve();
        poller
            .watch(&*listener, Token::Entry(door, Side::Host))
            .context("the agent's port cannot be watched")?;
        states.put(door, State::Door(listener, None));
        Ok(Self {
            poller,
            states,
            door,
            resolver: Resolver::new(handle.clone(), root),
            tokens: HashMap::new(),
            controls: HashMap::new(),
            told: Vec::new(),
            own_listeners: HashSet::new(),
            latest: 0,
            watch: None,
            watchers: Vec::new(),
            handle,
            buffers: Buffers::new(),
            hand_on,
        })
    }

    /// Serves connections; comes back only with what makes that impossible.
    pub fn run(mut self) -> Result<Infallible> {
        loop {
            self.round().context("the agent cannot wait for events")?;
        }
    }

    /// Waits for something to do, and gives everything that has some one turn.
    pub(super) fn round(&mut self) -> io::Result<()> {
        let deadline = match self.states.ready() {
            0 => self.poller.next_deadline(),
            _ => Some(Instant::now()),
        };
        self.poller.wait(deadline)?;
        while let Some((token, flags)) = self.poller.event() {
            match token {
                Token::Entry(index, side) => {
                    if let Some(State::Pair(pair)) = self.states.get_mut(index) {
                        pair.note(side, flags);
                    }
                    self.states.enqueue(index);
                }
                INBOX => self.open_inbox(),
                Token::Single(_) => {}
            }
        }
        self.expire();
        // Those that have more to do wait for the next round, after new events.
        for number in 1..=self.states.ready() {
            if let Some(index) = self.states.dequeue() {
                self.turn(index);
                self.tell();
            }
            if number % DOOR_INTERVAL == 0 {
                self.turn(self.door);
            }
        }
        Ok(())
    }

    fn open_inbox(&mut self) {
        for message in self.handle.receive() {
            match message {
                Message::Resolved(index, question, answer) => {
                    self.resolved(index, question, answer);
                }
                Message::Look(done) => {
                    self.look();
                    self.tell();
                    // Who asked may have stopped waiting.
                    let _ = done.send(());
                }
            }
        }
        self.tell();
    }

    /// Takes an entry as far as it goes in one turn.
    fn turn(&mut self, index: Index) {
        if let Some(State::Pair(pair)) = self.states.get_mut(index) {
            let look = pair.next_look();
            let progress = pair.turn(&mut self.buffers);
            if let Some(at) = pair.next_look().filter(|at| look != Some(*at)) {
                self.poller.look_at(index, at);
            }
            let watched = pair.changes_interest().map_or(Ok(()), |wanted| {
                let token = Token::Entry(index, Side::Host);
                self.poller.watch_room(pair.host(), token, wanted)
            });
            match (progress, watched) {
                (Progress::Over, _) => self.remove(index),
                (_, Err(error)) => {
                    eprintln!("mvm-agent: a connection from the host cannot be watched: {error}");
                    self.remove(index);
                }
                (Progress::More, _) => self.states.enqueue(index),
                (Progress::Idle, _) => {}
            }
            return;
        }
        let Some(state) = self.states.take(index) else {
            return;
        };
        let next = match state {
            State::Door(listener, paused) => Some(self.admit(index, listener, paused)),
            State::Greeting(greeting) => self.greet(index, greeting),
            State::Dialing(dial) => self.dial(index, dial),
            State::Control(control) => self.obey(index, control),
            State::Listening(listening) => Some(self.accept(index, listening)),
            State::Watch(watch) => Some(self.turn_watch(index, watch)),
            State::Carrier(carrier) => self.carry(index, carrier),
            waiting @ (State::Resolving(_) | State::Held(_) | State::Pair(_)) => Some(waiting),
        };
        match next {
            Some(state) => {
                let is_new_pair = matches!(state, State::Pair(_));
                self.states.put(index, state);
                if is_new_pair {
                    // What the host has to say is there already, as a rule.
                    self.turn(index);
                }
            }
            None => self.states.free(index),
        }
    }

    pub(super) fn remove(&mut self, index: Index) {
        if self.states.take(index).is_some() {
            self.states.free(index);
        }
    }

    /// A number that nothing else has.
    pub(super) fn number(&mut self) -> u64 {
        self.latest += 1;
        self.latest
    }

    /// Reads into the buffer that all share, on behalf of an entry that was taken out.
    pub(super) fn with_buffer<T>(&mut self, read: impl FnOnce(&mut [u8]) -> T) -> T {
        read(self.buffers.shared())
    }

    // --- Connections from the host ---

    fn admit(
        &mut self,
        index: Index,
        listener: Box<dyn Listener>,
        paused: Option<Instant>,
    ) -> State {
        if paused.is_some_and(|until| Instant::now() < until) {
            return State::Door(listener, paused);
        }
        for _ in 0..DOOR_BATCH {
            match listener.accept() {
                Ok(connection) => self.adopt(connection.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return State::Door(listener, None);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Out of memory or descriptors, or the peer has gone: later ones may succeed.
                Err(error) => {
                    eprintln!("mvm-agent: a connection from the host cannot be accepted: {error}");
                    let until = Instant::now() + ACCEPT_PAUSE;
                    self.poller.look_at(index, until);
                    return State::Door(listener, Some(until));
                }
            }
        }
        self.states.enqueue(index);
        State::Door(listener, None)
    }

    /// Takes over a connection that has said nothing yet.
    fn adopt(&mut self, connection: OwnedFd) {
        if self.is_full() {
            eprintln!(
                "mvm-agent: more than {MAX_CONNECTIONS} connections at a time: one is refused"
            );
            return;
        }
        let index = self.states.reserve();
        let token = Token::Entry(index, Side::Host);
        let watched = rustix::io::ioctl_fionbio(&connection, true)
            .map_err(io::Error::from)
            .and_then(|()| self.poller.watch(&connection, token));
        if let Err(error) = watched {
            eprintln!("mvm-agent: a connection from the host cannot be watched: {error}");
            return self.states.free(index);
        }
        self.states
            .put(index, State::Greeting(Greeting::new(connection)));
    }

    /// Whether there is no room for one more.
    pub(super) fn is_full(&self) -> bool {
        self.states.len() >= MAX_CONNECTIONS
    }

    fn greet(&mut self, index: Index, greeting: Greeting) -> Option<State> {
        let (caller, open) = match greeting.read() {
            Ok(Heard::Nothing(mut greeting)) => {
                if greeting.deadline.is_none() && greeting.has_begun() {
                    let deadline = Instant::now() + GREETING_TIMEOUT;
                    self.poller.look_at(index, deadline);
                    greeting.deadline = Some(deadline);
                }
                return Some(State::Greeting(greeting));
            }
            Ok(Heard::End) => return None,
            Ok(Heard::Message(caller, open)) => (caller, open),
            Err(error) => {
                eprintln!("mvm-agent: a connection from the host ended early: {error}");
                return None;
            }
        };
        let connection = match open {
            Open::Dial(target) => return self.join(index, caller, target),
            Open::Attach { token } => {
                self.attach(caller, token);
                return None;
            }
            _ => match caller.read_rest() {
                Ok(connection) => connection,
                Err(error) => {
                    eprintln!("mvm-agent: a connection from the host ended early: {error}");
                    return None;
                }
            },
        };
        match open {
            Open::Forward => Some(self.control(index, connection)),
            Open::Datagrams => self.carrier(index, connection),
            open => {
                match self.release(&connection) {
                    Ok(()) => (self.hand_on)(Connection::new(connection), open),
                    Err(error) => eprintln!(
                        "mvm-agent: a connection from the host cannot be handed on: {error}"
                    ),
                }
                None
            }
        }
    }

    fn release(&self, connection: &OwnedFd) -> io::Result<()> {
        self.poller.forget(connection)?;
        Ok(rustix::io::ioctl_fionbio(connection, false)?)
    }

    // --- Time ---

    fn expire(&mut self) {
        let now = Instant::now();
        while let Some((at, index)) = self.poller.due(now) {
            let Some(state) = self.states.get_mut(index) else {
                continue;
            };
            if state.deadline() != Some(at) {
                continue;
            }
            match state {
                State::Door(..) | State::Listening(_) | State::Watch(_) | State::Carrier(_) => {
                    self.states.enqueue(index);
                }
                State::Resolving(_) | State::Dialing(_) | State::Held(_) => {
                    if let Some(state) = self.states.take(index) {
                        self.states.free(index);
                        self.timed_out(state);
                    }
                }
                State::Pair(pair) => {
                    pair.look(now);
                    if let Some(at) = pair.next_look() {
                        self.poller.look_at(index, at);
                    }
                    self.states.enqueue(index);
                }
                State::Greeting(_) | State::Control(_) => self.remove(index),
            }
        }
        self.tell();
    }
}

impl State {
    /// Whether it listens, or is about to, for that control under that number.
    pub(super) fn listens_as(&self, owner: Owner, id: u32) -> bool {
        match self {
            Self::Listening(listening) => (listening.owner, listening.id) == (owner, id),
            Self::Resolving(resolving) => resolving.listens_as(owner, id),
            _ => false,
        }
    }

    /// When it has waited long enough for whatever it waits for.
    fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Door(_, paused) => *paused,
            Self::Greeting(greeting) => greeting.deadline,
            Self::Resolving(resolving) => Some(resolving.deadline),
            Self::Dialing(dial) => Some(dial.deadline),
            Self::Held(held) => Some(held.deadline),
            Self::Listening(listening) => listening.paused,
            Self::Watch(watch) => watch.next,
            Self::Carrier(carrier) => carrier.sweep,
            Self::Pair(pair) => pair.next_look(),
            Self::Control(_) => None,
        }
    }
}
