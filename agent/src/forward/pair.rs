//! Two stream sockets that are joined: the host's connection, and one to something in the guest.
//!
//! Bytes go from one to the other through a buffer that all pairs share. What an end does not take
//! at once waits with the pair, no longer than it has to; meanwhile nothing is read for that end, so
//! a slow reader slows its writer down and nobody else. An idle pair is two descriptors and 64 bytes
//! here; the kernel's sockets outweigh it many times. A stalled one has up to 16 KiB more for each
//! direction, and 256 KiB as long as no more than 64 MiB are lent to all of them ([`Buffers`]).
//!
//! An end of file is passed on as a half-close. A reset is passed on as one: the host's connection
//! is closed without having been shut down for writing, a TCP connection with SO_LINGER 0. As TCP
//! does, a reset overtakes what the other end has no room for, and nothing else.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, Shutdown, send, shutdown, sockopt};

use super::buffers::{Buffers, Rest};
use super::greeting::Caller;
use super::pace::Pace;

/// What is read at a time of a connection that has carried little so far, or takes little.
const READ_SIZE_MIN: usize = 16 << 10;

/// How often a direction is served before a reset is passed on: no more than what sockets hold.
const LAST_ROUNDS: usize = 64;

/// Which end of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The host's connection.
    Host,
    /// The connection to something in the guest.
    Guest,
}

/// What a turn has led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// There is more to do at once.
    More,
    /// Nothing to do until the next event.
    Idle,
    /// Both directions ended, or one end was reset: the pair is to be dropped.
    Over,
}

/// Two joined sockets.
#[derive(Debug)]
pub struct Pair {
    host: End,
    guest: End,
    /// Of what the host sends.
    pace: Pace,
    /// Whether events tell that the host takes more.
    hears_of_room: bool,
}

#[derive(Debug)]
struct End {
    socket: OwnedFd,
    side: Side,
    /// Reading may give something.
    readable: bool,
    /// Writing may take something.
    writable: bool,
    /// Its last byte was read.
    ended: bool,
    /// It was told that no more bytes come.
    shut: bool,
    /// Its peer is gone, and so are bytes that it was to get.
    broken: bool,
    /// An event said that its peer ended or is gone; which of the two was not asked yet.
    suspect: bool,
    /// A read that gives less than there is room for has emptied it, and the next event tells of more.
    /// Not before it was seen empty, nor where the end or urgent data may follow what was read.
    short_read_empties: bool,
    /// Each message with descriptors ends a read.
    may_carry_descriptors: bool,
    /// Bytes to be read that are not for the other end.
    unread: usize,
    /// Bytes that were read in this turn.
    read: usize,
    /// How much is read for it at a time, as a power of two times [`READ_SIZE_MIN`].
    appetite: u8,
    /// What it did not take yet: never empty.
    leftover: Option<Box<Rest>>,
}

impl Pair {
    /// Joins two connected, non-blocking sockets; the one in the guest is of this family.
    pub fn new(host: Caller, guest: OwnedFd, family: AddressFamily) -> Self {
        let mut pair = Self {
            host: End::new(host.connection, Side::Host),
            guest: End::new(guest, Side::Guest),
            pace: Pace::new(),
            hears_of_room: true,
        };
        pair.host.unread = host.unread;
        pair.guest.may_carry_descriptors = family == AddressFamily::UNIX;
        pair
    }

    /// Takes note of an event, which is a hint only: it may be stale.
    pub fn note(&mut self, side: Side, flags: EventFlags) {
        let end = match side {
            Side::Host => &mut self.host,
            Side::Guest => &mut self.guest,
        };
        let closed = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
        end.readable |= flags.intersects(EventFlags::IN | closed);
        end.writable |= flags.intersects(EventFlags::OUT | closed);
        if flags.contains(EventFlags::ERR) {
            end.broken |= !matches!(sockopt::socket_error(&end.socket), Ok(Ok(())));
        }
        end.suspect |= flags.intersects(closed);
        if flags.intersects(closed | EventFlags::PRI) {
            end.short_read_empties = false;
        }
    }

