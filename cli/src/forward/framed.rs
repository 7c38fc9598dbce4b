//! A connection of framed messages to the agent that never waits, and takes little memory whatever the
//! guest sends or does not read.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use agent::protocol::MAX_FRAME;
use serde::{Serialize, de::DeserializeOwned};

use super::frame;

/// Bytes read at a time.
const CHUNK: usize = 128 << 10;

/// One end of a framed connection.
#[derive(Debug)]
pub struct Framed {
    stream: UnixStream,
    input: Vec<u8>,
    /// Where in `input` the first frame that was not taken begins.
    taken: usize,
    output: Vec<u8>,
    /// How much of `output` went out.
    sent: usize,
    /// Bytes that may wait in `output`.
    limit: usize,
}

impl Framed {
    /// Takes a connection over; at most `limit` bytes wait for the guest to read them.
    pub fn new(stream: UnixStream, limit: usize) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            input: Vec::new(),
            taken: 0,
            output: Vec::new(),
            sent: 0,
            limit,
        })
    }

    /// Sends `message` now or when there is room ([`Framed::flush`]).
    ///
    /// Fails with WouldBlock where too much is waiting already; then nothing of it is sent.
    pub fn send<T: Serialize>(&mut self, message: &T) -> io::Result<()> {
        let frame = frame(message)?;
        if self.output.len() - self.sent + frame.len() > self.limit {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.output.extend_from_slice(&frame);
        self.flush()
    }

    /// Sends what waits, as far as there is room.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.sent < self.output.len() {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(len) => self.sent += len,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.output.drain(..self.sent);
                    self.sent = 0;
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(())
    }

    /// Whether something waits for room.
    pub fn is_waiting(&self) -> bool {
        self.sent < self.output.len()
    }

    /// Reads once what is there; false at the end of the connection.
    pub fn fill(&mut self) -> io::Result<bool> {
        self.input.drain(..self.taken);
        self.taken = 0;
        let have = self.input.len();
        self.input.resize(have + CHUNK, 0);
        let read = loop {
            match self.stream.read(&mut self.input[have..]) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        let len = *read.as_ref().unwrap_or(&0);
        self.input.truncate(have + len);
        match read {
            Ok(0) => Ok(false),
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// The next message of what was read; None where it is not complete.
    ///
    /// Fails with InvalidData on what is no `T`; the connection is of no use then.
    pub fn next<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let waiting = &self.input[self.taken..];
        let Some((len, rest)) = waiting.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let len = u32::from_le_bytes(*len) as usize;
        if len > MAX_FRAME {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                format!("a frame announces {len} bytes, more than {MAX_FRAME}"),
            ));
        }
        let Some(body) = rest.get(..len) else {
            return Ok(None);
        };
        let message = postcard::from_bytes(body)
            .map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        self.taken += 4 + len;
        Ok(Some(message))
    }
}

impl AsFd for Framed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent::protocol::{self, FromForwarder, ToForwarder};

    fn pair(limit: usize) -> (Framed, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (Framed::new(near, limit).unwrap(), far)
    }

    #[test]
    fn messages_arrive_whole_however_they_are_cut() {
        let (mut framed, mut far) = pair(1 << 20);
        let sent = FromForwarder::Accepted { id: 7, token: 9 };
        let wire = frame(&sent).unwrap();
        for byte in &wire {
            assert_eq!(framed.next::<FromForwarder>().unwrap(), None);
            far.write_all(&[*byte]).unwrap();
            assert!(framed.fill().unwrap());
        }
        assert_eq!(framed.next().unwrap(), Some(sent.clone()));
        far.write_all(&[wire.clone(), wire].concat()).unwrap();
        assert!(framed.fill().unwrap());
        assert_eq!(framed.next().unwrap(), Some(sent.clone()));
        assert_eq!(framed.next().unwrap(), Some(sent));
        assert_eq!(framed.next::<FromForwarder>().unwrap(), None);
        drop(far);
        assert!(!framed.fill().unwrap());
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let (mut framed, mut far) = pair(1 << 20);
        far.write_all(&[0xff; 64]).unwrap();
        framed.fill().unwrap();
        let error = framed.next::<FromForwarder>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn a_guest_that_does_not_read_is_not_waited_for() {
        let (mut framed, far) = pair(64 << 10);
        let message = ToForwarder::Drop { token: u64::MAX };
        let mut sent = 0;
        let error = loop {
            match framed.send(&message) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        assert!(framed.is_waiting());
        // What was taken arrives all the same.
        let reader = std::thread::spawn(move || {
            let mut got = 0;
            while let Some(ToForwarder::Drop { token }) = protocol::receive(&far).unwrap() {
                assert_eq!(token, u64::MAX);
                got += 1;
            }
            got
        });
        while framed.is_waiting() {
            framed.flush().unwrap();
            std::thread::yield_now();
        }
        drop(framed);
        assert_eq!(reader.join().unwrap(), sent);
    }
}
