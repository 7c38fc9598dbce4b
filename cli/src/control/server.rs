//! The owner's end of a machine's control socket: a thread for each connection, and a bound for everything.
//!
//! Whatever is wrong with a connection ends that connection: what is sent is read against a deadline and a
//! length, and nothing here holds a lock while it reads or writes.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use agent::protocol as agent_protocol;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use serde::Deserialize;

use super::protocol::{
    self, Answer, ControlError, ErrorKind, Inspection, Op, Reply, Request, Stats,
};
use super::{Latch, metrics};
use crate::store::Name;

/// What clients are given.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Connections served at once. One that was turned over to the guest is none any more.
    pub connections: usize,
    /// How long one message may take to arrive or to leave, from its first byte to its last.
    pub message: Duration,
    /// How long a connection may stay without a request.
    pub idle: Duration,
}

const LIMITS: Limits = Limits {
    connections: 256,
    message: Duration::from_secs(10),
    idle: Duration::from_secs(60),
};

/// The highest number of a signal on Linux.
const LAST_SIGNAL: i32 = 64;

/// How long replies may take when the server ends.
const FAREWELL: Duration = Duration::from_secs(5);

/// How long nobody is accepted after that failed, which it does where descriptors have run out.
const PAUSE: Duration = Duration::from_millis(100);

/// What a server asks of the process that owns a machine. Called on threads of the server, several at once.
pub trait Owner: Send + Sync + 'static {
    /// What the machine is and does.
    fn inspect(&self) -> Inspection;

    /// What it has used.
    fn stats(&self) -> Result<Stats, ControlError>;

    /// Begins to end it: in an orderly way, by force after `grace`. Its end is announced at [`Owner::ended`].
    fn stop(&self, grace: Duration) -> Result<(), ControlError>;

    /// Sends a signal to its command, or ends it at once with SIGKILL.
    fn kill(&self, signal: i32) -> Result<(), ControlError>;

    /// Stops its CPUs; returns when they stand still.
    fn pause(&self) -> Result<(), ControlError>;

    /// Lets its CPUs go on.
    fn resume(&self) -> Result<(), ControlError>;

    /// Gives it another name.
    fn rename(&self, to: &Name) -> Result<(), ControlError>;

    /// Joins `stream` to a connection to vsock port `port` of its guest; it is closed where the guest refuses.
    fn connect(&self, port: u32, stream: OwnedFd) -> io::Result<()>;

    /// Does one of the operations on forwards: [`Op::PortAdd`] up to [`Op::SshAgent`].
    fn forward(&self, op: Op) -> Result<Answer, ControlError>;

    /// Does one of the operations on folders: [`Op::MountAdd`] up to [`Op::MountLs`].
    fn mount(&self, op: Op) -> Result<Answer, ControlError>;

    /// Where its end is announced.
    fn ended(&self) -> &Latch;
}

/// A control socket that is served until this is dropped.
///
/// Dropping it waits, not for long, until replies that are under way have left: who waits for the machine's end
/// hears of it if it was announced before.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    acceptor: Option<thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    limits: Limits,
    connections: Mutex<usize>,
    fewer: Condvar,
    /// Readable once the server ends.
    over: OwnedFd,
}

impl Server {
    /// Serves `listener` for `owner`, to processes of this user and to root.
    pub fn start<O: Owner>(listener: UnixListener, owner: Arc<O>) -> io::Result<Self> {
        Self::start_within(LIMITS, listener, owner)
    }

    /// As [`Server::start`], with limits of one's own.
    pub(super) fn start_within<O: Owner>(
        limits: Limits,
        listener: UnixListener,
        owner: Arc<O>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            limits,
            connections: Mutex::new(0),
            fewer: Condvar::new(),
            over: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let accepting = shared.clone();
        let acceptor = thread::Builder::new()
            .name("control".into())
            .spawn(move || accept_all(&listener, &owner, &accepting))?;
        Ok(Self {
            shared,
            acceptor: Some(acceptor),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A counter of 0 takes 1 without failing.
        let _ = rustix::io::write(&self.shared.over, &1u64.to_ne_bytes());
        if let Some(acceptor) = self.acceptor.take() {
            // It does not panic, and if it did there would be nothing left to do.
            let _ = acceptor.join();
        }
        let open = self.shared.connections();
        let waited = self
            .shared
            .fewer
            .wait_timeout_while(open, FAREWELL, |open| *open > 0);
        drop(waited);
    }
}

impl Shared {
    fn connections(&self) -> std::sync::MutexGuard<'_, usize> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream, for one message.
    fn timed<'a>(&self, stream: &'a UnixStream) -> Timed<'a> {
        Timed {
            stream,
            deadline: Instant::now() + self.limits.message,
        }
    }

