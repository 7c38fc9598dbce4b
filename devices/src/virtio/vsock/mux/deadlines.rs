//! How long the guest may take to answer.

use std::time::{Duration, Instant};

use super::Mux;
use crate::virtio::vsock::connection::State;
use crate::virtio::vsock::counters::Counters;
use crate::virtio::vsock::handle::ConnectError;

/// How often deadlines are looked at while there are any.
const TICK: Duration = Duration::from_secs(1);

impl Mux {
    /// Gives the guest until then to answer.
    pub(super) fn set_deadline(&mut self, index: usize) {
        let Some(connection) = self.table.get_mut(index) else {
            return;
        };
        let timeout = match connection.state {
            State::Connecting(_) => self.connect_timeout,
            _ => self.close_timeout,
        };
        connection.deadline = Some(Instant::now() + timeout);
        self.run_timer();
    }

    fn run_timer(&mut self) {
        if !self.timer_runs {
            match self.timer.reset(TICK, Some(TICK)) {
                Ok(()) => self.timer_runs = true,
                Err(error) => tracing::warn!("the vsock timer cannot be set: {error}"),
            }
        }
    }

    pub(super) fn tick(&mut self) {
        let _ = self.timer.wait();
        let now = Instant::now();
        let mut waiting = false;
        let mut expired = Vec::new();
        for (index, connection) in self.table.iter_mut() {
            match connection.deadline {
                Some(deadline) if deadline <= now && !self.asking.is_patient(connection, now) => {
                    expired.push(index);
                }
                Some(_) => waiting = true,
                None => {}
            }
        }
        for index in expired {
            self.expire(index);
        }
        if !waiting && self.timer.clear().is_ok() {
            self.timer_runs = false;
        }
    }

    fn expire(&mut self, index: usize) {
        let Some(connection) = self.table.get_mut(index) else {
            return;
        };
        if let State::Connecting(_) = connection.state
            && let State::Connecting(completion) =
                std::mem::replace(&mut connection.state, State::Lingering)
        {
            Counters::add(&self.counters.refused, 1);
            completion.complete(Err(ConnectError::TimedOut));
        }
        self.abort(index);
    }
}
