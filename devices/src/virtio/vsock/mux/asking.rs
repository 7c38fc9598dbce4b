//! Connections that the guest is asked for, a few at a time.
//!
//! A guest that is asked for thousands at once answers the last of them long after the first, and what
//! those that it has answered have to say would wait behind all the requests. So only some requests
//! are under way; the other connections wait for their turn.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::Mux;
use crate::virtio::vsock::connection::{Connection, State};

/// Requests without an answer: more than a guest answers before it hears of the next.
pub(in crate::virtio::vsock) const MAX_UNANSWERED: usize = 64;

/// Who is to be asked for, and how many have been without an answer.
#[derive(Debug)]
pub(super) struct Asking {
    /// Tokens of connections that wait for their turn.
    waiting: VecDeque<u64>,
    unanswered: usize,
    /// How long the guest may leave all of them unanswered.
    timeout: Duration,
    answered_at: Option<Instant>,
}

impl Asking {
    pub fn new(timeout: Duration) -> Self {
        Self {
            waiting: VecDeque::new(),
            unanswered: 0,
            timeout,
            answered_at: None,
        }
    }

    /// The guest has answered one.
    pub fn note_answer(&mut self) {
        self.answered_at = Some(Instant::now());
    }

    /// Whether a connection whose time is over goes on waiting: its turn has not come, and the guest is
    /// answering others.
    pub fn is_patient(&self, connection: &Connection, now: Instant) -> bool {
        let waits = matches!(connection.state, State::Connecting(_)) && !connection.unanswered;
        let answers = |at| now.saturating_duration_since(at) < self.timeout;
        waits && self.answered_at.is_some_and(answers)
    }
}

impl Mux {
    /// Asks the guest for a connection when its turn comes.
    pub(super) fn ask_in_turn(&mut self, index: usize) {
        self.asking.waiting.push_back(self.table.token(index));
        self.set_deadline(index);
        self.ask_next();
    }

    fn ask_next(&mut self) {
        while self.asking.unanswered < MAX_UNANSWERED
            && let Some(token) = self.asking.waiting.pop_front()
        {
            // It may have been given up meanwhile.
            if let Some(index) = self.table.find_token(token)
                && let Some(connection) = self.table.get_mut(index)
                && matches!(connection.state, State::Connecting(_))
            {
                connection.ask();
                self.asking.unanswered += 1;
                // The time that it waited is not the guest's.
                self.set_deadline(index);
                self.schedule(index);
            }
        }
    }

    /// A request is not under way any more, if the connection in this slot had one: the next one's turn.
    pub(super) fn answered(&mut self, index: usize) {
        if let Some(connection) = self.table.get_mut(index)
            && std::mem::take(&mut connection.unanswered)
        {
            self.asking.unanswered = self.asking.unanswered.saturating_sub(1);
            self.ask_next();
        }
    }
}
