//! Framed messages over a non-blocking socket, both ways.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use agent::protocol::MAX_FRAME;
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use serde::Serialize;

/// A connection that carries frames.
#[derive(Debug)]
pub struct Frames {
    socket: OwnedFd,
    /// The longest frame that is taken.
    limit: usize,
    /// The beginning of a frame.
    partial: Vec<u8>,
    /// Frames that the socket has not taken yet, from `sent` on.
    unsent: Vec<u8>,
    sent: usize,
}

/// Where a connection stands after reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// There may be more.
    More,
    /// Nothing more is there for now.
    Dry,
    /// The host closed.
    End,
}

impl Frames {
    /// For a connected, non-blocking socket whose frames have at most `limit` bytes.
    pub fn new(socket: OwnedFd, limit: usize) -> Self {
        Self {
            socket,
            limit: limit.min(MAX_FRAME),
            partial: Vec::new(),
            unsent: Vec::new(),
            sent: 0,
        }
    }

    /// Reads once, into `buffer`, and passes each complete frame to `each`.
    pub fn read(
        &mut self,
        buffer: &mut [u8],
        mut each: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<Arrival> {
        let length = match rustix::io::read(&self.socket, &mut *buffer) {
            Ok(0) if self.partial.is_empty() => return Ok(Arrival::End),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => length,
            Err(Errno::INTR) => return Ok(Arrival::More),
            Err(Errno::AGAIN) => return Ok(Arrival::Dry),
            Err(error) => return Err(error.into()),
        };
        let mut bytes = buffer.get(..length).unwrap_or_default();
        while !self.partial.is_empty() && !bytes.is_empty() {
            let wanted = self.missing(&self.partial)?;
            let (head, rest) = bytes.split_at(wanted.min(bytes.len()));
            self.partial.extend_from_slice(head);
            bytes = rest;
            if self.missing(&self.partial)? == 0 {
                let frame = std::mem::take(&mut self.partial);
                each(frame.get(4..).unwrap_or_default())?;
            }
        }
        while !bytes.is_empty() {
            match self.frame(bytes)? {
                Some((frame, rest)) => {
                    each(frame)?;
                    bytes = rest;
                }
                None => {
                    self.partial = bytes.to_vec();
                    break;
                }
            }
        }
        Ok(Arrival::More)
    }

    /// Splits the first frame off `bytes`, where all of it is there.
    fn frame<'a>(&self, bytes: &'a [u8]) -> io::Result<Option<(&'a [u8], &'a [u8])>> {
        if self.missing(bytes)? > 0 {
            return Ok(None);
        }
        let Some((length, body)) = bytes.split_first_chunk::<4>() else {
            return Ok(None);
        };
        Ok(body.split_at_checked(u32::from_le_bytes(*length) as usize))
    }

    /// How many bytes to read next for the frame that begins with `bytes`.
    fn missing(&self, bytes: &[u8]) -> io::Result<usize> {
        missing(bytes, self.limit)
    }

    /// Queues a message, and sends what the socket takes.
    pub fn push(&mut self, message: &impl Serialize) -> io::Result<()> {
        self.unsent.drain(..self.sent);
        self.sent = 0;
        let start = self.unsent.len();
        self.unsent.extend_from_slice(&[0; 4]);
        let unsent = std::mem::take(&mut self.unsent);
        self.unsent = postcard::to_extend(message, unsent).map_err(io::Error::other)?;
        let length = u32::try_from(self.unsent.len() - start - 4).map_err(io::Error::other)?;
        if let Some(place) = self.unsent.get_mut(start..start + 4) {
            place.copy_from_slice(&length.to_le_bytes());
        }
        self.flush()
    }

    /// Sends what the socket takes.
    pub fn flush(&mut self) -> io::Result<()> {
        while let Some(rest @ [_, ..]) = self.unsent.get(self.sent..) {
            match send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(length) => self.sent += length,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        self.unsent.clear();
        self.sent = 0;
        Ok(())
    }

    /// How many bytes the socket has not taken yet.
    pub fn backlog(&self) -> usize {
        self.unsent.len() - self.sent
    }
}

impl AsFd for Frames {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// How many bytes to read next for the frame that begins with `bytes`, its length in front: 0 where
/// it is complete. Fails with InvalidData where it is longer than `limit`.
pub fn missing(bytes: &[u8], limit: usize) -> io::Result<usize> {
    let Some((length, body)) = bytes.split_first_chunk::<4>() else {
        return Ok(4 - bytes.len());
    };
    let length = u32::from_le_bytes(*length) as usize;
    if length > limit {
        return Err(invalid(format!(
            "a frame announces {length} bytes, more than {limit}"
        )));
    }
    Ok(length.saturating_sub(body.len()))
}

/// What was said is not what was agreed on.
pub fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
