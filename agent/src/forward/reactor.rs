//! The event loop: one epoll set, and a table of what each descriptor in it is for.
//!
//! Events are edge-triggered, and hints: a descriptor that was closed here lives on in a child
//! between fork and exec, so an event may be for the former user of an index. What is ready takes
//! turns, one buffer each way at a time, so that no connection holds up another. There is no thread,
//! no allocation and no system call per connection and packet but those that carry the bytes.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use agent::protocol::{Open, Target};
use anyhow::{Context, Result};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;

use super::dial::{self, Dialed, Dialing};
use super::greeting::{Greeting, Heard};
use super::pair::{self, Pair, Progress, Side};
use super::slots::{Index, Slots};
use crate::connection::Connection;

/// Connections at a time, those included that have not said yet what they are for.
const MAX_CONNECTIONS: usize = 16_384;

/// How long a connection may take over its first message.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it may take to connect to something in the guest.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait after a connection could not be accepted, so that a lasting failure does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections accepted before others get their turn.
const ACCEPT_BATCH: usize = 64;

/// Events taken from the kernel at a time.
const EVENTS: usize = 256;

/// The event of the listening socket; other events carry an index and a side.
const LISTENER: u64 = u64::MAX;

/// A non-blocking socket to which the host connects.
pub trait Listener: AsFd {
    /// The next connection; fails with WouldBlock where there is none.
    fn accept(&self) -> io::Result<Connection>;
}

/// The event loop.
pub struct Reactor {
    epoll: OwnedFd,
    listener: Box<dyn Listener>,
    states: Slots<State>,
    /// Pairs with something to do.
    ready: VecDeque<Index>,
    /// When to look at which entry; stale where the entry has another deadline by then.
    timers: BinaryHeap<Reverse<(Instant, Index)>>,
    /// When to accept again.
    accept_at: Option<Instant>,
    buffer: Box<[u8]>,
    hand_on: HandOn,
}

/// Takes connections that are not for the reactor, blocking again, with their first message.
pub type HandOn = Box<dyn FnMut(Connection, Open)>;

enum State {
    Greeting(Greeting),
    Dialing(Box<Dialing>, OwnedFd),
    /// The flag says that it is in `ready`.
    Pair(Pair, bool),
}

