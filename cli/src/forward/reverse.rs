//! What the guest may reach of the host: listeners in the guest, and what becomes of a connection there.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent::names::is_localhost;
use agent::protocol::{Bind, Open, ToForwarder};

use super::announce::{Announcement, Announcer};
use super::connect::{Attempt, Connects, Outcome, Purpose};
use super::control::Agent;
use super::poll::Poller;
use super::spec::{HostTarget, Protocol, Reverse};
use super::{Forward, ForwardError, Kind, Reply, frame};

/// How long the agent may take to say whether it listens.
const PATIENCE: Duration = Duration::from_secs(10);

/// SSH agents that are remembered, the last offered first.
const MAX_OFFERS: usize = 16;

/// What is asked for in the guest, and where it leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// To what was listed.
    Listed(Reverse),
    /// From a Unix socket at this path of the guest to the SSH agent that was offered last and answers.
    SshAgent(PathBuf),
}

impl Wish {
    fn at(&self) -> Bind {
        match self {
            Self::Listed(reverse) => reverse.at(),
            Self::SshAgent(path) => Bind::Unix(path.as_os_str().as_encoded_bytes().to_vec()),
        }
    }
}

/// Whether the guest listens.
#[derive(Debug)]
enum State {
    /// There is no agent.
    Unasked,
    /// The agent has until then to answer.
    Asked(Instant),
    Bound,
    Failed,
}

#[derive(Debug)]
struct Entry {
    wish: Wish,
    state: State,
    /// Who waits for the first answer.
    reply: Option<Reply<Result<Forward, ForwardError>>>,
    connections: u64,
    /// Whether it was said that its target cannot be reached, since it last was.
    warned: bool,
}

impl Entry {
    fn forward(&self) -> Forward {
        let (kind, host) = match &self.wish {
            Wish::Listed(reverse) => (Kind::Reverse, reverse.target().to_string()),
            Wish::SshAgent(_) => (Kind::SshAgent, "SSH_AUTH_SOCK".to_owned()),
        };
        Forward {
            kind,
            protocol: Protocol::Tcp,
            host,
            guest: Shown(&self.wish.at()).to_string(),
            answers: Some(matches!(self.state, State::Bound)),
            connections: self.connections,
        }
    }
}

impl Entry {
    fn unreachable(&self, error: &io::Error) -> String {
        let at = Shown(&self.wish.at()).to_string();
        match &self.wish {
            Wish::Listed(reverse) => {
                let target = reverse.target();
                format!(
                    "a program of the guest connected to {at}, and {target} cannot be reached: {error}"
                )
            }
            Wish::SshAgent(_) => format!(
                "a program of the guest connected to {at}, and no SSH agent answers: {error}"
            ),
        }
    }
}

/// All that the guest may reach.
#[derive(Debug, Default)]
pub struct Reverses {
    all: BTreeMap<u32, Entry>,
    next: u32,
    /// SSH agents, the last offered first.
    offers: VecDeque<PathBuf>,
    /// Who waits until the agent has answered for all.
    waiting: Vec<Reply<()>>,
}

impl Reverses {
    /// Adds one; `reply` hears whether the guest listens, or at once where there is no agent.
    pub fn add(
        &mut self,
        wish: Wish,
        reply: Option<Reply<Result<Forward, ForwardError>>>,
        agent: Option<&mut Agent>,
    ) {
        let at = wish.at();
        if self.all.values().any(|entry| entry.wish.at() == at) {
            let exists = ForwardError::Exists(Shown(&at).to_string());
            return answer(reply, Err(exists));
        }
        while self.all.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        let mut entry = Entry {
            wish,
            state: State::Unasked,
            reply: None,
            connections: 0,
            warned: false,
        };
        match agent {
            Some(agent) => {
                entry.reply = reply;
                ask(id, &mut entry, agent);
            }
            None => answer(reply, Ok(entry.forward())),
        }
        self.all.insert(id, entry);
    }

