//! What the forwarder's thread waits for.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::time::Timespec;

/// Events taken at a time.
const BATCH: usize = 256;

/// Whose descriptor it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Token {
    /// Somebody sent a command.
    Wake,
    /// The control connection to the agent.
    Control,
    /// The connection that carries datagrams.
    Datagrams,
    /// A listener or UDP socket: the number of its rule, and which of its sockets.
    Host(u32, u8),
    /// A connection to a program of the host that is being made.
    Connecting(u32),
}

impl Token {
    fn pack(self) -> u64 {
        let of =
            |kind: u64, which: u8, id: u32| kind << 48 | u64::from(which) << 32 | u64::from(id);
        match self {
            Self::Wake => of(0, 0, 0),
            Self::Control => of(1, 0, 0),
            Self::Datagrams => of(2, 0, 0),
            Self::Host(id, which) => of(3, which, id),
            Self::Connecting(id) => of(4, 0, id),
        }
    }

    fn unpack(word: u64) -> Self {
        let id = word as u32;
        match word >> 48 {
            0 => Self::Wake,
            1 => Self::Control,
            2 => Self::Datagrams,
            3 => Self::Host(id, (word >> 32) as u8),
            _ => Self::Connecting(id),
        }
    }
}

/// What there is to do for a descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    /// Whose it is.
    pub token: Token,
    /// There is something to read, an end, or an error.
    pub readable: bool,
    /// There is room to write, or an error.
    pub writable: bool,
}

/// An epoll set; level-triggered, so that work left over shows again.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
}

impl Poller {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
        })
    }

    /// Waits for reading from `fd`.
    pub fn add(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        let data = EventData::new_u64(token.pack());
        Ok(epoll::add(&self.epoll, fd, data, EventFlags::IN)?)
    }

    /// Waits for room to write to `fd`, and nothing else.
    pub fn add_writer(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        let data = EventData::new_u64(token.pack());
        Ok(epoll::add(&self.epoll, fd, data, EventFlags::OUT)?)
    }

    /// Waits for reading, and with `room` for room to write, from now on.
    pub fn change(&self, fd: impl AsFd, token: Token, room: bool) -> io::Result<()> {
        let flags = match room {
            true => EventFlags::IN | EventFlags::OUT,
            false => EventFlags::IN,
        };
        let data = EventData::new_u64(token.pack());
        Ok(epoll::modify(&self.epoll, fd, data, flags)?)
    }

    /// Waits for nothing from `fd` any more. What is not there is not missed.
    pub fn remove(&self, fd: impl AsFd) {
        if let Err(error) = epoll::delete(&self.epoll, fd)
            && error != rustix::io::Errno::NOENT
        {
            tracing::debug!("a descriptor cannot be taken out of an epoll set: {error}");
        }
    }

    /// Waits until something is ready or `deadline` has passed.
    pub fn wait(&self, deadline: Option<Instant>) -> io::Result<Vec<Ready>> {
        // Rounded up: a deadline that is nearly there must not make this a busy loop.
        let left = |at: Instant| at.saturating_duration_since(Instant::now());
        let timeout = deadline.map(|at| (left(at) + Duration::from_micros(999)).as_millis());
        let timeout = timeout.map(|ms| Timespec {
            tv_sec: i64::try_from(ms / 1000).unwrap_or(i64::MAX),
            tv_nsec: (ms % 1000) as i64 * 1_000_000,
        });
        let mut events = [MaybeUninit::<Event>::uninit(); BATCH];
        let events = match epoll::wait(&self.epoll, &mut events[..], timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => &mut [],
            Err(error) => return Err(error.into()),
        };
        let ready = |event: &Event| {
            let flags = event.flags;
            let broken = flags.intersects(EventFlags::ERR | EventFlags::HUP);
            Ready {
                token: Token::unpack(event.data.u64()),
                readable: broken || flags.contains(EventFlags::IN),
                writable: broken || flags.contains(EventFlags::OUT),
            }
        };
        Ok(events.iter().map(ready).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        let ids = [0, 1, 77, u32::MAX];
        let mut tokens = vec![Token::Wake, Token::Control, Token::Datagrams];
        tokens.extend(ids.map(Token::Connecting));
        tokens.extend(ids.map(|id| Token::Host(id, 1)));
        tokens.extend(ids.map(|id| Token::Host(id, u8::MAX)));
        for token in tokens {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
