//! Connections to something in the guest whose success has to be known before any byte goes through:
//! those of the proxy and of `mvm connect`.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
#[cfg(test)]
use std::sync::mpsc;
use std::time::Duration;

use agent::protocol::{DialError, Open, Target, ToForwarder};

use super::{Command, Forwarder, frame};

/// How long an answer may take. The agent gives up after 10 s and says so; a guest that does not even do
/// that is not waited for.
pub const DIAL_PATIENCE: Duration = Duration::from_secs(15);

/// What is called with the end of a dial: exactly once, on the forwarder's thread, so it must not block.
pub type DialDone = Box<dyn FnOnce(Result<Dialed, DialError>) + Send>;

impl Forwarder {
    /// Asks the guest to connect to `target`, and calls `done` when it has or cannot; within
    /// [`DIAL_PATIENCE`].
    ///
    /// `done` must not block: it is called on the forwarder's thread, or on this one where the forwarder
    /// has ended.
    pub fn dial(
        &self,
        target: Target,
        done: impl FnOnce(Result<Dialed, DialError>) + Send + 'static,
    ) {
        let done: DialDone = Box::new(done);
        if let Err(Command::Dial { done, .. }) = self.send(Command::Dial { target, done }) {
            done(Err(DialError::Other("the machine has ended".to_owned())));
        }
    }

    /// The same, waiting for the end of it. Not for the forwarder's own thread.
    #[cfg(test)]
    pub fn dial_and_wait(&self, target: Target) -> Result<Dialed, DialError> {
        let (sender, answer) = mpsc::sync_channel(1);
        self.dial(target, move |result| drop(sender.send(result)));
        // The forwarder answers in time, or drops what it would answer with.
        let ended = |_| DialError::Other("the machine has ended".to_owned());
        answer.recv().map_err(ended)?
    }

    /// Opens a connection for datagrams, without waiting: [`agent::protocol::Datagram`] both ways, framed.
    ///
    /// Fails where the machine is not up.
    pub fn open_datagrams(&self) -> io::Result<UnixStream> {
        let (near, far) = UnixStream::pair()?;
        self.guest()?.join(frame(&Open::Datagrams)?, far.into())?;
        Ok(near)
    }
}

/// A connection in the guest that waits for its other end; closed by a reset where it never gets one. The
/// agent holds it for 30 s.
#[derive(Debug)]
pub struct Dialed {
    token: u64,
    /// None once it has its other end.
    forwarder: Option<Forwarder>,
}

impl Dialed {
    pub(super) fn new(token: u64, forwarder: Forwarder) -> Self {
        Self {
            token,
            forwarder: Some(forwarder),
        }
    }

    /// Makes `stream` (TCP or Unix) one with the connection: its bytes go there and back from now on, with
    /// half-closes and resets as they are.
    ///
    /// Fails where the machine has ended in the meantime, and `stream` is closed.
    #[cfg(test)]
    pub fn attach(self, stream: impl Into<OwnedFd>) -> io::Result<()> {
        self.attach_after(&[], stream)
    }

    /// The same; `early`, at most some 60 KiB, goes into the guest before what `stream` gives.
    pub fn attach_after(mut self, early: &[u8], stream: impl Into<OwnedFd>) -> io::Result<()> {
        let Some(forwarder) = self.forwarder.take() else {
            return Ok(());
        };
        let mut prelude = frame(&Open::Attach { token: self.token })?;
        prelude.extend_from_slice(early);
        forwarder.guest()?.join(prelude, stream.into())
    }
}

impl Drop for Dialed {
    fn drop(&mut self) {
        if let Some(forwarder) = self.forwarder.take() {
            // Where the forwarder has ended, so has the connection.
            let _ = forwarder.send(Command::Tell(ToForwarder::Drop { token: self.token }));
        }
    }
}
