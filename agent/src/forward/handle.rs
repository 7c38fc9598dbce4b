//! How other threads speak to the reactor: messages in a queue, and an event that says so.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::resolve::Answer;
use super::slots::Index;

/// A message for the reactor.
#[derive(Debug)]
pub enum Message {
    /// What was asked for on behalf of this entry under this number.
    Resolved(Index, u64, Answer),
}

/// The reactor, seen from other threads.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Inbox>);

#[derive(Debug)]
struct Inbox {
    messages: Mutex<Vec<Message>>,
    event: OwnedFd,
}

impl Handle {
    /// An empty queue.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Inbox {
            messages: Mutex::default(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })))
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
