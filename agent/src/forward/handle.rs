//! How other threads speak to the reactor: messages in a queue, and an event that says so.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::resolve::Answer;
use super::slots::Index;

/// How long somebody waits for a report to be made.
const REPORT_TIMEOUT: Duration = Duration::from_secs(1);

/// A message for the reactor.
#[derive(Debug)]
pub enum Message {
    /// What was asked for on behalf of this entry under this number.
    Resolved(Index, u64, Answer),
    /// Look at the guest's listening sockets, tell of changes, and say when that is done.
    Look(SyncSender<()>),
}

/// The reactor, seen from other threads.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Inbox>);

#[derive(Debug)]
struct Inbox {
    messages: Mutex<Vec<Message>>,
    event: OwnedFd,
    is_watched: AtomicBool,
}

impl Handle {
    /// An empty queue.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Inbox {
            messages: Mutex::default(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            is_watched: AtomicBool::new(false),
        })))
    }

    /// Has the host told of the guest's listening sockets as they are now, where it watches them.
    pub fn report_listeners(&self) {
        if self.0.is_watched.load(Ordering::Relaxed) {
            let (done, is_done) = sync_channel(1);
            self.send(Message::Look(done));
            // A report that takes this long is not worth waiting for.
            let _ = is_done.recv_timeout(REPORT_TIMEOUT);
        }
    }

    /// Notes whether the host watches listening sockets.
    pub(super) fn set_watched(&self, is_watched: bool) {
        self.0.is_watched.store(is_watched, Ordering::Relaxed);
    }

    /// Queues a message and wakes the reactor.
    pub(super) fn send(&self, message: Message) {
        let inbox = &self.0;
        let mut messages = inbox
            .messages
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        messages.push(message);
        // A counter that cannot count higher has its event pending, which is all that is needed.
        let _ = rustix::io::write(&inbox.event, &1u64.to_ne_bytes());
    }

    /// Takes all messages; the next one is a new event.
    pub(super) fn receive(&self) -> Vec<Message> {
        let inbox = &self.0;
        let mut messages = inbox
            .messages
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // It fails where the event was taken already, which changes nothing.
        let _ = rustix::io::read(&inbox.event, &mut [0; 8]);
        std::mem::take(&mut *messages)
    }
}

/// Readable while there are messages.
impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}
