//! Whole FUSE messages on the byte streams between this process and the guest's agent.
//!
//! Each message begins with its length, as the kernel has it (`fuse_in_header.len`, `fuse_out_header.len`),
//! and nothing else stands between them.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use agent::protocol::{
    AFTER_REPLIES, ATTRIBUTES, CALLS, EMPTY, LIST, NEW, PLACE, PLACED, REQUEST_PLACED, WINDOW,
    for_agent,
};
use rustix::io::Errno;
use share::wire::Opcode;
use share::{Advice, Channel};

use super::desk::Desk;
use super::window::Window;

/// How much is read at a time, bytes: many small requests, or the beginning of a large one, whose rest is
/// read to where it belongs.
const BUFFER: usize = 64 << 10;

/// The length of `struct fuse_in_header`.
const REQUEST_HEADER: usize = 40;

/// Where `fuse_in_header.opcode` is.
const OPCODE: usize = 4;

/// As many bytes are read or written in no time.
const LITTLE: usize = 64 << 10;

/// One of a mount's queues of requests: several threads may take from it and answer.
///
/// One thread at a time has the turn to read. It keeps it over a request that takes no time where no other one
/// waits: then a guest that asks one thing after the other costs no switch between threads.
#[derive(Debug)]
pub struct Queue {
    stream: UnixStream,
    turn: Mutex<Turn>,
    free: Condvar,
    /// For whoever has the turn.
    input: Mutex<Input>,
    /// Held while a reply is written.
    output: Mutex<()>,
    /// How many replies were written, all of them before this says so.
    replies: AtomicU64,
    /// Where the guest's memory is in this process.
    window: Option<Window>,
    /// Where requests come that are not on the stream.
    desk: Option<Arc<Desk>>,
}

#[derive(Debug, Default)]
struct Turn {
    holder: Option<ThreadId>,
    ended: bool,
}

/// What was read and not taken yet: `buffer[start..end]`.
#[derive(Debug)]
struct Input {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Queue {
    /// The requests that come on `stream`, and through `window`; others come to `desk`.
    pub fn new(stream: UnixStream, window: Option<Window>, desk: Option<Arc<Desk>>) -> Self {
        Self {
            stream,
            turn: Mutex::default(),
            free: Condvar::new(),
            input: Mutex::new(Input {
                buffer: vec![0; BUFFER].into(),
                start: 0,
                end: 0,
            }),
            output: Mutex::new(()),
            replies: AtomicU64::new(0),
            window,
            desk,
        }
    }

    /// How many replies were given to calls, all of them before this says so.
    fn answered_calls(&self) -> u64 {
        self.desk.as_ref().map_or(0, |desk| desk.replies())
    }

