//! The way of the kernel's requests to the host: what need not go there is answered, and what is long goes through the
//! window, where there is one.

use std::cell::Cell;
use std::convert::Infallible;
use std::io;

use agent::protocol::{CALLS, PLACE, PLACED_FROM, REQUEST_PLACED, WINDOW, for_host};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::call::{Caller, Calls};
use super::delivery::Delivery;
use super::ending::Why;
use super::message::{self, IN_HEADER, word};
use super::outbox::{self, Outbox};
use super::pump::MAX_MESSAGE;
use super::window::{Lending, SLOT, Slot, Window};

/// The opcode `FUSE_READ`, and where its `fuse_read_in` has how much is read.
const READ: u32 = 15;
const READ_SIZE: usize = IN_HEADER + 16;

/// The opcode `FUSE_WRITE`. Others are long too, but not often, and some have no reply that would free a slot.
const WRITE: u32 = 16;

/// For how many requests that are answered here a file that was written may wait to be closed.
const OWED_FOR: u32 = 8;

const _: () = assert!(SLOT >= MAX_MESSAGE);

/// Carries requests until there are no more, and returns why.
pub fn carry(to: &Outbox, calls: Option<Calls>, delivery: &Delivery) -> Why {
    let way = Way {
        to,
        delivery,
        // Without calls, all goes over the stream.
        caller: calls.and_then(|calls| Caller::new(calls).ok()),
        owes: Cell::new(0),
    };
    let Err(why) = way.carry();
    why
}

/// A request that is long, or whose reply may be, and that is answered in any case.
#[derive(Debug, PartialEq, Eq)]
enum Long {
    Request { unique: u64, length: usize },
    Reply { unique: u64, request: Vec<u8> },
}

impl Long {
    fn of(request: &[u8]) -> Option<Self> {
        let unique = message::unique(request)?;
        match message::opcode(request)? {
            WRITE if request.len() >= PLACED_FROM => Some(Self::Request {
                unique,
                length: request.len(),
            }),
            READ if word(request, READ_SIZE)? as usize >= PLACED_FROM => Some(Self::Reply {
                unique,
                request: request.to_vec(),
            }),
            _ => None,
        }
    }
}

/// Where requests go.
struct Way<'a> {
    to: &'a Outbox,
    delivery: &'a Delivery,
    caller: Option<Caller>,
    /// Where a file that was written is to be closed: after so many requests, or before this thread waits.
    owes: Cell<u32>,
}

impl<'a> Way<'a> {
    fn carry(mut self) -> Result<Infallible, Why> {
        if let Some(caller) = &self.caller {
            self.send(&for_host(CALLS, 0, caller.addresses()))?;
        }
        let mut own = vec![0; MAX_MESSAGE];
        // Requests are read to here where a slot is free, as a long one stays where it is then.
        let mut slot: Option<Slot<'a>> = None;
        loop {
            if self.owes.get() > 0 && !self.is_asked_at_once() {
                self.settle();
            }
            let buffer = match &mut slot {
                Some(slot) => slot.bytes_mut(),
                None => &mut own[..],
            };
            let length = self.read(buffer)?;
            let request = buffer.get(..length).unwrap_or_default();
            if length == 0 || self.answer(request) {
                continue;
            }
            match Long::of(request) {
                Some(long) => slot = self.send_long(long, slot.take(), &own)?,
                None if outbox::can_wait(request) => self.to.hold(request).map_err(unsent)?,
                None if outbox::is_release(request) => {
                    self.to.hold_briefly(request).map_err(unsent)?;
                    self.owes.set(OWED_FOR);
                }
                None => self.ask(request)?,
            }
        }
    }

    /// The length of the next request; zero where it was interrupted before it was read.
    fn read(&self, buffer: &mut [u8]) -> Result<usize, Why> {
        match rustix::io::read(&self.delivery.device, buffer) {
            Ok(length) => Ok(length),
            Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => Ok(0),
            Err(Errno::NODEV | Errno::CONNABORTED) => Err(Why::Unmounted),
            Err(errno) => Err(Why::Failed(format!("{errno} from the kernel's FUSE"))),
        }
    }

    /// Answers what need not wait for the host; whether the host need not know of it either.
    fn answer(&self, request: &[u8]) -> bool {
        // A reply is refused only where the mount has ended, which the next read says too.
        let answer = |reply: &[u8]| {
            let _ = rustix::io::write(&self.delivery.device, reply);
        };
        if self.delivery.known.answer(request, answer) {
            return true;
        }
        if let Some(reply) = outbox::reply_to(request) {
            answer(&reply);
        }
        false
    }

