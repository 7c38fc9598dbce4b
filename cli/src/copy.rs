//! Bytes between this process's descriptors and a stream to the guest.
//!
//! The descriptors are the caller's, and may be anything: terminals, pipes, files, and non-blocking
//! where another program left them so.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use thiserror::Error;

/// Bytes copied at a time.
const CHUNK: usize = 256 << 10;

/// Why a stream from the guest was not copied to its end.
#[derive(Debug, Error)]
pub enum OutputError {
    /// The guest's side.
    #[error("a stream from the machine broke: {0}")]
    Broken(io::Error),
    /// The caller's side: nobody reads it any more, or the disk is full.
    #[error("output cannot be written: {0}")]
    Unwritten(io::Error),
}

/// Copies `from` to `to` until it ends, and passes the end on. What `to` does not take any more is left.
pub fn input(from: BorrowedFd<'_>, mut to: &UnixStream) {
    let mut buffer = vec![0u8; CHUNK];
    loop {
        match read(from, &mut buffer) {
            Ok(0) => break,
            Ok(len) => {
                if to.write_all(&buffer[..len]).is_err() {
                    // The other end closed it, or ended.
                    return;
                }
            }
            Err(error) => {
                tracing::debug!("standard input cannot be read: {error}");
                break;
            }
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// Gives `from` to `take` until it ends. Where `take` fails, `from` is ended both ways, which tells the other
/// end.
pub fn output(
    mut from: &UnixStream,
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), OutputError> {
    let mut buffer = vec![0u8; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => {
                if let Err(error) = take(&buffer[..len]) {
                    let _ = from.shutdown(Shutdown::Both);
                    return Err(OutputError::Unwritten(error));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(OutputError::Broken(error)),
        }
    }
}

/// Reads what there is, also where the caller left the descriptor non-blocking; 0 at the end.
pub fn read(from: BorrowedFd<'_>, buffer: &mut [u8]) -> rustix::io::Result<usize> {
    loop {
        match rustix::io::read(from, &mut *buffer) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(from, PollFlags::IN),
            read => return read,
        }
    }
}

/// Writes all of `data`, also where the caller left the descriptor non-blocking.
pub fn write_all(to: BorrowedFd<'_>, mut data: &[u8]) -> rustix::io::Result<()> {
    while !data.is_empty() {
        match rustix::io::write(to, data) {
            Ok(len) => data = &data[len..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(to, PollFlags::OUT),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn wait_for(fd: BorrowedFd<'_>, what: PollFlags) {
    // A failed poll is followed by another try of the operation, which names the failure.
    let _ = poll(&mut [PollFd::from_borrowed_fd(fd, what)], None);
}
