//! Carrying bytes between a command and its connections, one thread a direction.
//!
//! A pump waits with poll(2) for its source, for room at its destination, and for the command's
//! end, so none outlives its session however the other sides behave. Nothing is buffered beyond
//! one read: where the host is slow the command blocks on its pipe.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::connection::Connection;
use crate::reap::Exit;
use crate::terminal;

/// One read: large, because each becomes a packet or more with a notification of the host.
const BUFFER: usize = 128 << 10;

/// How much is still read after the command's end: more than a pipe or pty of ours can hold, so
/// all that it wrote arrives, while a descendant that goes on writing cannot keep the stream open.
const DRAIN: usize = 1 << 20;

/// Pumps call little and keep their buffers on the heap.
const STACK: usize = 64 << 10;

/// The command's side of a stream: a pipe end or a pty's master, always non-blocking.
#[derive(Debug, Clone)]
pub enum Endpoint {
    /// One end of a pipe.
    Pipe(Arc<OwnedFd>),
    /// The master of the session's pty.
    Terminal(Arc<OwnedFd>),
}

impl Endpoint {
    fn fd(&self) -> &OwnedFd {
        match self {
            Self::Pipe(fd) | Self::Terminal(fd) => fd,
        }
    }
}

/// Starts the thread that carries the command's output to the host.
pub fn start_output(
    from: Endpoint,
    to: Arc<Connection>,
    exit: Arc<Exit>,
) -> io::Result<JoinHandle<()>> {
    start("output", move || {
        // Either way the stream ends here; the host sees an early end, the command a closed pipe.
        let _ = pump_output(from.fd(), &to, &exit);
        drop(from);
        to.end_output();
    })
}

/// Starts the thread that carries the host's input to the command.
pub fn start_input(
    from: Arc<Connection>,
    to: Endpoint,
    exit: Arc<Exit>,
) -> io::Result<JoinHandle<()>> {
    start("input", move || {
        let ended_by_host = pump_input(&from, to.fd(), &exit).unwrap_or(false);
        if let (true, Endpoint::Terminal(master)) = (ended_by_host, &to) {
            // The command may have closed the terminal since: then nobody misses the end of file.
            let _ = type_end_of_file(master, &exit);
        }
        drop(to);
        from.end_input();
    })
}

fn start(name: &str, pump: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(pump)
}

fn pump_output(from: &OwnedFd, to: &Connection, exit: &Exit) -> io::Result<()> {
    let mut buffer = vec![0u8; BUFFER];
    loop {
        // The end is looked at first: what the command wrote before it is in the pipe then.
        let [ended, _] = wait([(exit.as_fd(), PollFlags::IN), (from.as_fd(), PollFlags::IN)])?;
        if ended {
            return drain(from, to, &mut buffer);
        }
        match read(from, &mut buffer)? {
            Some([]) => return Ok(()),
            Some(bytes) => (&mut &*to).write_all(bytes)?,
            None => {}
        }
    }
}

fn drain(from: &OwnedFd, to: &Connection, buffer: &mut [u8]) -> io::Result<()> {
    let mut drained = 0;
    while drained < DRAIN {
        match read(from, buffer)? {
            Some([]) | None => break,
            Some(bytes) => {
                (&mut &*to).write_all(bytes)?;
                drained += bytes.len();
            }
        }
    }
    Ok(())
}

/// Returns whether the host ended its input (rather than the command its own reading).
fn pump_input(from: &Connection, to: &OwnedFd, exit: &Exit) -> io::Result<bool> {
    let mut buffer = vec![0u8; BUFFER];
    loop {
        let waited = wait([
            (exit.as_fd(), PollFlags::IN),
            (to.as_fd(), PollFlags::empty()),
            (from.as_fd(), PollFlags::IN),
        ])?;
        let [ended, closed, _] = waited;
        if ended || closed {
            return Ok(false);
        }
        let length = match (&mut &*from).read(&mut buffer) {
            Ok(0) => return Ok(true),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if !write_all(to, buffer.get(..length).unwrap_or_default(), exit)? {
            return Ok(false);
        }
    }
}

/// Writes to a non-blocking descriptor; false where the command ended before all was taken.
fn write_all(to: &OwnedFd, mut bytes: &[u8], exit: &Exit) -> io::Result<bool> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::AGAIN) => {
                let [ended, _] =
                    wait([(exit.as_fd(), PollFlags::IN), (to.as_fd(), PollFlags::OUT)])?;
                if ended {
                    return Ok(false);
                }
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

/// The host's half-close on a terminal is what a person does with Ctrl-D.
fn type_end_of_file(master: &OwnedFd, exit: &Exit) -> io::Result<()> {
    match terminal::end_of_file_character(master)? {
        Some(character) => write_all(master, &[character], exit).map(|_| ()),
        None => Ok(()),
    }
}

/// Reads from a non-blocking descriptor: None where nothing is there, empty at the end.
fn read<'a>(from: &OwnedFd, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
    match rustix::io::read(from, &mut *buffer) {
        Ok(length) => Ok(Some(buffer.get(..length).unwrap_or_default())),
        // A pty's master reports EIO when nobody has the terminal open any more.
        Err(Errno::IO) => Ok(Some(&[])),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Waits until something happens and tells which of the descriptors it happened on.
fn wait<const N: usize>(on: [(rustix::fd::BorrowedFd<'_>, PollFlags); N]) -> io::Result<[bool; N]> {
    let mut fds = on.map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags));
    loop {
        match poll(&mut fds, None) {
            Ok(_) => return Ok(fds.map(|fd| !fd.revents().is_empty())),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