    /// Takes one away; connections that run go on.
    pub fn remove(&mut self, reverse: &Reverse, agent: Option<&mut Agent>) -> Option<Forward> {
        let meant = |entry: &Entry| matches!(&entry.wish, Wish::Listed(own) if own == reverse);
        let id = *self.all.iter().find(|(_, entry)| meant(entry))?.0;
        let entry = self.all.remove(&id)?;
        if let Some(agent) = agent {
            agent.tell(&ToForwarder::Unlisten { id });
        }
        Some(entry.forward())
    }

    /// An agent is there: it is to listen for all of them.
    pub fn attach(&mut self, agent: &mut Agent) {
        for (id, entry) in &mut self.all {
            ask(*id, entry, agent);
        }
    }

    /// The agent has gone, and with it all listeners.
    pub fn detach(&mut self) {
        for entry in self.all.values_mut() {
            entry.state = State::Unasked;
            let forward = entry.forward();
            answer(entry.reply.take(), Ok(forward));
        }
    }

    /// The agent says whether it listens.
    pub fn bound(&mut self, id: u32, result: Result<u16, String>, announcer: &mut Announcer) {
        let Some(entry) = self.all.get_mut(&id) else {
            return;
        };
        if !matches!(entry.state, State::Asked(_)) {
            return;
        }
        match result {
            Ok(_) => {
                entry.state = State::Bound;
                let forward = entry.forward();
                answer(entry.reply.take(), Ok(forward));
            }
            Err(reason) => self.failed(id, reason, announcer),
        }
    }

    /// One that was just asked for goes; one that was there stays, for the next agent.
    fn failed(&mut self, id: u32, reason: String, announcer: &mut Announcer) {
        let Some(entry) = self.all.get_mut(&id) else {
            return;
        };
        entry.state = State::Failed;
        let error = ForwardError::Guest {
            at: Shown(&entry.wish.at()).to_string(),
            reason: printable(&reason),
        };
        match entry.reply.take() {
            Some(reply) => {
                self.all.remove(&id);
                answer(Some(reply), Err(error));
            }
            None => announcer.say(Announcement::Warning(error.to_string())),
        }
    }

    /// Somebody in the guest connected: what it wanted to reach is connected to, where it is listed.
    pub fn accepted(
        &mut self,
        purpose: Purpose,
        connects: &mut Connects,
        poller: &Poller,
    ) -> Option<Outcome> {
        let Some(entry) = self.all.get_mut(&purpose.forward) else {
            return Some(Outcome::failed(purpose, io::ErrorKind::NotFound));
        };
        entry.connections = entry.connections.saturating_add(1);
        let attempts = match &entry.wish {
            Wish::SshAgent(_) if self.offers.is_empty() => {
                let none = io::Error::new(io::ErrorKind::NotFound, "SSH_AUTH_SOCK was not set");
                return Some(Outcome::failed(purpose, none));
            }
            Wish::SshAgent(_) => self.offers.iter().cloned().map(Attempt::Unix).collect(),
            Wish::Listed(reverse) => match reverse.target() {
                HostTarget::Unix(path) => vec![Attempt::Unix(path.clone())],
                HostTarget::Host { host, port } => match addresses(host, *port) {
                    Some(attempts) => attempts,
                    None => return connects.look_up(purpose, host, *port),
                },
            },
        };
        connects.begin(purpose, attempts, poller)
    }

    /// Makes what was connected one with the connection in the guest, or resets that where there is nothing.
    pub fn conclude(
        &mut self,
        outcome: Outcome,
        agent: Option<&mut Agent>,
        announcer: &mut Announcer,
    ) {
        let Purpose { forward, token } = outcome.purpose;
        let Some(agent) = agent else {
            return;
        };
        let error = match outcome.result {
            Ok(stream) => {
                if let Some(entry) = self.all.get_mut(&forward) {
                    entry.warned = false;
                }
                if let Err(error) = join(agent, token, stream) {
                    tracing::debug!("a connection of the guest does not reach its target: {error}");
                }
                return;
            }
            Err(error) => error,
        };
        agent.tell(&ToForwarder::Drop { token });
        // The guest can connect as often as it likes.
        if let Some(entry) = self.all.get_mut(&forward)
            && !std::mem::replace(&mut entry.warned, true)
        {
            announcer.say(Announcement::Warning(entry.unreachable(&error)));
        }
    }