    fn reply(&self, to: &UnixStream, result: Result<Answer, ControlError>) -> io::Result<()> {
        let framed = protocol::frame(&Reply::from(result)).or_else(|_| {
            let message = format!("the answer is longer than {} bytes", protocol::MAX_FRAME);
            protocol::frame(&Reply::from(Err(ControlError::failed(message))))
        });
        self.timed(to).write_all(&framed?)
    }

    fn is_over(&self) -> bool {
        let mut over = [PollFd::new(&self.over, PollFlags::IN)];
        poll(&mut over, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }
}

/// One of [`Limits::connections`], given back when this is dropped.
struct Seat(Arc<Shared>);

impl Seat {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let mut open = shared.connections();
        (*open < shared.limits.connections).then(|| {
            *open += 1;
            Self(shared.clone())
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        *self.0.connections() -= 1;
        self.0.fewer.notify_all();
    }
}

fn accept_all<O: Owner>(listener: &UnixListener, owner: &Arc<O>, shared: &Arc<Shared>) {
    loop {
        let mut fds = [
            PollFd::new(&shared.over, PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => tracing::warn!("the control socket cannot be watched: {error}"),
        }
        if !fds[0].revents().is_empty() {
            return;
        }
        match listener.accept() {
            Ok((stream, _)) => {
                if let Err(error) = welcome(stream, owner, shared) {
                    tracing::debug!("a control connection was not served: {error}");
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!("a control connection cannot be accepted: {error}");
                thread::sleep(PAUSE);
            }
        }
    }
}

fn welcome<O: Owner>(stream: UnixStream, owner: &Arc<O>, shared: &Arc<Shared>) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    // The socket's mode keeps others out; this holds even where somebody has changed it.
    let peer = rustix::net::sockopt::socket_peercred(&stream)?.uid;
    if !peer.is_root() && peer != rustix::process::getuid() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let Some(seat) = Seat::take(shared) else {
        let served = shared.limits.connections;
        let message = format!("{served} connections are being served: try again later");
        return shared.reply(&stream, Err(error(ErrorKind::Busy, message)));
    };
    let owner = owner.clone();
    thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            if let Err(error) = serve(stream, &*owner, &seat.0) {
                tracing::debug!("a control connection broke: {error}");
            }
        })?;
    Ok(())
}

/// What a connection turned out to be.
enum Asked {
    Request(Op),
    /// `GET`: its first four bytes are no length of a message.
    Http,
    /// Nothing more will come.
    End,
    /// Something to be told, and whether the connection can go on.
    Wrong(ControlError, bool),
}

fn serve(stream: UnixStream, owner: &impl Owner, shared: &Shared) -> io::Result<()> {
    loop {
        let wanted = PollFd::new(&stream, PollFlags::IN);
        if !wait_for(wanted, &shared.over, shared.limits.idle)? {
            return Ok(());
        }
        let result = match read_request(&stream, shared)? {
            Asked::End => return Ok(()),
            Asked::Http => return metrics::answer(shared.timed(&stream), owner),
            Asked::Wrong(error, goes_on) => {
                shared.reply(&stream, Err(error))?;
                if !goes_on {
                    return Ok(());
                }
                continue;
            }
            Asked::Request(Op::Connect { port }) => return connect(stream, port, owner, shared),
            Asked::Request(Op::Wait) => await_end(&stream, owner, shared)?,
            Asked::Request(Op::Stop { timeout }) => {
                match owner.stop(Duration::from_secs(timeout.into())) {
                    Ok(()) => await_end(&stream, owner, shared)?,
                    Err(error) => Some(Err(error)),
                }
            }
            Asked::Request(op) => Some(perform(owner, op)),
        };
        let Some(result) = result else { return Ok(()) };
        shared.reply(&stream, result)?;
    }
}

/// The operations that are done when they return.
fn perform(owner: &impl Owner, op: Op) -> Result<Answer, ControlError> {
    let done = |()| Answer::Done;
    match op {
        Op::Inspect => Ok(Answer::Inspection(Box::new(owner.inspect()))),
        Op::Stats => owner.stats().map(|stats| Answer::Stats(Box::new(stats))),
        Op::Kill {
            signal: signal @ 1..=LAST_SIGNAL,
        } => owner.kill(signal).map(done),
        Op::Kill { signal } => Err(ControlError::failed(format!("{signal} is no signal"))),
        Op::Pause => owner.pause().map(done),
        Op::Resume => owner.resume().map(done),
        Op::Rename { to } => owner.rename(&to).map(done),
        // Not `_`: a new operation has to be put somewhere.
        Op::PortAdd { .. }
        | Op::PortRm { .. }
        | Op::PortLs
        | Op::PortAuto { .. }
        | Op::ReverseAdd { .. }
        | Op::ReverseRm { .. }
        | Op::SshAgent { .. } => owner.forward(op),
        Op::MountAdd { .. } | Op::MountRm { .. } | Op::MountLs => owner.mount(op),
        Op::Stop { .. } | Op::Wait | Op::Connect { .. } => Err(error(
            ErrorKind::UnknownOp,
            "this operation is not answered at once",
        )),
    }
}

/// Waits for the machine's end; None where there is nobody to tell any more.
fn await_end(
    stream: &UnixStream,
    owner: &impl Owner,
    shared: &Shared,
) -> io::Result<Option<Result<Answer, ControlError>>> {
    let latch = owner.ended();
    loop {
        if let Some(ending) = latch.ending() {
            return Ok(Some(Ok(Answer::Ended(ending.clone()))));
        }
        if shared.is_over() {
            return Ok(None);
        }
        let mut fds = [
            PollFd::from_borrowed_fd(latch.as_fd(), PollFlags::IN),
            PollFd::new(&shared.over, PollFlags::IN),
            // Only its hang-up: who has no more to ask may still listen.
            PollFd::new(stream, PollFlags::empty()),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !fds[2].revents().is_empty() {
            return Ok(None);
        }
    }
}

/// Turns the connection over to the guest.
fn connect(stream: UnixStream, port: u32, owner: &impl Owner, shared: &Shared) -> io::Result<()> {
    let agent = agent_protocol::VERSION;
    shared.reply(&stream, Ok(Answer::Connected { agent }))?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    owner.connect(port, stream.into())
}

fn read_request(stream: &UnixStream, shared: &Shared) -> io::Result<Asked> {
    let mut from = shared.timed(stream);
    let mut prefix = [0u8; 4];
    let malformed = |message: String| Asked::Wrong(error(ErrorKind::Malformed, message), false);
    match from.read(&mut prefix[..1])? {
        0 => return Ok(Asked::End),
        _ => match from.read_exact(&mut prefix[1..]) {
            Ok(()) => {}
            Err(error) => return Ok(malformed(half(&error, shared))),
        },
    }
    if prefix == *b"GET " {
        return Ok(Asked::Http);
    }
    let body = match protocol::read_body(prefix, &mut from) {
        Ok(body) => body,
        Err(error) => return Ok(malformed(half(&error, shared))),
    };
    Ok(match parse(&body) {
        Ok(op) => Asked::Request(op),
        Err(error) => {
            let goes_on = error.kind != ErrorKind::Malformed;
            Asked::Wrong(error, goes_on)
        }
    })
}

/// Why no whole message arrived.
fn half(error: &io::Error, shared: &Shared) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "half a message".to_owned(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            format!("half a message in {} s", shared.limits.message.as_secs())
        }
        _ => error.to_string(),
    }
}