    /// When to [`look`](Self::look), if ever.
    pub fn next_look(&self) -> Option<Instant> {
        self.pace.next_look()
    }

    /// Has the next turn read what may be there, though no event told of it.
    pub fn look(&mut self, now: Instant) {
        self.pace.look(&self.host.socket, now);
        self.host.readable = true;
    }

    /// Whether events are to tell from now on that the host takes more, where that is news. Vsock tells of it with each
    /// packet that comes, which would wake for each what is not to be woken so often.
    pub fn changes_interest(&mut self) -> Option<bool> {
        let wanted = self.next_look().is_none() || !self.host.writable;
        let known = std::mem::replace(&mut self.hears_of_room, wanted);
        (known != wanted).then_some(wanted)
    }

    /// The host's connection.
    pub fn host(&self) -> BorrowedFd<'_> {
        self.host.socket.as_fd()
    }

    /// Carries up to one buffer each way.
    pub fn turn(&mut self, buffers: &mut Buffers) -> Progress {
        let in_ = self.host.carry_to(&mut self.guest, buffers);
        let read = std::mem::take(&mut self.host.read);
        if read > 0 {
            self.pace.read(&self.host.socket, read, Instant::now());
        }
        let out = self.guest.carry_to(&mut self.host, buffers);
        if self.host.broken || self.guest.broken {
            self.reset(buffers);
            return Progress::Over;
        }
        match (in_, out) {
            (Progress::Over, Progress::Over) => Progress::Over,
            (Progress::More, _) | (_, Progress::More) => Progress::More,
            _ => Progress::Idle,
        }
    }

    /// Hands over what the broken end's peer had sent, as far as there is room for it at once.
    fn reset(&mut self, buffers: &mut Buffers) {
        let (broken, other) = match self.host.broken {
            true => (&mut self.host, &mut self.guest),
            false => (&mut self.guest, &mut self.host),
        };
        for _ in 0..LAST_ROUNDS {
            if other.broken || broken.pass_on(other, buffers) != Progress::More {
                break;
            }
        }
        reset(&self.guest.socket);
    }
}

impl End {
    fn new(socket: OwnedFd, side: Side) -> Self {
        Self {
            socket,
            side,
            readable: true,
            writable: true,
            ended: false,
            shut: false,
            broken: false,
            suspect: false,
            short_read_empties: false,
            may_carry_descriptors: false,
            unread: 0,
            read: 0,
            appetite: 0,
            leftover: None,
        }
    }

    /// Carries bytes to `to`, and the end of them.
    fn carry_to(&mut self, to: &mut Self, buffers: &mut Buffers) -> Progress {
        let progress = self.pass_on(to, buffers);
        // What looks like the end of a broken one is none.
        if self.ended && to.leftover.is_none() && !self.broken && !to.broken {
            to.shut();
            return Progress::Over;
        }
        progress
    }

    /// Carries up to one buffer of bytes to `to`.
    fn pass_on(&mut self, to: &mut Self, buffers: &mut Buffers) -> Progress {
        to.write_leftover(buffers);
        if to.leftover.is_some() || !to.writable || !self.readable || self.ended || to.broken {
            if std::mem::take(&mut self.suspect) {
                self.broken |= self.was_closed();
            }
            return Progress::Idle;
        }
        let size = buffers.limit(READ_SIZE_MIN << to.appetite);
        let buffer = buffers.shared().get_mut(..size).unwrap_or_default();
        match rustix::io::read(&self.socket, buffer) {
            Ok(0) => {
                match self.was_closed() {
                    true => self.broken = true,
                    false => self.ended = true,
                }
                Progress::Idle
            }
            Ok(length) => {
                self.read += length;
                let skipped = self.unread.min(length);
                self.unread -= skipped;
                to.take(skipped..length, buffers);
                self.readable = length == size || !self.short_read_empties;
                // Only what fills the buffer is a reason to ask for more at a time.
                let most = READ_SIZE_MIN << to.appetite;
                if length == most && to.leftover.is_none() && most < buffers.size() {
                    to.appetite += 1;
                }
                match self.readable {
                    true => Progress::More,
                    false => Progress::Idle,
                }
            }
            Err(Errno::AGAIN) => {
                self.readable = false;
                self.short_read_empties = !self.may_carry_descriptors;
                Progress::Idle
            }
            Err(Errno::INTR) => Progress::More,
            Err(_) => {
                self.broken = true;
                Progress::Idle
            }
        }
    }