impl Reactor {
    /// A reactor for the connections that come to `listener`.
    pub fn new(listener: Box<dyn Listener>, hand_on: HandOn) -> Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).context("no epoll set can be made")?;
        let data = EventData::new_u64(LISTENER);
        epoll::add(&epoll, &listener, data, EventFlags::IN)
            .context("the agent's port cannot be watched")?;
        Ok(Self {
            epoll,
            listener,
            states: Slots::default(),
            ready: VecDeque::new(),
            timers: BinaryHeap::new(),
            accept_at: None,
            buffer: vec![0; pair::READ_SIZE_MAX].into_boxed_slice(),
            hand_on,
        })
    }

    /// Serves connections; comes back only with what makes that impossible.
    pub fn run(mut self) -> Result<Infallible> {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            let timeout = self.timeout();
            events.clear();
            let spare = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, spare, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("the agent cannot wait for events"),
            }
            for event in &events {
                self.handle(event.data.u64(), event.flags);
            }
            self.expire();
            // Those that become ready again wait for the next round, after new events.
            for _ in 0..self.ready.len() {
                if let Some(index) = self.ready.pop_front() {
                    self.turn(index);
                }
            }
        }
    }

    fn timeout(&self) -> Option<Timespec> {
        if !self.ready.is_empty() {
            return Some(Timespec::default());
        }
        let next = self.timers.peek().map(|Reverse((at, _))| *at);
        let next = [next, self.accept_at].into_iter().flatten().min()?;
        let left = next.saturating_duration_since(Instant::now());
        // Deadlines are seconds away, so neither part overflows.
        Some(Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        })
    }

    fn handle(&mut self, token: u64, flags: EventFlags) {
        if token == LISTENER {
            return self.accept();
        }
        let (index, side) = from_token(token);
        match self.states.get_mut(index) {
            Some(State::Pair(pair, queued)) => {
                pair.note(side, flags);
                if !std::mem::replace(queued, true) {
                    self.ready.push_back(index);
                }
            }
            Some(State::Dialing(..)) if side == Side::Host => {}
            _ => self.advance(index),
        }
    }

    // --- Connections from the host ---

    fn accept(&mut self) {
        for _ in 0..ACCEPT_BATCH {
            match self.listener.accept() {
                Ok(connection) => self.adopt(connection.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Out of memory or descriptors, or the peer has gone: later ones may succeed.
                Err(error) => {
                    eprintln!("mvm-agent: a connection from the host cannot be accepted: {error}");
                    return self.pause_accepting();
                }
            }
        }
    }

    fn pause_accepting(&mut self) {
        let data = EventData::new_u64(LISTENER);
        match epoll::modify(&self.epoll, &self.listener, data, EventFlags::empty()) {
            Ok(()) => self.accept_at = Some(Instant::now() + ACCEPT_PAUSE),
            Err(error) => eprintln!("mvm-agent: accepting cannot be paused: {error}"),
        }
    }

    fn resume_accepting(&mut self) {
        self.accept_at = None;
        let data = EventData::new_u64(LISTENER);
        if let Err(error) = epoll::modify(&self.epoll, &self.listener, data, EventFlags::IN) {
            eprintln!("mvm-agent: accepting cannot be resumed: {error}");
            self.accept_at = Some(Instant::now() + ACCEPT_PAUSE);
        }
    }

    /// Takes over a connection that has said nothing yet.
    fn adopt(&mut self, connection: OwnedFd) {
        if self.states.len() >= MAX_CONNECTIONS {
            eprintln!(
                "mvm-agent: more than {MAX_CONNECTIONS} connections at a time: one is refused"
            );
            return;
        }
        let index = self.states.reserve();
        let watched = rustix::io::ioctl_fionbio(&connection, true)
            .map_err(io::Error::from)
            .and_then(|()| watch(&self.epoll, &connection, index, Side::Host));
        if let Err(error) = watched {
            eprintln!("mvm-agent: a connection from the host cannot be watched: {error}");
            return self.states.free(index);
        }
        // Its first event comes at once where the message is there already.
        let deadline = Instant::now() + GREETING_TIMEOUT;
        self.timers.push(Reverse((deadline, index)));
        let greeting = Greeting::new(connection, deadline);
        self.states.put(index, State::Greeting(greeting));
    }

    /// Takes an entry as far as it goes without waiting.
    fn advance(&mut self, index: Index) {
        let Some(state) = self.states.take(index) else {
            return;
        };
        let next = match state {
            State::Greeting(greeting) => self.greet(index, greeting),
            State::Dialing(dialing, host) => self.dial(index, dialing, host),
            pair @ State::Pair(..) => Some(pair),
        };
        match next {
            Some(state) => self.states.put(index, state),
            None => self.states.free(index),
        }
    }

    fn greet(&mut self, index: Index, greeting: Greeting) -> Option<State> {
        let (connection, open) = match greeting.read() {
            Ok(Heard::Nothing(greeting)) => return Some(State::Greeting(greeting)),
            Ok(Heard::End) => return None,
            Ok(Heard::Message(connection, open)) => (connection, open),
            Err(error) => {
                eprintln!("mvm-agent: a connection from the host ended early: {error}");
                return None;
            }
        };
        match open {
            Open::Dial(Target::Loopback(port)) => {
                let deadline = Instant::now() + DIAL_TIMEOUT;
                self.timers.push(Reverse((deadline, index)));
                let dialing = Dialing::new(dial::loopback(port), deadline);
                self.dial(index, Box::new(dialing), connection)
            }
            // Closed without an answer, which is a reset.
            Open::Dial(_) | Open::Attach { .. } | Open::Forward | Open::Datagrams => None,
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

    fn release(&self, connection: &OwnedFd) -> rustix::io::Result<()> {
        epoll::delete(&self.epoll, connection)?;
        rustix::io::ioctl_fionbio(connection, false)
    }

    // --- Connections to the guest ---

    fn dial(&mut self, index: Index, mut dialing: Box<Dialing>, host: OwnedFd) -> Option<State> {
        let epoll = &self.epoll;
        match dialing.proceed(|socket| watch(epoll, socket, index, Side::Guest)) {
            Dialed::Waiting => Some(State::Dialing(dialing, host)),
            Dialed::Connected(guest) => {
                self.ready.push_back(index);
                Some(State::Pair(Pair::new(host, guest), true))
            }
            Dialed::Failed(_) => None,
        }
    }

    fn turn(&mut self, index: Index) {
        let Some(State::Pair(pair, queued)) = self.states.get_mut(index) else {
            return;
        };
        match pair.turn(&mut self.buffer) {
            Progress::More => self.ready.push_back(index),
            Progress::Idle => *queued = false,
            Progress::Over => {
                self.states.take(index);
                self.states.free(index);
            }
        }
    }

    // --- Time ---

    fn expire(&mut self) {
        let now = Instant::now();
        if self.accept_at.is_some_and(|at| at <= now) {
            self.resume_accepting();
        }
        while let Some(&Reverse((at, index))) = self.timers.peek()
            && at <= now
        {
            self.timers.pop();
            let deadline = match self.states.get_mut(index) {
                Some(State::Greeting(greeting)) => Some(greeting.deadline),
                Some(State::Dialing(dialing, _)) => Some(dialing.deadline),
                Some(State::Pair(..)) | None => None,
            };
            if deadline == Some(at) {
                self.states.take(index);
                self.states.free(index);
            }
        }
    }
}

/// Watches `socket` for everything; each event carries the index and the side.
fn watch(epoll: &OwnedFd, socket: &OwnedFd, index: Index, side: Side) -> io::Result<()> {
    let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
    let token = u64::from(index) << 1 | u64::from(side == Side::Guest);
    Ok(epoll::add(
        epoll,
        socket.as_fd(),
        EventData::new_u64(token),
        flags,
    )?)
}

fn from_token(token: u64) -> (Index, Side) {
    let side = match token & 1 {
        0 => Side::Host,
        _ => Side::Guest,
    };
    // What was shifted out of an index fits into one.
    ((token >> 1) as Index, side)
}
