//! Connections that the guest is asked for, a few at a time.
//!
//! A guest that is asked for thousands at once answers the last of them long after the first, and what
//! those that it has answered have to say would wait behind all the requests. So only some requests
//! are under way; the other connections wait for their turn, those to one port behind each other and not behind
//! those to others: behind each port may be somebody else.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::Mux;
use crate::virtio::vsock::connection::{Connection, State};

/// Requests without an answer: more than a guest answers before it hears of the next.
pub(in crate::virtio::vsock) const MAX_UNANSWERED: usize = 64;

/// Who is to be asked for, and how many have been without an answer.
#[derive(Debug)]
pub(super) struct Asking {
    /// Tokens of connections that wait for their turn, by the guest's port; none is without.
    waiting: HashMap<u32, VecDeque<u64>>,
    /// Those ports, the next one first.
    turns: VecDeque<u32>,
    unanswered: usize,
    /// How long the guest may leave all of them unanswered.
    timeout: Duration,
    answered_at: Option<Instant>,
}

impl Asking {
    pub fn new(timeout: Duration) -> Self {
        Self {
            waiting: HashMap::new(),
            turns: VecDeque::new(),
            unanswered: 0,
            timeout,
            answered_at: None,
        }
    }

    fn push(&mut self, port: u32, token: u64) {
        let same = self.waiting.entry(port).or_default();
        if same.is_empty() {
            self.turns.push_back(port);
        }
        same.push_back(token);
    }

    fn pop(&mut self) -> Option<u64> {
        let port = self.turns.pop_front()?;
        let same = self.waiting.get_mut(&port)?;
        let token = same.pop_front();
        match same.is_empty() {
            true => drop(self.waiting.remove(&port)),
            false => self.turns.push_back(port),
        }
        token
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
        let token = self.table.token(index);
        let Some(connection) = self.table.get_mut(index) else {
            return;
        };
        self.asking.push(connection.key.guest_port, token);
        self.set_deadline(index);
        self.ask_next();
    }

    fn ask_next(&mut self) {
        while self.asking.unanswered < MAX_UNANSWERED
            && let Some(token) = self.asking.pop()
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
