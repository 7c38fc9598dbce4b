//! Connections that a guest in the outer Linux opens to the host, which only the host can answer: the
//! runner tells it of each, and keeps the guest waiting until then.

use std::collections::HashMap;
use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devices::virtio::vsock::{Asked, VsockHandle};

/// Connections that wait for the host's answer at a time; further ones are refused.
const MAX_WAITING: usize = 256;

/// How long one waits: longer than Linux as a guest does.
const PATIENCE: Duration = Duration::from_secs(10);

/// Those that wait for the host's answer. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Waiting(Arc<Mutex<HashMap<u64, (Instant, Asked)>>>);

/// What the host is told: a port of its own, and the number of a connection to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    pub port: u32,
    pub number: u64,
}

impl Waiting {
    /// Keeps what the guest asks `vsock` for, from now on. The questions are for the host.
    pub fn listen(&self, vsock: &VsockHandle) -> io::Result<Receiver<Question>> {
        let (questions, receiver) = mpsc::channel();
        let (waiting, mut latest) = (self.clone(), 0);
        let fallback = move |asked| {
            latest += 1;
            waiting.ask(latest, asked, &questions);
        };
        vsock.set_fallback(Some(Box::new(fallback)))?;
        Ok(receiver)
    }

    /// What is dropped is refused.
    fn ask(&self, number: u64, asked: Asked, questions: &Sender<Question>) {
        let now = Instant::now();
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|_, (since, _)| now.saturating_duration_since(*since) < PATIENCE);
        let port = asked.port();
        if waiting.len() < MAX_WAITING && questions.send(Question { port, number }).is_ok() {
            waiting.insert(number, (now, asked));
        }
    }

    /// The one with this number, unless it waits no more.
    pub fn take(&self, number: u64) -> Option<Asked> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.remove(&number).map(|(_, asked)| asked)
    }
}