fn parse(body: &[u8]) -> Result<Op, ControlError> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let Version { version } = serde_json::from_slice(body)
        .map_err(|wrong| error(ErrorKind::Malformed, format!("that is no request: {wrong}")))?;
    if version != protocol::VERSION {
        let spoken = protocol::VERSION;
        return Err(error(
            ErrorKind::Version,
            format!("version {version} of the protocol is not spoken here, version {spoken} is"),
        ));
    }
    let request = serde_json::from_slice::<Request>(body);
    request.map(|request| request.op).map_err(|wrong| {
        error(
            ErrorKind::UnknownOp,
            format!("that is no operation: {wrong}"),
        )
    })
}

fn error(kind: ErrorKind, message: impl Into<String>) -> ControlError {
    ControlError {
        kind,
        message: message.into(),
    }
}

/// Waits until `wanted` is ready; false where the server ends or `patience` does first.
fn wait_for(wanted: PollFd<'_>, over: &OwnedFd, patience: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + patience;
    let mut fds = [PollFd::new(over, PollFlags::IN), wanted];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
            Ok(0) => return Ok(false),
            // Ready both: what was asked before the end is answered.
            Ok(_) => return Ok(!fds[1].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A stream that fails with TimedOut or WouldBlock when a message has taken too long, however it trickles.
pub(super) struct Timed<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Duration> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(left),
        }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(buffer)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