    /// Ends it, whoever waits for more.
    pub fn end(&self) {
        lock(&self.turn).ended = true;
        self.free.notify_all();
        // Whoever is at the other end may have closed it.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Waits for the turn; false where there is nothing more to read.
    fn take_turn(&self) -> bool {
        let me = Some(thread::current().id());
        let is_taken = |turn: &mut Turn| !turn.ended && turn.holder.is_some() && turn.holder != me;
        let waited = self.free.wait_while(lock(&self.turn), is_taken);
        let mut turn = waited.unwrap_or_else(PoisonError::into_inner);
        turn.holder = me;
        !turn.ended
    }

    fn pass_turn(&self) {
        lock(&self.turn).holder = None;
        self.free.notify_one();
    }

    /// Takes the next request, wherever it is, and first what the guest says of its window; zero at the end.
    fn next_request(&self, input: &mut Input, message: &mut [u8]) -> io::Result<usize> {
        loop {
            let length = input.take(&self.stream, message)?;
            let (Some(window), Some(said)) = (&self.window, message.get(..length)) else {
                return Ok(length);
            };
            let numbers = || said.get(REQUEST_HEADER..).unwrap_or_default().as_chunks().0;
            let number = |at: usize| match numbers().get(at) {
                Some(number) => Ok(u64::from_le_bytes(*number)),
                None => Err(invalid("the guest leaves something out".to_owned())),
            };
            let pages = || -> Vec<u64> {
                let pages = numbers().iter().map(|page| u64::from_le_bytes(*page));
                pages.collect()
            };
            match (word(said, OPCODE), &self.desk) {
                (Some(WINDOW), _) => window.open(&pages())?,
                (Some(CALLS), Some(desk)) => desk.open(&pages())?,
                (Some(PLACE), _) => window.lend(unique(said).unwrap_or_default(), number(0)?)?,
                (Some(REQUEST_PLACED), _) => {
                    let (slot, length) = (number(0)?, number(1)?);
                    return window.fetch(slot, length, message);
                }
                _ => return Ok(length),
            }
        }
    }

    /// Puts a reply into the guest's memory, where it is long and there is a place for it; returns what the agent is told
    /// instead of it then.
    fn place(&self, reply: &[IoSlice<'_>]) -> io::Result<Option<Vec<u8>>> {
        let (Some(window), Some(header)) = (&self.window, reply.first()) else {
            return Ok(None);
        };
        let (Some(unique), Some(length)) = (unique(header), word(header, 0)) else {
            return Ok(None);
        };
        let is_placed = window.place(unique, reply, length as usize)?;
        Ok(is_placed.then(|| for_agent(PLACED, &[unique, length.into()], &[])))
    }

    /// Writes a reply and what is to come before it.
    fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let _writing = lock(&self.output);
        write_all(&self.stream, parts)?;
        self.replies.fetch_add(1, Ordering::Release);
        Ok(())
    }
}

impl Channel for Queue {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.take_turn() {
            return Ok(0);
        }
        let (taken, is_last) = {
            let mut input = lock(&self.input);
            let taken = self.next_request(&mut input, buffer);
            (taken, input.start == input.end)
        };
        let message = buffer.get(..*taken.as_ref().unwrap_or(&0));
        if !(is_last && message.is_some_and(is_quick)) {
            self.pass_turn();
        }
        match taken {
            // The guest was ended in the middle of something.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(0),
            taken => taken,
        }
    }

    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        self.send_with_advice(parts, &[])
    }

    fn read_to_place(
        &self,
        unique: u64,
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
    ) -> Option<Result<usize, Errno>> {
        self.window.as_ref()?.read(unique, file, offset, length)
    }

    fn takes_advice(&self) -> bool {
        true
    }

    fn send_with_advice(&self, parts: &[IoSlice<'_>], advice: &[Advice]) -> io::Result<()> {
        let placed = self.place(parts)?;
        let instead = placed.as_deref().map(IoSlice::new);
        let parts = instead.as_ref().map_or(parts, std::slice::from_ref);
        if advice.is_empty() {
            return self.write(parts);
        }
        let advice: Vec<_> = advice.iter().map(told).collect();
        let advice = advice.iter().map(|message| IoSlice::new(message));
        let both: Vec<_> = advice.chain(parts.iter().copied()).collect();
        self.write(&both)
    }

    fn answers_releases(&self) -> bool {
        true
    }
}

impl Input {
    /// Takes the next message; zero at the end.
    fn take(&mut self, mut stream: &UnixStream, message: &mut [u8]) -> io::Result<usize> {
        if !self.fill(stream, size_of::<u32>())? {
            return Ok(0);
        }
        let length = self.announced().ok_or(ErrorKind::InvalidData)?;
        let Some(message) = message.get_mut(..length) else {
            return Err(invalid(format!(
                "the guest announces a request of {length} bytes"
            )));
        };
        if length < REQUEST_HEADER {
            return Err(invalid(format!(
                "the guest announces a request of {length} bytes, fewer than its header has"
            )));
        }
        let here = (self.end - self.start).min(length);
        let (head, rest) = message.split_at_mut(here);
        head.copy_from_slice(&self.buffer[self.start..self.start + here]);
        self.start += here;
        stream.read_exact(rest)?;
        Ok(length)
    }

