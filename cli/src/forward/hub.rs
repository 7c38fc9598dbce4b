//! The forwarder's thread: it owns all listeners and the control connection to the agent, waits for them
//! in one place, and does what is asked of it.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use agent::protocol::{DialError, FromForwarder, Target, ToForwarder};

use super::announce::{Announce, Announcer};
use super::auto::{Auto, AutoPublisher};
use super::dial::{DIAL_PATIENCE, DialDone, Dialed};
use super::error::BindError;
use super::framed::Framed;
use super::poll::{Poller, Ready, Token};
use super::ports::PortSet;
use super::published::{PublishedPorts, host_ports};
use super::spec::Publish;
use super::{Command, Forward, Forwarder, Guest, Kind, Shared, lock};

/// Bytes of messages that may wait for the agent to read them. One that reads nothing is given up.
const CONTROL_BACKLOG: usize = 1 << 20;

/// How often what the guest says about its listeners has an effect at most.
const LISTENERS_PAUSE: Duration = Duration::from_millis(20);

/// Dials under way at once.
const MAX_DIALS: usize = 4096;

/// The agent, while it is connected.
struct Agent {
    guest: Arc<dyn Guest>,
    control: Framed,
    /// Whether room to write is waited for.
    waiting: bool,
    /// Why it is of no use any more.
    lost: Option<io::Error>,
}

impl Agent {
    fn tell(&mut self, message: &ToForwarder) {
        if self.lost.is_none()
            && let Err(error) = self.control.send(message)
        {
            self.lost = Some(error);
        }
    }
}

/// All that the thread owns.
pub struct Hub {
    poller: Poller,
    commands: Receiver<Command>,
    wake: OwnedFd,
    /// The handles to this; whoever makes the hub sets it.
    pub shared: Weak<Shared>,
    pub announcer: Announcer,
    agent: Option<Agent>,
    /// Where the guest answers; none while there is no agent.
    guest_ports: PortSet,
    /// The same, newer, until it is due.
    news: Option<PortSet>,
    news_due: Instant,
    dials: HashMap<u64, DialDone>,
    dial_deadlines: VecDeque<(Instant, u64)>,
    published: PublishedPorts,
    auto: AutoPublisher,
}

