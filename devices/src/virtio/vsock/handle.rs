//! How the rest of the process talks to a vsock device: commands to the thread that owns it.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::asked::{Asked, Request};
use super::counters::Counters;
use super::mux::table::Key;
use super::reserve::Reserved;
use super::stream::reset_on_close;

/// The most bytes that can precede a stream's own ([`VsockHandle::join`]).
pub const MAX_PRELUDE: usize = 64 << 10;

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

/// What is given the guest's connections to ports without a service. It is called on the device's thread
/// and must not block; the answer may be given at any time, from any thread.
pub type Fallback = Box<dyn FnMut(Asked) + Send>;

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

/// What a host stream is to its connection.
pub(super) enum Join {
    /// The stream ends however the guest ends.
    Plain,
    /// A reset is passed on, both ways; these bytes go to the guest first.
    Abortive(Vec<u8>),
    /// The same, of a connection that gets its real stream later.
    Reserved(Vec<u8>),
}

/// What a handle asks of the device's thread.
pub(super) enum Command {
    Connect {
        port: u32,
        stream: OwnedFd,
        how: Join,
        completion: Completion,
    },
    JoinReserved {
        reserved: Reserved,
        prelude: Vec<u8>,
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
    /// With a handle for what it is given.
    Fallback(Option<(Fallback, VsockHandle)>),
    /// None refuses.
    Answer {
        request: Request,
        stream: Option<OwnedFd>,
    },
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

    /// Joins `stream` (a connected TCP, Unix or AF_VSOCK stream socket) to a new connection to `port` of
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
            how: Join::Plain,
            completion: Completion::new(Box::new(answer)),
        })
    }

    /// Makes `stream` and a new connection to `port` of the guest one: the guest gets `prelude`
    /// (at most [`MAX_PRELUDE`] bytes) and then what `stream` gives. `stream` is a connected TCP,
    /// Unix or AF_VSOCK stream socket.
    ///
    /// A reset is passed on both ways, besides the orderly end of either direction. Where the guest
    /// refuses, does not answer, resets the connection or closes it without having ended its data
    /// first (shutdown for writing), and where the device is reset, a TCP `stream` is reset; a
    /// Unix or AF_VSOCK one is closed without having been shut down for writing. Where `stream`
    /// breaks, or is closed by its far end before that has seen the guest's end, the guest gets a
    /// reset after what `stream` had left to give.
    ///
    /// Fails with InvalidInput where `prelude` is too long, and with BrokenPipe where the device
    /// is gone. `stream` is reset then too.
    pub fn join(&self, port: u32, prelude: Vec<u8>, stream: impl Into<OwnedFd>) -> io::Result<()> {
        self.join_with(port, prelude, stream, |_| ())
    }

    /// As [`VsockHandle::join`], and calls `answer` as [`VsockHandle::connect_with`] does.
    pub fn join_with(
        &self,
        port: u32,
        prelude: Vec<u8>,
        stream: impl Into<OwnedFd>,
        answer: impl FnOnce(Result<u32, ConnectError>) + Send + 'static,
    ) -> io::Result<()> {
        let stream = stream.into();
        // From here on, so that it is reset wherever the request is lost.
        reset_on_close(&stream)?;
        check_prelude(prelude.len())?;
        self.send(Command::Connect {
            port,
            stream,
            how: Join::Abortive(prelude),
            completion: Completion::new(Box::new(answer)),
        })
    }

    /// Makes a connection to `port` of the guest that is to be used later, sends `prelude` (at most
    /// [`MAX_PRELUDE`] bytes), and calls `answer` as [`VsockHandle::connect_with`] does.
    ///
    /// Fails with InvalidInput where `prelude` is too long, and with BrokenPipe where the device is gone.
    pub fn reserve(
        &self,
        port: u32,
        prelude: Vec<u8>,
        answer: impl FnOnce(Result<Reserved, ConnectError>) + Send + 'static,
    ) -> io::Result<()> {
        check_prelude(prelude.len())?;
        let (near, far) = UnixStream::pair()?;
        let sent = prelude.clone();
        let reserved = move |host_port| Reserved {
            key: Key {
                host_port,
                guest_port: port,
            },
            prelude: sent,
            near,
        };
        self.send(Command::Connect {
            port,
            stream: far.into(),
            how: Join::Reserved(prelude),
            completion: Completion::new(Box::new(move |host_port| answer(host_port.map(reserved)))),
        })
    }

    /// Makes `stream` and a reserved connection one, as [`VsockHandle::join`] does with a new one, after
    /// `prelude`. Where the guest has closed it, or has sent anything, a new one to the same port takes its
    /// place, and is sent what the reserved one was before.
    ///
    /// Fails as [`VsockHandle::join`]; both preludes together must not be too long.
    pub fn join_reserved(
        &self,
        reserved: Reserved,
        prelude: Vec<u8>,
        stream: impl Into<OwnedFd>,
    ) -> io::Result<()> {
        let stream = stream.into();
        reset_on_close(&stream)?;
        check_prelude(reserved.prelude.len() + prelude.len())?;
        self.send(Command::JoinReserved {
            reserved,
            prelude,
            stream,
            completion: Completion::new(Box::new(|_| ())),
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
        let fallback = fallback.map(|fallback| (fallback, self.clone()));
        self.send(Command::Fallback(fallback))
    }

    /// The device's counters.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    pub(super) fn send(&self, command: Command) -> io::Result<()> {
        self.commands
            .send(command)
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the vsock device has ended"))?;
        // Fails only on an overflowing counter: then the device has been told already.
        let _ = self.wake.write(1);
        Ok(())
    }
}

fn check_prelude(len: usize) -> io::Result<()> {
    match len {
        0..=MAX_PRELUDE => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{len} bytes cannot precede a stream to the guest: at most {MAX_PRELUDE} can"),
        )),
    }
}