    /// Has at least `wanted` bytes in the buffer; false where the stream has ended before the first.
    fn fill(&mut self, mut stream: &UnixStream, wanted: usize) -> io::Result<bool> {
        if self.end - self.start >= wanted {
            return Ok(true);
        }
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        while self.end < wanted {
            match stream.read(&mut self.buffer[self.end..]) {
                Ok(0) if self.end == 0 => return Ok(false),
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(length) => self.end += length,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// The length that the next message begins with.
    fn announced(&self) -> Option<usize> {
        let bytes = self.buffer.get(self.start..self.end)?;
        let length = u32::from_ne_bytes(*bytes.first_chunk()?);
        usize::try_from(length).ok()
    }
}

/// The number of a request, which its reply has at the same place.
fn unique(message: &[u8]) -> Option<u64> {
    let bytes = message.get(8..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*bytes))
}

/// The u32 at an offset.
fn word(message: &[u8], at: usize) -> Option<u32> {
    let bytes = message.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}

/// Whether a request is one that is done in no time, most often.
fn is_quick(message: &[u8]) -> bool {
    match word(message, OPCODE).and_then(Opcode::from_number) {
        // `fuse_read_in.size`.
        Some(Opcode::Read | Opcode::Readdir | Opcode::Readdirplus) => {
            word(message, REQUEST_HEADER + 16).is_some_and(|size| size as usize <= LITTLE)
        }
        Some(opcode) => opcode.is_brief() && message.len() <= LITTLE,
        None => false,
    }
}

/// The way of a mount's notifications, which come after all replies that were sent before them.
#[derive(Debug)]
pub struct Notices {
    stream: UnixStream,
    queues: Arc<[Queue]>,
    /// How many replies of each queue the agent was told to wait for, and then to calls of each.
    told: Mutex<Vec<u64>>,
}

impl Notices {
    /// Those that go to `stream`, while replies go to `queues`.
    pub fn new(stream: UnixStream, queues: Arc<[Queue]>) -> Self {
        Self {
            stream,
            told: Mutex::new(vec![0; 2 * queues.len()]),
            queues,
        }
    }

    /// Ends it.
    pub fn end(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Channel for Notices {
    fn receive(&self, _: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }

    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let mut told = lock(&self.told);
        let on_streams = self.queues.iter();
        let on_streams = on_streams.map(|queue| queue.replies.load(Ordering::Acquire));
        let to_calls = self.queues.iter().map(Queue::answered_calls);
        let sent: Vec<u64> = on_streams.chain(to_calls).collect();
        if sent != *told {
            let after = for_agent(AFTER_REPLIES, &sent, &[]);
            write_all(&self.stream, &[IoSlice::new(&after)])?;
            *told = sent;
        }
        write_all(&self.stream, parts)
    }
}

/// The message that `bytes` begin with; None where there is no whole one.
pub fn first(bytes: &[u8]) -> Option<&[u8]> {
    let length = usize::try_from(word(bytes, 0)?).ok()?;
    bytes.get(..length).filter(|_| length >= REQUEST_HEADER)
}

/// Advice as a message for the agent.
pub fn told(advice: &Advice) -> Vec<u8> {
    match advice {
        Advice::List { dir, entries } => for_agent(LIST, &[*dir, (*entries).into()], &[]),
        Advice::New { node } => for_agent(NEW, &[*node], &[]),
        Advice::Empty { node, validity } => for_agent(EMPTY, &[*node, *validity], &[]),
        Advice::Attributes {
            node,
            number,
            attributes,
        } => for_agent(ATTRIBUTES, &[*node, *number], attributes),
    }
}

/// Writes one message, most often with a single system call.
fn write_all(mut stream: &UnixStream, parts: &[IoSlice<'_>]) -> io::Result<()> {
    let mut written = loop {
        match stream.write_vectored(parts) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            outcome => break outcome?,
        }
    };
    for part in parts {
        match part.get(written..) {
            Some(rest) => {
                stream.write_all(rest)?;
                written = 0;
            }
            None => written -= part.len(),
        }
    }
    Ok(())
}

fn invalid(sentence: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, sentence)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
