//! The agent, while it is connected: the way to it, and the connection that controls forwards.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use agent::protocol::{DialError, FromForwarder, Target, ToForwarder};

use super::Guest;
use super::dial::{DIAL_PATIENCE, DialDone};
use super::framed::Framed;
use super::poll::{Poller, Ready, Token};

/// Bytes of messages that may wait for the agent to read them. One that reads nothing is given up.
const BACKLOG: usize = 1 << 20;

/// Dials under way at once.
const MAX_DIALS: usize = 4096;

/// Whether the agent reports what listens in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watch {
    Off,
    /// It was asked to, and did not yet.
    Asked,
    On,
}

/// A connected agent.
pub struct Agent {
    guest: Arc<dyn Guest>,
    control: Framed,
    /// Whether room to write is waited for.
    waiting: bool,
    watch: Watch,
    /// Why it is of no use any more.
    lost: Option<io::Error>,
}

impl Agent {
    /// Hears it from now on.
    pub fn new(guest: Arc<dyn Guest>, control: UnixStream, poller: &Poller) -> io::Result<Self> {
        let control = Framed::new(control, BACKLOG)?;
        poller.add(&control, Token::Control)?;
        Ok(Self {
            guest,
            control,
            waiting: false,
            watch: Watch::Off,
            lost: None,
        })
    }

    /// The way to it.
    pub fn guest(&self) -> &Arc<dyn Guest> {
        &self.guest
    }

    /// Tells it something; a failure shows in [`Agent::tend`].
    pub fn tell(&mut self, message: &ToForwarder) {
        if self.lost.is_none()
            && let Err(error) = self.control.send(message)
        {
            self.lost = Some(error);
        }
    }

    /// Has it report what listens in the guest, or not any more.
    pub fn watch(&mut self, on: bool) {
        if on != (self.watch != Watch::Off) {
            self.watch = match on {
                true => Watch::Asked,
                false => Watch::Off,
            };
            self.tell(&ToForwarder::Watch(on));
        }
    }

    /// Takes note of a report; whether it was asked for.
    pub fn reported(&mut self) -> bool {
        let asked = self.watch != Watch::Off;
        if asked {
            self.watch = Watch::On;
        }
        asked
    }

    /// Whether its first report is still to come.
    pub fn is_about_to_report(&self) -> bool {
        self.watch == Watch::Asked
    }

    /// Sends what waits, and reads what is there for [`Agent::next`].
    pub fn handle(&mut self, ready: Ready) {
        if ready.writable
            && let Err(error) = self.control.flush()
        {
            self.lost = Some(error);
        }
        if !ready.readable || self.lost.is_some() {
            return;
        }
        match self.control.fill() {
            Ok(true) => {}
            Ok(false) => self.lost = Some(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => self.lost = Some(error),
        }
    }

    /// The next of what it said.
    pub fn next(&mut self) -> Option<FromForwarder> {
        match self.control.next() {
            Ok(message) => message,
            Err(error) => {
                self.lost = Some(error);
                None
            }
        }
    }

    /// Waits for what there is to wait for; why it is lost, where it is.
    pub fn tend(&mut self, poller: &Poller) -> Option<io::Error> {
        let waiting = self.control.is_waiting();
        if waiting != self.waiting && self.lost.is_none() {
            self.waiting = waiting;
            if let Err(error) = poller.change(&self.control, Token::Control, waiting) {
                self.lost = Some(error);
            }
        }
        self.lost.take()
    }

    /// Hears it no more.
    pub fn close(self, poller: &Poller) {
        poller.remove(&self.control);
    }
}

/// Dials that were not answered yet.
#[derive(Default)]
pub struct Dials {
    waiting: HashMap<u64, DialDone>,
    /// In order. Those that were answered meanwhile are still here.
    deadlines: VecDeque<(Instant, u64)>,
}

impl Dials {
    /// Asks `agent` to connect to `target`.
    pub fn begin(&mut self, agent: Option<&mut Agent>, target: Target, done: DialDone) {
        let refused = |done: DialDone, why: String| done(Err(DialError::Other(why)));
        let Some(agent) = agent else {
            return refused(done, "the machine's agent is not up".to_owned());
        };
        if self.waiting.len() >= MAX_DIALS {
            return refused(done, format!("{MAX_DIALS} others are being connected"));
        }
        let token = match fresh_token() {
            Ok(token) => token,
            Err(error) => return refused(done, format!("there are no random numbers: {error}")),
        };
        if self.waiting.contains_key(&token) {
            return refused(done, "random numbers repeat".to_owned());
        }
        self.waiting.insert(token, done);
        self.deadlines
            .push_back((Instant::now() + DIAL_PATIENCE, token));
        agent.tell(&ToForwarder::Dial { token, target });
    }

    /// Who waits for this answer, if anybody does.
    pub fn take(&mut self, token: u64) -> Option<DialDone> {
        self.waiting.remove(&token)
    }

    /// When the next has waited for too long.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadlines.front().map(|(at, _)| *at)
    }

    /// Gives up those that have waited for too long.
    pub fn expire(&mut self, now: Instant, mut agent: Option<&mut Agent>) {
        while let Some((at, token)) = self.deadlines.front().copied()
            && at <= now
        {
            self.deadlines.pop_front();
            if let Some(done) = self.waiting.remove(&token) {
                if let Some(agent) = &mut agent {
                    agent.tell(&ToForwarder::Drop { token });
                }
                done(Err(DialError::TimedOut));
            }
        }
    }

    /// Gives all of them up, as the agent has gone.
    pub fn fail(&mut self) {
        self.deadlines.clear();
        for (_, done) in self.waiting.drain() {
            done(Err(DialError::Other(
                "the machine's agent has gone".to_owned(),
            )));
        }
    }
}

fn fresh_token() -> io::Result<u64> {
    let mut token = [0; 8];
    rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(token))
}
