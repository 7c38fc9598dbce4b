//! The way of the kernel's requests to the host: what need not go there is answered, and what is long goes through the
//! window, where there is one.

use std::io;
use std::os::fd::OwnedFd;

use agent::protocol::{PLACE, PLACED_FROM, REQUEST_PLACED, WINDOW, for_host};
use rustix::io::Errno;

use super::ending::Why;
use super::known::Known;
use super::message::{self, IN_HEADER, word};
use super::outbox::{self, Outbox};
use super::pump::MAX_MESSAGE;
use super::window::{Lending, SLOT, Slot};

/// The opcode `FUSE_READ`, and where its `fuse_read_in` has how much is read.
const READ: u32 = 15;
const READ_SIZE: usize = IN_HEADER + 16;

/// The opcode `FUSE_WRITE`. Others are long too, but not often, and some have no reply that would free a slot.
const WRITE: u32 = 16;

const _: () = assert!(SLOT >= MAX_MESSAGE);

/// Carries requests until there are no more, and returns why.
pub fn carry(from: &OwnedFd, to: &Outbox, known: &Known, lending: &Lending) -> Why {
    let mut way = Way {
        to,
        lending,
        own: vec![0; MAX_MESSAGE],
        slot: None,
    };
    loop {
        let buffer = way.room();
        let length = match rustix::io::read(from, &mut *buffer) {
            Ok(length) => length,
            // The request was interrupted before it was read.
            Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => continue,
            Err(Errno::NODEV | Errno::CONNABORTED) => return Why::Unmounted,
            Err(errno) => return Why::Failed(format!("{errno} from the kernel's FUSE")),
        };
        let request = buffer.get(..length).unwrap_or_default();
        // A reply is refused only where the mount has ended, which the next read says too.
        let answer = |reply: &[u8]| {
            let _ = rustix::io::write(from, reply);
        };
        if known.answer(request, answer) {
            continue;
        }
        if let Some(reply) = outbox::reply_to(request) {
            answer(&reply);
        }
        let sent = match (Long::of(request), outbox::can_wait(request)) {
            (Some(long), _) => way.send_long(long),
            (None, true) => to.hold(request),
            (None, false) => to.send(request),
        };
        if let Err(error) = sent {
            return Why::Failed(format!("the host takes no requests any more: {error}"));
        }
    }
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

/// Where requests are read to, and sent.
struct Way<'a> {
    to: &'a Outbox,
    lending: &'a Lending,
    own: Vec<u8>,
    /// Requests are read to here where a slot is free, as a long one stays where it is then.
    slot: Option<Slot<'a>>,
}

impl Way<'_> {
    fn room(&mut self) -> &mut [u8] {
        match &mut self.slot {
            Some(slot) => slot.bytes_mut(),
            None => &mut self.own,
        }
    }

    /// Sends what was read last.
    fn send_long(&mut self, long: Long) -> io::Result<()> {
        let to = self.to;
        let window = self
            .lending
            .open(|window| to.send(&for_host(WINDOW, 0, window.addresses())))?;
        let slot = self.slot.take();
        let sent = match long {
            Long::Request { unique, length } => match slot {
                Some(slot) => {
                    let index = slot.index() as u64;
                    slot.lend(unique);
                    to.send(&for_host(REQUEST_PLACED, unique, &[index, length as u64]))
                }
                None => to.send(self.own.get(..length).unwrap_or_default()),
            },
            Long::Reply { unique, request } => match slot.or_else(|| window?.take()) {
                Some(slot) => {
                    let mut both = for_host(PLACE, unique, &[slot.index() as u64]);
                    slot.lend(unique);
                    both.extend(request);
                    to.send(&both)
                }
                None => to.send(&request),
            },
        };
        self.slot = window.and_then(|window| window.take());
        sent
    }
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