impl Hub {
    /// A hub without forwards.
    pub fn new(commands: Receiver<Command>, wake: OwnedFd, announce: Announce) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(&wake, Token::Wake)?;
        Ok(Self {
            poller,
            commands,
            wake,
            shared: Weak::new(),
            announcer: Announcer::new(announce),
            agent: None,
            guest_ports: PortSet::new(),
            news: None,
            news_due: Instant::now(),
            dials: HashMap::new(),
            dial_deadlines: VecDeque::new(),
            published: PublishedPorts::default(),
            auto: AutoPublisher::new(),
        })
    }

    /// Works until it is told to end, or nobody is left who could.
    pub fn run(mut self) {
        loop {
            let ready = match self.poller.wait(self.deadline()) {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!("the port forwarder cannot go on: {error}");
                    return;
                }
            };
            for ready in ready {
                if !self.handle(ready) {
                    return;
                }
            }
            self.expire(Instant::now());
            self.tend_control();
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let news = self.news.is_some().then_some(self.news_due);
        let dials = self.dial_deadlines.front().map(|(at, _)| *at);
        let all = [
            news,
            dials,
            self.published.deadline(),
            self.auto.deadline(),
            self.announcer.deadline(),
        ];
        all.into_iter().flatten().min()
    }

    fn expire(&mut self, now: Instant) {
        if now >= self.news_due && self.news.is_some() {
            self.follow();
        }
        while let Some((at, token)) = self.dial_deadlines.front().copied()
            && at <= now
        {
            self.dial_deadlines.pop_front();
            if let Some(done) = self.dials.remove(&token) {
                self.tell(&ToForwarder::Drop { token });
                done(Err(DialError::TimedOut));
            }
        }
        self.published.expire(now, &self.poller);
        let (published, announcer) = (&mut self.published, &mut self.announcer);
        self.auto.expire(now, published, announcer, &self.poller);
        self.announcer.expire(now);
    }

    /// False when it is time to end.
    fn handle(&mut self, ready: Ready) -> bool {
        match ready.token {
            Token::Wake => return self.obey(),
            Token::Control => self.hear(ready),
            Token::Host(id, which) => {
                let guest = self.agent.as_ref().map(|agent| &agent.guest);
                self.published.accept(id, which, guest, &self.poller);
            }
            Token::Datagrams | Token::Connecting(_) => {}
        }
        true
    }

    fn obey(&mut self) -> bool {
        let mut count = [0; 8];
        // It only counts; what is to be done is in the channel.
        let _ = rustix::io::read(&self.wake, &mut count);
        loop {
            match self.commands.try_recv() {
                Ok(Command::End) | Err(TryRecvError::Disconnected) => return false,
                Ok(command) => self.carry_out(command),
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Attach(guest, control) => self.attach(guest, control),
            Command::Detach => self.detach(),
            Command::Publish(publish, reply) => drop(reply.send(self.publish(&publish))),
            Command::Remove(publish, reply) => drop(reply.send(self.remove(&publish))),
            Command::SetAuto(auto) => self.set_auto(auto),
            Command::List(reply) => drop(reply.send(self.published.list().collect())),
            Command::Dial { target, done } => self.dial(target, done),
            Command::Tell(message) => self.tell(&message),
            Command::End => {}
        }
    }

    fn tell(&mut self, message: &ToForwarder) {
        if let Some(agent) = &mut self.agent {
            agent.tell(message);
        }
    }

    fn attach(&mut self, guest: Arc<dyn Guest>, control: UnixStream) {
        self.drop_agent();
        let control = Framed::new(control, CONTROL_BACKLOG).and_then(|control| {
            self.poller.add(&control, Token::Control)?;
            Ok(control)
        });
        match control {
            Ok(control) => {
                self.agent = Some(Agent {
                    guest,
                    control,
                    waiting: false,
                    lost: None,
                });
                self.tell(&ToForwarder::Watch(true));
                self.follow();
            }
            Err(error) => tracing::error!("the agent cannot be heard: {error}"),
        }
    }

    fn detach(&mut self) {
        self.drop_agent();
        self.follow();
    }

    /// Forgets the agent and all that hung on it.
    fn drop_agent(&mut self) {
        if let Some(agent) = self.agent.take() {
            self.poller.remove(&agent.control);
        }
        self.news = Some(PortSet::new());
        self.dial_deadlines.clear();
        for (_, done) in self.dials.drain() {
            done(Err(DialError::Other(
                "the machine's agent has gone".to_owned(),
            )));
        }
    }

    /// Sends what waits, and gives up an agent that is of no use any more.
    fn tend_control(&mut self) {
        let Some(agent) = &mut self.agent else {
            return;
        };
        let waiting = agent.control.is_waiting();
        if waiting != agent.waiting && agent.lost.is_none() {
            agent.waiting = waiting;
            if let Err(error) = self.poller.change(&agent.control, Token::Control, waiting) {
                agent.lost = Some(error);
            }
        }
        let Some(error) = agent.lost.take() else {
            return;
        };
        match error.kind() {
            io::ErrorKind::UnexpectedEof => tracing::debug!("the agent ended its connection"),
            _ => tracing::warn!("ports are not forwarded any more: the guest's agent: {error}"),
        }
        if let Some(shared) = self.shared.upgrade() {
            let mut current = lock(&shared.guest);
            // An attach that is on its way has another one.
            if current
                .as_ref()
                .is_some_and(|guest| Arc::ptr_eq(guest, &agent.guest))
            {
                *current = None;
            }
        }
        self.detach();
    }

    /// Reads what the agent has to say.
    fn hear(&mut self, ready: Ready) {
        let Some(agent) = &mut self.agent else {
            return;
        };
        if ready.writable
            && let Err(error) = agent.control.flush()
        {
            agent.lost = Some(error);
        }
        if !ready.readable || agent.lost.is_some() {
            return;
        }
        match agent.control.fill() {
            Ok(true) => {}
            Ok(false) => agent.lost = Some(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => agent.lost = Some(error),
        }
        while let Some(agent) = &mut self.agent {
            match agent.control.next() {
                Ok(Some(message)) => self.answer(message),
                Ok(None) => return,
                Err(error) => {
                    agent.lost = Some(error);
                    return;
                }
            }
        }
    }

    fn answer(&mut self, message: FromForwarder) {
        match message {
            FromForwarder::Listeners(listeners) => {
                self.news = Some(PortSet::reachable(&listeners));
                if Instant::now() >= self.news_due {
                    self.follow();
                }
            }
            FromForwarder::Dialed { token, result } => self.dialed(token, result),
            FromForwarder::Bound { .. } => {}
            FromForwarder::Accepted { token, .. } => self.tell(&ToForwarder::Drop { token }),
        }
    }

    /// Does what the guest's listeners ask for.
    fn follow(&mut self) {
        if let Some(news) = self.news.take() {
            self.guest_ports = news;
            self.news_due = Instant::now() + LISTENERS_PAUSE;
        }
        let (published, announcer) = (&mut self.published, &mut self.announcer);
        self.auto
            .follow(&self.guest_ports, published, announcer, &self.poller);
        let ports = self.agent.is_some().then_some(&self.guest_ports);
        self.published.follow(ports, &self.poller);
    }

    /// Publishes all that is asked for, or nothing.
    pub fn publish(&mut self, publish: &Publish) -> Result<Vec<Forward>, BindError> {
        // What was published by itself makes way, and may come back elsewhere.
        let (rules, taken) = (publish.rules(), host_ports(publish));
        self.published.remove(&self.poller, |one| {
            let guest = &one.rule().guest;
            one.is_auto()
                && (taken.contains(&one.port()) || rules.iter().any(|rule| rule.guest == *guest))
        });
        let bound: Result<Vec<_>, _> = rules
            .into_iter()
            .map(|rule| PublishedPorts::bind(Kind::Published, rule))
            .collect();
        let inserted = bound.and_then(|bound| {
            let insert = |one| {
                let inserted = self.published.insert(one, &self.poller);
                inserted.map_err(BindError::broken)
            };
            bound.into_iter().map(insert).collect()
        });
        self.follow();
        inserted
    }

    fn remove(&mut self, publish: &Publish) -> Vec<Forward> {
        let removed = self.published.remove_meant(publish, &self.poller);
        for one in &removed {
            if let (true, Some(port)) = (one.is_auto(), one.guest_port()) {
                self.auto.exclude(port);
            }
        }
        self.follow();
        removed.iter().map(Forward::from).collect()
    }

    /// Publishes by itself from now on, or no more.
    pub fn set_auto(&mut self, auto: Option<Auto>) {
        self.auto.set(auto);
        self.follow();
    }

    fn dial(&mut self, target: Target, done: DialDone) {
        if self.agent.is_none() {
            return done(Err(DialError::Other(
                "the machine's agent is not up".to_owned(),
            )));
        }
        if self.dials.len() >= MAX_DIALS {
            return done(Err(DialError::Other(format!(
                "{MAX_DIALS} dials are under way"
            ))));
        }
        let token = match fresh_token() {
            Ok(token) if !self.dials.contains_key(&token) => token,
            Ok(_) => return done(Err(DialError::Other("random numbers repeat".to_owned()))),
            Err(error) => return done(Err(DialError::Other(error.to_string()))),
        };
        self.dials.insert(token, done);
        self.dial_deadlines
            .push_back((Instant::now() + DIAL_PATIENCE, token));
        self.tell(&ToForwarder::Dial { token, target });
    }

    fn dialed(&mut self, token: u64, result: Result<(), DialError>) {
        let Some(done) = self.dials.remove(&token) else {
            // Given up already; what is held for it is not needed.
            return self.tell(&ToForwarder::Drop { token });
        };
        // Without handles nobody is left to use it.
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        done(result.map(|()| Dialed::new(token, Forwarder { shared })));
    }
}

fn fresh_token() -> io::Result<u64> {
    let mut token = [0; 8];
    rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(token))
}
