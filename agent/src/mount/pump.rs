//! Carrying FUSE messages between the kernel and the host, one thread a direction of each queue.
//!
//! A message is two system calls on its way: it is read whole and written whole, with nothing looked at but its header
//! and what of it need not go to the host, and nothing allocated for one that is short. Both threads of a queue block in the
//! kernel, where exactly one of those that wait for requests is woken for each.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::ahead::Ahead;
use super::alarm::Alarm;
use super::call::Calls;
use super::delivery::Delivery;
use super::ending::{Ending, Why};
use super::known::Known;
use super::message::OUT_HEADER;
use super::order::{self, Replies};
use super::outbox::{self, Outbox};
use super::overlay::{self, Overlay};
use super::requests;
use super::view::Lookout;
use crate::connection::Connection;
use crate::socket_option;

/// The longest message: 1 MiB of a file's data, headers, and two names; the server on the host asks for no more.
pub const MAX_MESSAGE: usize = (1 << 20) + (8 << 10);

/// Messages up to this length are read together, as many as are there.
const BATCH: usize = 64 << 10;

/// Of a longer message, a thread is woken for so many bytes at a time, or for the last ones.
const PIECE: usize = 256 << 10;

/// When so many bytes do not come. Kernels before Linux 6.8 may have kept from the host that there is room for them.
const STALLED: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 10_000_000,
};

/// Pumps call little and keep their buffers on the heap.
pub const STACK: usize = 64 << 10;

/// Starts the thread that carries the kernel's requests to the host, by `to` or by calls, and what calls answer back.
pub fn start_requests(
    to: Arc<Outbox>,
    calls: Option<Calls>,
    delivery: Delivery,
    ending: Arc<Ending>,
) -> io::Result<JoinHandle<()>> {
    start("fuse-requests", move || {
        ending.announce(requests::carry(&to, calls, &delivery));
    })
}

/// Starts the thread that carries the host's replies to the kernel.
pub fn start_replies(
    from: Arc<Connection>,
    delivery: Delivery,
    ending: Arc<Ending>,
) -> io::Result<JoinHandle<()>> {
    start("fuse-replies", move || {
        let Err(why) = carry_to_kernel(&from, &mut |message| delivery.deliver(message));
        ending.announce(why);
    })
}

/// Whom the host's notifications are for: the kernel, which may refuse them, as they are of things that it does not
/// know, or is about to forget; and who has an interest in them.
pub struct Notices {
    pub device: Arc<OwnedFd>,
    pub after: Arc<Replies>,
    pub known: Arc<Known>,
    pub overlay: Arc<Overlay>,
}

impl Notices {
    fn tell(&self, message: &[u8]) -> Result<(), Why> {
        if let Some(counts) = order::counts(message) {
            return match self.after.wait(counts) {
                true => Ok(()),
                false => Err(Why::Unmounted),
            };
        }
        // First, as the kernel may ask anew as soon as it was told.
        self.known.note(message);
        if notify(&self.device, message)? {
            self.overlay.note(message);
        }
        Ok(())
    }
}

/// Starts the thread that carries the host's notifications to whom they are for.
pub fn start_notifications(
    from: Arc<Connection>,
    to: Notices,
    ending: Arc<Ending>,
) -> io::Result<JoinHandle<()>> {
    start("fuse-notices", move || {
        let Err(why) = carry_to_kernel(&from, &mut |message| to.tell(message));
        ending.announce(why);
    })
}

/// Whether the kernel has known what it is told of.
fn notify(to: &OwnedFd, message: &[u8]) -> Result<bool, Why> {
    match rustix::io::write(to, message) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(Errno::NOTDIR | Errno::NOTEMPTY | Errno::BUSY | Errno::PERM) => Ok(true),
        // What the guest should have forgotten it would now believe for good.
        Err(errno) => Err(Why::Failed(format!(
            "the kernel cannot be told of a change on the host: {errno}"
        ))),
    }
}

fn start(name: &str, pump: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(pump)
}

/// Starts the thread that sends what the outboxes hold back.
pub fn start_releases(alarm: Arc<Alarm>, outboxes: Vec<Arc<Outbox>>) -> io::Result<JoinHandle<()>> {
    start("fuse-releases", move || {
        alarm.attend(outbox::PATIENCE, || {
            for outbox in &outboxes {
                outbox.flush();
            }
        });
    })
}

