//! What the event loop waits for: descriptors in an epoll set, and deadlines.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

use super::pair::Side;
use super::slots::Index;

/// Events taken from the kernel at a time.
const EVENTS: usize = 256;

/// What an event is for.
///
/// Events are hints: a descriptor that was closed here lives on in a child between fork and exec,
/// so an event may be for the former user of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// One side of an entry of the table.
    Entry(Index, Side),
    /// Something that there is one of, by a number of its own.
    Single(u32),
}

/// Waits for events and deadlines.
pub struct Poller {
    epoll: OwnedFd,
    /// When to look at which entry; stale where the entry has another deadline by then.
    deadlines: BinaryHeap<Reverse<(Instant, Index)>>,
    events: Vec<Event>,
}

impl Poller {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            deadlines: BinaryHeap::new(),
            events: Vec::with_capacity(EVENTS),
        })
    }

    /// Watches `descriptor` for all that can happen to it, edge-triggered. The first event comes at
    /// once where something is there already.
    pub fn watch(&self, descriptor: impl AsFd, token: Token) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, descriptor, token.data(), EDGES)?)
    }

    /// Gives a watched descriptor another token; what is there already is told again.
    pub fn rename(&self, descriptor: impl AsFd, token: Token) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, descriptor, token.data(), EDGES)?)
    }

    /// Has events tell that a watched descriptor takes more, or not; what is there already is told again.
    pub fn watch_room(&self, descriptor: impl AsFd, token: Token, wanted: bool) -> io::Result<()> {
        let events = match wanted {
            true => EDGES,
            false => EDGES.difference(EventFlags::OUT),
        };
        Ok(epoll::modify(
            &self.epoll,
            descriptor,
            token.data(),
            events,
        )?)
    }

    /// Watches it no more, though it stays open.
    pub fn forget(&self, descriptor: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, descriptor)?)
    }

    /// Has the entry looked at when that time has come.
    pub fn look_at(&mut self, index: Index, at: Instant) {
        self.deadlines.push(Reverse((at, index)));
    }

    /// An entry whose time has come, and which time that was.
    pub fn due(&mut self, now: Instant) -> Option<(Instant, Index)> {
        let &Reverse((at, _)) = self.deadlines.peek()?;
        (at <= now).then(|| self.deadlines.pop().map(|Reverse(due)| due))?
    }

    /// The next deadline.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.peek().map(|Reverse((at, _))| *at)
    }

    /// Waits for events until `deadline`, or for ever.
    pub fn wait(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        let timeout = deadline.map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            // Deadlines are seconds away, so neither part overflows.
            Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        self.events.clear();
        let spare = rustix::buffer::spare_capacity(&mut self.events);
        match epoll::wait(&self.epoll, spare, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// What happened, most recent first.
    pub fn event(&mut self) -> Option<(Token, EventFlags)> {
        let event = self.events.pop()?;
        Some((Token::from(event.data.u64()), event.flags))
    }
}

const EDGES: EventFlags = EventFlags::IN
    .union(EventFlags::PRI)
    .union(EventFlags::OUT)
    .union(EventFlags::RDHUP)
    .union(EventFlags::ET);

const SINGLE: u64 = 1 << 63;

impl Token {
    fn data(self) -> EventData {
        EventData::new_u64(match self {
            Self::Entry(index, Side::Host) => u64::from(index) << 1,
            Self::Entry(index, Side::Guest) => u64::from(index) << 1 | 1,
            Self::Single(number) => SINGLE | u64::from(number),
        })
    }
}

impl From<u64> for Token {
    fn from(data: u64) -> Self {
        // What was put into one word comes out of it: no cast loses anything.
        match (data & SINGLE, data & 1) {
            (0, 0) => Self::Entry((data >> 1) as Index, Side::Host),
            (0, _) => Self::Entry((data >> 1) as Index, Side::Guest),
            _ => Self::Single(data as u32),
        }
    }
}