    /// Whether whoever runs when this thread does not has asked for something, and what is owed may wait for that: who
    /// closes one of many files asks for the next.
    fn is_asked_at_once(&self) -> bool {
        const NOT_AT_ALL: Timespec = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        self.owes.set(self.owes.get() - 1);
        if self.owes.get() == 0 {
            return false;
        }
        std::thread::yield_now();
        let asked = &mut [PollFd::new(&*self.delivery.device, PollFlags::IN)];
        poll(asked, Some(&NOT_AT_ALL)).is_ok_and(|ready| ready > 0)
    }

    /// Tells the host what it was not told yet, by a call, or else by the stream.
    fn settle(&mut self) {
        self.owes.set(0);
        if let Some(caller) = &mut self.caller {
            self.to.pass_on(|held| {
                let answer = caller.ask(&[], held)?;
                Some((answer.taken, ()))
            });
        }
        self.to.flush();
    }

    fn send(&self, message: &[u8]) -> Result<(), Why> {
        self.owes.set(0);
        self.to.send(message).map_err(unsent)
    }

    /// Asks the host by a call, or else by the stream.
    fn ask(&mut self, message: &[u8]) -> Result<(), Why> {
        let answered = self.caller.as_mut().and_then(|caller| {
            self.to.pass_on(|held| {
                let answer = caller.ask(message, held)?;
                if answer.taken == held.len() {
                    self.owes.set(0);
                }
                Some((answer.taken, answer.messages))
            })
        });
        match answered {
            Some(mut messages) => messages.try_for_each(|message| self.delivery.deliver(message)),
            None => self.send(message),
        }
    }

    /// Sends what was read last, into `slot` or else `own`; returns the slot for the next.
    fn send_long(
        &self,
        long: Long,
        slot: Option<Slot<'a>>,
        own: &[u8],
    ) -> Result<Option<Slot<'a>>, Why> {
        let lending: &'a Lending = &self.delivery.lending;
        let to = self.to;
        let window = lending
            .open(|window| to.send(&for_host(WINDOW, 0, window.addresses())))
            .map_err(unsent)?;
        match long {
            Long::Request { unique, length } => match slot {
                Some(slot) => {
                    let index = slot.index() as u64;
                    slot.lend(unique);
                    self.send(&for_host(REQUEST_PLACED, unique, &[index, length as u64]))?;
                }
                None => self.send(own.get(..length).unwrap_or_default())?,
            },
            Long::Reply { unique, request } => match slot.or_else(|| window?.take()) {
                Some(slot) => {
                    let mut both = for_host(PLACE, unique, &[slot.index() as u64]);
                    slot.lend(unique);
                    both.extend(request);
                    self.send(&both)?;
                }
                None => self.send(&request)?,
            },
        }
        Ok(window.and_then(Window::take))
    }
}

fn unsent(error: io::Error) -> Why {
    Why::Failed(format!("the host takes no requests any more: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request that reads `size` bytes if it is one that reads, and is `length` bytes long.
    fn request(opcode: u32, size: u32, length: usize) -> Vec<u8> {
        let mut request = for_host(opcode, 6, &[0, 0, size.into()]);
        request.resize(length, 0);
        request
    }

    #[test]
    fn what_reads_or_writes_much_is_long() {
        let written = |length| Long::of(&request(WRITE, 0, length));
        let length = PLACED_FROM;
        assert_eq!(written(length), Some(Long::Request { unique: 6, length }));
        assert_eq!(written(length - 1), None);
        let much = request(READ, 16 << 10, 80);
        let unique = 6;
        let request = much.clone();
        assert_eq!(Long::of(&much), Some(Long::Reply { unique, request }));
    }

    #[test]
    fn what_may_have_no_reply_goes_over_the_stream() {
        const BATCH_FORGET: u32 = 42;
        for opcode in [BATCH_FORGET, 2, 21, 36] {
            assert_eq!(Long::of(&request(opcode, 0, 1 << 20)), None, "{opcode}");
        }
        assert_eq!(Long::of(&request(READ, (16 << 10) - 1, 80)), None);
        assert_eq!(Long::of(&request(READ, 0, 1 << 20)), None);
        assert_eq!(Long::of(&[15; 41]), None);
    }
}
