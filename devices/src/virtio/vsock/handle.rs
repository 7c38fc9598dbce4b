//! How the rest of the process talks to a vsock device: commands to the thread that owns it.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::counters::Counters;

/// Why a connection into the guest was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ConnectError {
    /// The guest answered with a reset: most often nothing listens on the port.
    #[error("the guest refused the connection")]
    Refused,
    /// The guest did not answer in [`super::VsockConfig::connect_timeout`].
    #[error("the guest did not answer the connection request")]
    TimedOut,
    /// The device has as many connections as it may have.
    #[error("the vsock device has no room for another connection")]
    TooMany,
    /// The stream that was to be joined to the connection cannot be used.
    #[error("the host stream cannot be joined to a vsock connection")]
    BadStream,
    /// The device was reset or removed first.
    #[error("the vsock device was reset before the guest answered")]
    DeviceGone,
}

/// What is called when the guest has answered a connection request: exactly once, on the
/// device's thread, so it must not block. Ok holds the host's port of the connection.
pub type Answer = Box<dyn FnOnce(Result<u32, ConnectError>) + Send>;

/// What takes the host ends of connections that the guest opens to a port. It is called on the
/// device's thread and must not block; dropping the stream closes the connection.
pub type Service = Box<dyn FnMut(UnixStream) + Send>;

/// What is asked for a host stream when the guest connects to a port without a service; None
/// refuses the connection. It is called on the device's thread and must not block.
pub type Fallback = Box<dyn FnMut(u32) -> Option<OwnedFd> + Send>;

/// An [`Answer`] that is given even where the request is lost.
pub(super) struct Completion(Option<Answer>);

impl Completion {
    pub fn new(answer: Answer) -> Self {
        Self(Some(answer))
    }

    pub fn complete(mut self, result: Result<u32, ConnectError>) {
        if let Some(answer) = self.0.take() {
            answer(result);
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if let Some(answer) = self.0.take() {
            answer(Err(ConnectError::DeviceGone));
        }
    }
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion").finish_non_exhaustive()
    }
}

/// What a handle asks of the device's thread.
pub(super) enum Command {
    Connect {
        port: u32,
        stream: OwnedFd,
        completion: Completion,
    },
    Listen {
        port: u32,
        service: Service,
    },
    Unlisten {
        port: u32,
    },
    Fallback(Option<Fallback>),
}

/// Opens connections to the guest and takes those that it opens; clones share one device.
///
/// What is asked before the driver has started the device waits for that. A device reset closes
/// all connections and keeps the services. The guest sees the host as context id 2.
#[derive(Debug, Clone)]
pub struct VsockHandle {
    commands: mpsc::Sender<Command>,
    wake: Arc<EventFd>,
    counters: Arc<Counters>,
}

impl VsockHandle {
    pub(super) fn new(
        commands: mpsc::Sender<Command>,
        wake: Arc<EventFd>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            commands,
            wake,
            counters,
        }
    }

    /// Opens a connection to `port` of the guest and returns its host end at once.
    ///
    /// What is written before the guest has accepted is sent then. A refusal shows as the end of
    /// the stream; use [`VsockHandle::connect_with`] to tell it from an orderly close.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let (near, far) = UnixStream::pair()?;
        self.connect_with(port, far, |_| ())?;
        Ok(near)
    }

    /// Joins `stream` (a connected Unix or TCP stream socket) to a new connection to `port` of
    /// the guest and calls `answer` when the guest has accepted or refused: exactly once, on the
    /// device's thread, before any data from the guest is written to the stream.
    ///
    /// Fails with BrokenPipe where the device is gone; `answer` is told then too.
    pub fn connect_with(
        &self,
        port: u32,
        stream: impl Into<OwnedFd>,
        answer: impl FnOnce(Result<u32, ConnectError>) + Send + 'static,
    ) -> io::Result<()> {
        self.send(Command::Connect {
            port,
            stream: stream.into(),
            completion: Completion::new(Box::new(answer)),
        })
    }

    /// Hands the host end of every connection that the guest opens to `port` to `service`, which
    /// replaces the port's service before. Sending the streams through a channel is
    /// `move |stream| drop(sender.send(stream))`.
    pub fn listen(
        &self,
        port: u32,
        service: impl FnMut(UnixStream) + Send + 'static,
    ) -> io::Result<()> {
        self.send(Command::Listen {
            port,
            service: Box::new(service),
        })
    }

    /// Takes the service of `port` away; connections that exist go on.
    pub fn unlisten(&self, port: u32) -> io::Result<()> {
        self.send(Command::Unlisten { port })
    }

    /// Asks `fallback` for a host stream when the guest connects to a port without a service;
    /// None refuses such connections again.
    pub fn set_fallback(&self, fallback: Option<Fallback>) -> io::Result<()> {
        self.send(Command::Fallback(fallback))
    }

    /// The device's counters.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    fn send(&self, command: Command) -> io::Result<()> {
        self.commands
            .send(command)
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the vsock device has ended"))?;
        // Fails only on an overflowing counter: then the device has been told already.
        let _ = self.wake.write(1);
        Ok(())
    }
}
