//! The first message of a connection, read as it arrives.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use agent::protocol::{MAX_FRAME, Open};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::frames;

/// Memory grows in these steps with the bytes that arrive, not with the length announced.
const STEP: usize = 64 << 10;

/// How much is looked at before it is read: more than most messages have.
const PEEKED: usize = 256;

/// A connection that has said what it is for.
#[derive(Debug)]
pub struct Caller {
    /// The host's connection, not blocking.
    pub connection: OwnedFd,
    /// How many bytes of the message are still to be read, before what follows it.
    pub unread: usize,
}

impl Caller {
    /// The connection, from which only what follows the message is still to be read.
    pub fn read_rest(self) -> io::Result<OwnedFd> {
        let mut rest = [0; PEEKED];
        let mut unread = self.unread;
        while let Some(rest @ [_, ..]) = rest.get_mut(..unread) {
            match rustix::io::read(&self.connection, rest) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => unread -= length,
                Err(Errno::INTR) => {}
                // It was there to be looked at.
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.connection)
    }
}

/// A connection that has not said yet what it is for.
#[derive(Debug)]
pub struct Greeting {
    connection: OwnedFd,
    /// The message so far, with its length in front.
    frame: Vec<u8>,
    /// When it must have been complete, if ever.
    pub deadline: Option<Instant>,
}

/// What reading has led to.
#[derive(Debug)]
pub enum Heard {
    /// All of it.
    Message(Caller, Open),
    /// Not all of it yet.
    Nothing(Greeting),
    /// The host closed without a word.
    End,
}

impl Greeting {
    /// For a connected, non-blocking socket.
    pub fn new(connection: OwnedFd) -> Self {
        Self {
            connection,
            frame: Vec::new(),
            deadline: None,
        }
    }

    /// Whether the host has said anything.
    pub fn has_begun(&self) -> bool {
        !self.frame.is_empty()
    }

    /// Looks for the message, or reads what is there of it, and nothing of what comes after it.
    pub fn read(self) -> io::Result<Heard> {
        match self.peek()? {
            Some((open, unread)) => {
                let connection = self.connection;
                Ok(Heard::Message(Caller { connection, unread }, open))
            }
            None => self.read_whole(),
        }
    }

    /// The message, if it is short and all of it is there, and its length with that of its frame.
    ///
    /// To read it with what follows is one call less, and one message less to the host's vsock device,
    /// which is told of each read that leaves nothing.
    fn peek(&self) -> io::Result<Option<(Open, usize)>> {
        let mut bytes = [0; PEEKED];
        if self.has_begun() {
            return Ok(None);
        }
        // Whatever is wrong shows when it is read.
        let Ok((_, length)) = recv(&self.connection, &mut bytes[..], RecvFlags::PEEK) else {
            return Ok(None);
        };
        let Some((announced, rest)) = bytes.get(..length).and_then(<[u8]>::split_first_chunk::<4>)
        else {
            return Ok(None);
        };
        let Some(body) = rest.get(..u32::from_le_bytes(*announced) as usize) else {
            return Ok(None);
        };
        let open = postcard::from_bytes(body).map_err(frames::invalid)?;
        Ok(Some((open, announced.len() + body.len())))
    }

    fn read_whole(mut self) -> io::Result<Heard> {
        loop {
            let have = self.frame.len();
            let missing = frames::missing(&self.frame, MAX_FRAME)?;
            if missing == 0 {
                let body = self.frame.get(4..).unwrap_or_default();
                let open = postcard::from_bytes(body).map_err(frames::invalid)?;
                let caller = Caller {
                    connection: self.connection,
                    unread: 0,
                };
                return Ok(Heard::Message(caller, open));
            }
            self.frame.resize(have + missing.min(STEP), 0);
            let rest = self.frame.get_mut(have..).unwrap_or_default();
            let read = rustix::io::read(&self.connection, rest);
            self.frame
                .truncate(have + read.as_ref().copied().unwrap_or(0));
            match read {
                Ok(0) if have == 0 => return Ok(Heard::End),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Heard::Nothing(self)),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
