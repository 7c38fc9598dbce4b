//! The first message of a connection, read as it arrives.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use agent::protocol::{MAX_FRAME, Open};
use rustix::io::Errno;

use super::frames;

/// Memory grows in these steps with the bytes that arrive, not with the length announced.
const STEP: usize = 64 << 10;

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
    Message(OwnedFd, Open),
    /// Not all of it yet.
    Nothing(Greeting),
    /// The host closed without a word.
    End,
}

impl Greeting {
    /// For a connected, non-blocking socket.
    pub fn new(connection: OwnedFd, deadline: Option<Instant>) -> Self {
        Self {
            connection,
            frame: Vec::new(),
            deadline,
        }
    }

    /// Reads what is there of the message, and nothing of what comes after it.
    pub fn read(mut self) -> io::Result<Heard> {
        loop {
            let have = self.frame.len();
            let missing = frames::missing(&self.frame, MAX_FRAME)?;
            if missing == 0 {
                let body = self.frame.get(4..).unwrap_or_default();
                let open = postcard::from_bytes(body).map_err(frames::invalid)?;
                return Ok(Heard::Message(self.connection, open));
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