/// Starts the thread that has names forgotten which changed below an overlay.
pub fn start_forgetting(alarm: Arc<Alarm>) -> io::Result<JoinHandle<()>> {
    start("fuse-overlay", move || {
        alarm.attend(overlay::PATIENCE, overlay::forget_names);
    })
}

/// Starts the thread that lists directories of a folder ahead of who looks up their entries.
pub fn start_ahead(ahead: Arc<Ahead>, lookout: Lookout) -> io::Result<JoinHandle<()>> {
    start("fuse-ahead", move || ahead.attend(lookout))
}

/// Reads messages and gives them to `tell` one by one; returns why there are no more.
fn carry_to_kernel(
    from: &Connection,
    tell: &mut dyn FnMut(&[u8]) -> Result<(), Why>,
) -> Result<std::convert::Infallible, Why> {
    let mut inbox = Inbox::new();
    loop {
        while let Some(message) = inbox.next()? {
            tell(message)?;
        }
        inbox.fill(from)?;
    }
}

/// What has been read and not been passed on yet, from `start` to `end` of the buffer.
struct Inbox {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    fn new() -> Self {
        Self {
            buffer: vec![0; MAX_MESSAGE].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// The length that the next message announces, once its header is there.
    fn announced(&self) -> Result<Option<usize>, Why> {
        let here = self.buffer.get(self.start..self.end).unwrap_or_default();
        let Some(&length) = here.first_chunk() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        match length {
            OUT_HEADER..=MAX_MESSAGE => Ok(Some(length)),
            _ => Err(Why::Failed(format!(
                "the host announces a message of {length} bytes, where {OUT_HEADER} to {MAX_MESSAGE} are possible"
            ))),
        }
    }

    /// The next message, where all of it is there.
    fn next(&mut self) -> Result<Option<&[u8]>, Why> {
        let Some(length) = self.announced()? else {
            return Ok(None);
        };
        let message = self.start..self.start + length;
        if message.end > self.end {
            return Ok(None);
        }
        self.start = message.end;
        Ok(self.buffer.get(message))
    }

    /// Reads more. Of a long message nothing behind it is read, so that it need not be moved, and the next
    /// begins at the front.
    fn fill(&mut self, from: &Connection) -> Result<(), Why> {
        let announced = self.announced()?;
        let here = self.end - self.start;
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, here);
        }
        match announced {
            Some(length) if length > BATCH => self.fill_to(length, from),
            _ => {
                wait(from, None)?;
                self.read(BATCH, from)
            }
        }
    }

    /// Reads to the end of a long message, and wakes up for large pieces of it only.
    fn fill_to(&mut self, length: usize, from: &Connection) -> Result<(), Why> {
        let mut woken_at = 1;
        let mut largest = PIECE;
        while self.end < length {
            let piece = (length - self.end).min(largest);
            if piece != woken_at {
                socket_option::wake_at(from, piece).map_err(lost)?;
                woken_at = piece;
            }
            let patience = (piece > 1).then_some(&STALLED);
            if !wait(from, patience)? {
                largest = 1;
                continue;
            }
            self.read(length, from)?;
        }
        match woken_at {
            1 => Ok(()),
            _ => socket_option::wake_at(from, 1).map_err(lost),
        }
    }

    /// Reads what there is, up to `limit` in the buffer.
    fn read(&mut self, limit: usize, from: &Connection) -> Result<(), Why> {
        let room = self.buffer.get_mut(self.end..limit).unwrap_or_default();
        match recv(from, room, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Err(Why::Failed("the host has closed it".to_owned())),
            Ok((_, length)) => {
                self.end += length;
                Ok(())
            }
            Err(Errno::INTR | Errno::AGAIN) => Ok(()),
            Err(errno) => Err(lost(errno.into())),
        }
    }
}

/// Waits until there is something to read; false where there was not in time.
///
/// Not recv(2): over vsock, that is woken by all that happens to the connection, such as room for more requests.
fn wait(from: &Connection, patience: Option<&Timespec>) -> Result<bool, Why> {
    loop {
        match poll(&mut [PollFd::new(from, PollFlags::IN)], patience) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(lost(errno.into())),
        }
    }
}

fn lost(error: io::Error) -> Why {
    Why::Failed(format!("the host does not answer: {error}"))
}