    /// Tells `reply` once the agent has answered for all that it was asked for, or has taken too long.
    pub fn await_answers(&mut self, reply: Reply<()>) {
        self.waiting.push(reply);
    }

    /// Tells those who wait, where there is nothing to wait for any more.
    pub fn tell_settled(&mut self) {
        let is_asked = |entry: &Entry| matches!(entry.state, State::Asked(_));
        // Nobody does, most often, and this is asked after each event.
        if !self.waiting.is_empty() && !self.all.values().any(is_asked) {
            for reply in self.waiting.drain(..) {
                answer(Some(reply), ());
            }
        }
    }

    /// Prefers this SSH agent from now on.
    pub fn offer(&mut self, path: PathBuf) {
        self.offers.retain(|known| *known != path);
        self.offers.push_front(path);
        self.offers.truncate(MAX_OFFERS);
    }

    /// When the agent has taken too long for one.
    pub fn deadline(&self) -> Option<Instant> {
        let due = self.all.values().filter_map(|entry| match entry.state {
            State::Asked(due) => Some(due),
            _ => None,
        });
        due.min()
    }

    /// Gives up what the agent has taken too long for.
    pub fn expire(&mut self, now: Instant, agent: Option<&mut Agent>, announcer: &mut Announcer) {
        let late = |entry: &Entry| matches!(entry.state, State::Asked(due) if due <= now);
        let ids: Vec<_> = self
            .all
            .iter()
            .filter(|(_, entry)| late(entry))
            .map(|(id, _)| *id)
            .collect();
        for id in &ids {
            self.failed(*id, "its agent does not answer".to_owned(), announcer);
        }
        if let Some(agent) = agent {
            for id in ids {
                agent.tell(&ToForwarder::Unlisten { id });
            }
        }
    }

    /// All of them, for listing.
    pub fn list(&self) -> impl Iterator<Item = Forward> {
        self.all.values().map(Entry::forward)
    }
}

fn join(agent: &Agent, token: u64, stream: OwnedFd) -> io::Result<()> {
    agent.guest().join(frame(&Open::Attach { token })?, stream)
}

fn ask(id: u32, entry: &mut Entry, agent: &mut Agent) {
    entry.state = State::Asked(Instant::now() + PATIENCE);
    let at = entry.wish.at();
    agent.tell(&ToForwarder::Listen { id, at });
}

fn answer<T>(reply: Option<Reply<T>>, result: T) {
    if let Some(reply) = reply {
        // Whoever asked may have gone.
        let _ = reply.send(result);
    }
}

/// What can be connected to without looking a name up.
fn addresses(host: &str, port: u16) -> Option<Vec<Attempt>> {
    let to = |ip: IpAddr| Attempt::Tcp(SocketAddr::new(ip, port));
    if is_localhost(host) {
        let both = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        return Some(both.map(to).to_vec());
    }
    Some(vec![to(host.parse().ok()?)])
}

/// The guest's words, as far as they do nothing to a terminal.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(256).collect()
}

/// Where the guest listens, as it is typed.
struct Shown<'a>(&'a Bind);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Bind::Tcp {
                address: Some(address),
                port,
            } => write!(f, "{}", SocketAddr::new(*address, *port)),
            Bind::Tcp {
                address: None,
                port,
            } => write!(f, "localhost:{port}"),
            Bind::Unix(path) => write!(f, "{}", String::from_utf8_lossy(path)),
        }
    }
}
