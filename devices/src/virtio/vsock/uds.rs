//! The field's convention for reaching a guest's vsock from other programs: a Unix socket at PATH.
//!
//! A program connects to PATH and writes `CONNECT <port>\n`. When the guest has accepted it reads
//! `OK <host port>\n`, and from there on the connection is the guest's; when the guest refuses, it
//! reads the end of the stream. A connection that the guest opens to port P of the host, where no
//! service of this process serves it, goes to the Unix socket at PATH_P.
//!
//! One thread reads the lines. Clients that have not finished theirs are bounded in number
//! ([`MAX_HALF_OPEN`]) and in time ([`LINE_TIMEOUT`]); further ones wait in the socket's backlog.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::asked::Asked;
use super::handle::VsockHandle;

/// Clients whose line is not complete, at most.
pub const MAX_HALF_OPEN: usize = 64;

/// How long a client may take for its line.
pub const LINE_TIMEOUT: Duration = Duration::from_secs(2);

/// The longest line, with its newline: `CONNECT 4294967295\r\n` and a little to spare.
const MAX_LINE: usize = 32;

/// Why the Unix socket could not be offered.
#[derive(Debug, Error)]
pub enum UdsError {
    /// Another process answers there.
    #[error("{0} is in use: another process listens on it; give another path")]
    InUse(PathBuf),
    /// Something else stands there.
    #[error("{0} exists and is no socket; it was left alone: give another path")]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("the vsock socket {path} could not be made")]
    System {
        /// Where it was to be.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The Unix socket and its thread; dropping it removes both. Connections that were made go on.
#[derive(Debug)]
pub struct VsockUds {
    path: PathBuf,
    /// Device and inode of the socket file, so that only our own is removed.
    identity: (u64, u64),
    handle: VsockHandle,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl VsockUds {
    /// Offers the device behind `handle` at `path`, for this user only (mode 0600), and becomes
    /// the handle's fallback. A socket file at which nobody answers is replaced.
    pub fn bind(path: impl Into<PathBuf>, handle: VsockHandle) -> Result<Self, UdsError> {
        let path = path.into();
        let system = |source| UdsError::System {
            path: path.clone(),
            source,
        };
        let listener = listen(&path)?;
        let identity = identity(&path).map_err(system)?;
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(system)?);
        let reader = LineReader {
            listener,
            stop: stop.clone(),
            handle: handle.clone(),
            clients: Vec::new(),
        };
        let thread = thread::Builder::new()
            .name("vsock-uds".to_owned())
            .spawn(move || reader.run())
            .map_err(system)?;
        let uds = Self {
            path: path.clone(),
            identity,
            handle,
            stop,
            thread: Some(thread),
        };
        let base = path.clone();
        let fallback = move |asked: Asked| {
            if let Some(stream) = connect_out(&base, asked.port()) {
                asked.accept(stream);
            }
        };
        uds.handle
            .set_fallback(Some(Box::new(fallback)))
            .map_err(system)?;
        Ok(uds)
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for VsockUds {
    fn drop(&mut self) {
        // Fails only where the device is gone, and its fallback with it.
        let _ = self.handle.set_fallback(None);
        // Fails only on an overflowing counter: then the thread has been told already.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the vsock-uds thread panicked");
        }
        if identity(&self.path).is_ok_and(|now| now == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!("{} could not be removed: {error}", self.path.display());
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// A listening socket at `path`, in the place of one that nobody serves.
fn listen(path: &Path) -> Result<UnixListener, UdsError> {
    let system = |source: io::Error| UdsError::System {
        path: path.to_owned(),
        source,
    };
    // Two processes that find the same dead socket must not remove each other's new one.
    let _lock = lock_directory(path).map_err(system)?;
    match bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {}
        result => return result.map_err(system),
    }
    let metadata = fs::symlink_metadata(path).map_err(system)?;
    if !metadata.file_type().is_socket() {
        return Err(UdsError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
        Err(error) => return Err(system(error)),
        Ok(_) => return Err(UdsError::InUse(path.to_owned())),
    }
    fs::remove_file(path).map_err(system)?;
    bind(path).map_err(system)
}

fn lock_directory(path: &Path) -> io::Result<File> {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let file = File::open(directory)?;
    // Held for microseconds by others of our kind.
    for _ in 0..100 {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => thread::sleep(Duration::from_millis(10)),
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::new(
        ErrorKind::WouldBlock,
        "the directory is locked by another process",
    ))
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    // The file gets the mode that the socket has when it is bound, so there is no moment at
    // which others could connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, 128)?;
    Ok(UnixListener::from(socket))
}

/// A stream to whoever listens at PATH_`port`; None where nobody does or can at once. Never blocks.
pub fn connect_out(base: &Path, port: u32) -> Option<OwnedFd> {
    let mut name = base.as_os_str().to_owned();
    name.push(format!("_{port}"));
    let connect = || -> io::Result<OwnedFd> {
        let address = SocketAddrUnix::new(Path::new(&name))?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        rustix::net::connect(&socket, &address)?;
        Ok(socket)
    };
    connect()
        .inspect_err(|error| tracing::debug!("nobody takes {}: {error}", name.display()))
        .ok()
}

/// A client that has not sent its whole line.
struct Client {
    stream: UnixStream,
    line: Vec<u8>,
    deadline: Instant,
}

/// How far a client's line is.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Incomplete,
    /// It asks for this port.
    Port(u32),
    /// It is no request, too long, or the client is gone.
    Bad,
}

/// What the thread owns.
struct LineReader {
    listener: UnixListener,
    stop: Arc<EventFd>,
    handle: VsockHandle,
    clients: Vec<Client>,
}

impl LineReader {
    fn run(mut self) {
        while let Some((accept, readable)) = self.wait() {
            let now = Instant::now();
            // From the back, so that those that leave do not move those to be looked at.
            for index in (0..self.clients.len()).rev() {
                let line = match readable.get(index) {
                    Some(true) => self.clients[index].read(),
                    _ => Line::Incomplete,
                };
                match line {
                    Line::Incomplete if self.clients[index].deadline > now => {}
                    Line::Incomplete | Line::Bad => drop(self.clients.swap_remove(index)),
                    Line::Port(port) => {
                        let client = self.clients.swap_remove(index);
                        if let Err(error) = join(&self.handle, client.stream, port) {
                            tracing::debug!("a vsock client was turned away: {error}");
                        }
                    }
                }
            }
            if accept && !self.accept() {
                return;
            }
        }
    }

    /// Waits for something to do: whether to accept, and which clients are readable. None when it
    /// is time to stop.
    fn wait(&self) -> Option<(bool, Vec<bool>)> {
        loop {
            // SAFETY: the eventfd stays open as long as `self.stop`, which outlives this borrow.
            let stop = unsafe { BorrowedFd::borrow_raw(self.stop.as_raw_fd()) };
            let has_room = self.clients.len() < MAX_HALF_OPEN;
            let listening = if has_room {
                PollFlags::IN
            } else {
                PollFlags::empty()
            };
            let mut fds = vec![
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
                PollFd::from_borrowed_fd(self.listener.as_fd(), listening),
            ];
            fds.extend(
                self.clients
                    .iter()
                    .map(|client| PollFd::new(&client.stream, PollFlags::IN)),
            );
            let now = Instant::now();
            let first = self.clients.iter().map(|client| client.deadline).min();
            let timeout = first.map(|deadline| {
                let left = deadline.saturating_duration_since(now);
                Timespec {
                    tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                    tv_nsec: left.subsec_nanos().into(),
                }
            });
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) if !fds[0].revents().is_empty() => return None,
                Ok(_) => {
                    let accept = fds[1].revents().contains(PollFlags::IN);
                    let readable = fds[2..].iter().map(|fd| !fd.revents().is_empty());
                    return Some((accept, readable.collect()));
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!("the vsock socket cannot be watched any more: {error}");
                    return None;
                }
            }
        }
    }

    /// Takes the clients that wait; false where the socket is of no use any more.
    fn accept(&mut self) -> bool {
        while self.clients.len() < MAX_HALF_OPEN {
            match self.listener.accept() {
                Ok((stream, _)) => self.clients.push(Client {
                    stream,
                    line: Vec::with_capacity(MAX_LINE),
                    deadline: Instant::now() + LINE_TIMEOUT,
                }),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return true,
                    Some(libc::EINTR | libc::ECONNABORTED) => {}
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) => {
                        // The client stays in the backlog; trying again at once would spin.
                        thread::sleep(Duration::from_millis(100));
                        return true;
                    }
                    _ => {
                        tracing::error!("the vsock socket takes no more clients: {error}");
                        return false;
                    }
                },
            }
        }
        true
    }
}

impl Client {
    /// Reads on in the line, and not one byte beyond: what follows is for the guest.
    fn read(&mut self) -> Line {
        while self.line.len() < MAX_LINE {
            let mut byte = [0u8; 1];
            let flags = rustix::net::RecvFlags::DONTWAIT;
            match rustix::net::recv(&self.stream, &mut byte, flags) {
                Ok((1, _)) if byte == *b"\n" => return parse(&self.line),
                Ok((1, _)) => self.line.push(byte[0]),
                Err(rustix::io::Errno::AGAIN) => return Line::Incomplete,
                Err(rustix::io::Errno::INTR) => {}
                Ok(_) | Err(_) => return Line::Bad,
            }
        }
        Line::Bad
    }
}

fn parse(line: &[u8]) -> Line {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let port = line
        .strip_prefix(b"CONNECT ")
        .filter(|digits| digits.iter().all(u8::is_ascii_digit))
        .and_then(|digits| std::str::from_utf8(digits).ok())
        .and_then(|digits| digits.parse().ok());
    port.map_or(Line::Bad, Line::Port)
}

/// Asks the guest for a connection to `port`; the client hears `OK` before any of its data.
fn join(handle: &VsockHandle, stream: UnixStream, port: u32) -> io::Result<()> {
    let client = stream.try_clone()?;
    handle.connect_with(port, stream, move |answer| {
        let Ok(host_port) = answer else {
            // The device drops its end, and this closure the other: the client sees the end.
            return;
        };
        let line = format!("OK {host_port}\n");
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        // These are the first bytes in an empty socket buffer, so they fit or the client is gone.
        if rustix::net::send(&client, line.as_bytes(), flags) != Ok(line.len()) {
            let _ = client.shutdown(std::net::Shutdown::Both);
        }
    })
}
