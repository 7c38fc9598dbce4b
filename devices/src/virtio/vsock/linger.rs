//! The last bytes of a machine: what the guest had sent when its device went away, and a slow
//! reader of the host has not taken yet.
//!
//! Without this, the end of a command's output would be lost when the command powers the machine
//! off. A thread of its own writes what is left, because nobody turns the mux any more.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::backlog::Backlog;
use super::stream::HostStream;

/// How long no reader at all may take a byte before what is left is dropped.
const PATIENCE: Duration = Duration::from_secs(10);

/// A stream and the bytes that it still has to get.
#[derive(Debug)]
pub(super) struct LastWords {
    pub stream: HostStream,
    pub backlog: Backlog,
}

impl LastWords {
    /// Writes what the stream takes now; true when nothing is left to do.
    fn write(&mut self) -> bool {
        self.stream.writable = true;
        while !self.backlog.is_empty() && self.stream.writable {
            match self.stream.write_parts(self.backlog.filled()) {
                Ok(taken) => self.backlog.consume(taken),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                // The reader is gone.
                Err(_) => return true,
            }
        }
        let done = self.backlog.is_empty();
        if done {
            self.stream.end_write();
        }
        done
    }
}

/// Writes all of `left` and closes the streams, in the background.
pub(super) fn deliver(mut left: Vec<LastWords>) {
    left.retain_mut(|words| !words.write());
    if left.is_empty() {
        return;
    }
    let spawned = thread::Builder::new()
        .name("vsock-linger".to_owned())
        .spawn(move || run(left));
    if let Err(error) = spawned {
        tracing::warn!("the end of a vsock stream is lost, no thread could be made: {error}");
    }
}

fn run(mut left: Vec<LastWords>) {
    let patience = Timespec {
        tv_sec: PATIENCE.as_secs() as i64,
        tv_nsec: 0,
    };
    while !left.is_empty() {
        let mut fds: Vec<PollFd<'_>> = left
            .iter()
            .map(|words| {
                // SAFETY: the descriptor is open while `left` holds the stream, which is not
                // touched before `fds` is gone.
                let fd = unsafe { BorrowedFd::borrow_raw(words.stream.as_raw_fd()) };
                PollFd::from_borrowed_fd(fd, PollFlags::OUT)
            })
            .collect();
        match poll(&mut fds, Some(&patience)) {
            Ok(0) => {
                let bytes: usize = left.iter().map(|words| words.backlog.len()).sum();
                tracing::warn!("{bytes} bytes of the guest's last output found no reader");
                return;
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::warn!("the guest's last output cannot be delivered: {error}");
                return;
            }
        }
        left.retain_mut(|words| !words.write());
    }
}