    /// Writes these bytes of the shared buffer, and keeps what was not taken.
    fn take(&mut self, bytes: Range<usize>, buffers: &mut Buffers) {
        let rest = buffers.shared().get(bytes.clone()).unwrap_or_default();
        let from = bytes.start + self.write(rest);
        if from < bytes.end && !self.broken {
            self.leftover = Some(Box::new(buffers.keep(from..bytes.end)));
        }
    }

    fn write_leftover(&mut self, buffers: &mut Buffers) {
        if !self.writable {
            return;
        }
        let Some(mut leftover) = self.leftover.take() else {
            return;
        };
        let taken = self.write(leftover.bytes());
        leftover.consume(taken);
        if leftover.bytes().is_empty() || self.broken {
            buffers.give_back(*leftover);
        } else {
            self.leftover = Some(leftover);
        }
    }

    /// Writes what is taken at once, and tells how much that was.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        while let Some(rest @ [_, ..]) = bytes.get(taken..) {
            match send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(length) => {
                    taken += length;
                    if length < rest.len() {
                        // There was no room for more: the next event tells when there is.
                        self.writable = false;
                        break;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.writable = false;
                    break;
                }
                Err(_) => {
                    self.broken = true;
                    break;
                }
            }
        }
        taken
    }

    fn shut(&mut self) {
        if !self.shut {
            self.shut = true;
            // It fails only where the peer is gone, which the next read tells.
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
    }

    /// Whether the host closed its connection though it was not told the end, which is a reset.
    ///
    /// Sending nothing asks: sockets look at their state before they look at the length. In the
    /// guest a close is an end, and what is written after it a reset, as it is with TCP.
    fn was_closed(&self) -> bool {
        let ask = || send(&self.socket, &[], SendFlags::NOSIGNAL);
        self.side == Side::Host
            && !self.shut
            && matches!(ask(), Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN))
    }
}

/// Makes the coming close of a TCP connection a reset; a Unix socket has none, and stays as it is.
pub fn reset(socket: impl AsFd) {
    // It fails only where there is no connection any more.
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_pair_carries_on_when_nothing_is_left_to_lend() {
        let mut buffers = Buffers::new();
        let size = buffers.size();
        let mut lent = Vec::new();
        while buffers.limit(size) == size {
            lent.push(buffers.keep(0..size));
        }
        let sockets = || {
            let (near, far) = UnixStream::pair().unwrap();
            near.set_nonblocking(true).unwrap();
            (OwnedFd::from(near), far)
        };
        let ((host, mut writer), (guest, mut reader)) = (sockets(), sockets());
        let host = Caller {
            connection: host,
            unread: 0,
        };
        let mut pair = Pair::new(host, guest, AddressFamily::UNIX);
        let mut bytes = [7; READ_SIZE_MIN];
        // More often than anything that counts rounds in a byte could bear.
        for _ in 0..300 {
            writer.write_all(&bytes).unwrap();
            pair.note(Side::Host, EventFlags::IN);
            assert_eq!(pair.turn(&mut buffers), Progress::More);
            bytes.fill(0);
            reader.read_exact(&mut bytes).unwrap();
            assert_eq!(bytes, [7; READ_SIZE_MIN]);
        }
    }
}
