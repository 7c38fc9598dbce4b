//! The forwarder's thread: it owns all listeners and the control connection to the agent, waits for them
//! in one place, and does what is asked of it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use agent::protocol::{DialError, FromForwarder, Listener, ToForwarder};

use super::announce::{Announce, Announcer};
use super::auto::{Auto, AutoPublisher};
use super::connect::{Connects, LookUp, Outcome, Purpose};
use super::control::{Agent, Dials};
use super::datagrams::Datagrams;
use super::dial::Dialed;
use super::error::BindError;
use super::poll::{Poller, Ready, Token};
use super::ports::PortSet;
use super::published::{Published, PublishedPorts, host_ports};
use super::reverse::{Reverses, Wish};
use super::spec::{Publish, Rule};
use super::{Command, Forward, ForwardError, Forwarder, Guest, Kind, Reply, Shared, lock};

/// How often what the guest says about its listeners has an effect at most.
const LISTENERS_PAUSE: Duration = Duration::from_millis(20);

/// How long an answer to whoever publishes a port waits for the guest's listeners, where they were not known:
/// once it is given, the port does what it will do.
const REPORT_PATIENCE: Duration = Duration::from_secs(1);

/// Where the answer goes that ports are published.
type PublishReply = Reply<Result<Vec<Forward>, BindError>>;

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
    /// Answers that wait for the agent's first report, and until when.
    late: Vec<(Instant, PublishReply, Vec<Forward>)>,
    dials: Dials,
    published: PublishedPorts,
    auto: AutoPublisher,
    reverses: Reverses,
    connects: Connects,
    datagrams: Datagrams,
}

impl Hub {
    /// A hub without forwards.
    pub fn new(
        commands: Receiver<Command>,
        wake: OwnedFd,
        announce: Announce,
        look_up: LookUp,
    ) -> io::Result<Self> {
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
            late: Vec::new(),
            dials: Dials::default(),
            published: PublishedPorts::default(),
            auto: AutoPublisher::new(),
            reverses: Reverses::default(),
            connects: Connects::new(look_up),
            datagrams: Datagrams::new(),
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
            // First what this process asks for: what the guest does may have come of it.
            if ready.iter().any(|ready| ready.token == Token::Wake) {
                // It only counts, and is to be empty before the channel is.
                let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            }
            if !self.obey() {
                return;
            }
            for ready in ready {
                self.handle(ready);
            }
            self.expire(Instant::now());
            self.datagrams.tend(&self.poller);
            self.tend_agent();
            self.reverses.tell_settled();
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let news = self.news.is_some().then_some(self.news_due);
        let all = [
            news,
            self.late.first().map(|(due, ..)| *due),
            self.dials.deadline(),
            self.published.deadline(),
            self.auto.deadline(),
            self.reverses.deadline(),
            self.connects.deadline(),
            self.datagrams.deadline(),
            self.announcer.deadline(),
        ];
        all.into_iter().flatten().min()
    }

    fn expire(&mut self, now: Instant) {
        if now >= self.news_due && self.news.is_some() {
            self.follow();
        }
        if self.late.first().is_some_and(|(due, ..)| *due <= now) {
            self.answer_late();
        }
        self.dials.expire(now, self.agent.as_mut());
        self.published.expire(now, &self.poller);
        let (published, announcer) = (&mut self.published, &mut self.announcer);
        self.auto.expire(now, published, announcer, &self.poller);
        self.reverses.expire(now, self.agent.as_mut(), announcer);
        for outcome in self.connects.expire(now, &self.poller) {
            self.conclude(Some(outcome));
        }
        self.datagrams.expire(now);
        self.announcer.expire(now);
    }

    fn handle(&mut self, ready: Ready) {
        match ready.token {
            Token::Wake => {}
            Token::Control => self.hear(ready),
            Token::Datagrams => self.datagrams.handle(ready, &self.published, &self.poller),
            Token::Host(id, which) => self.take(id, which),
            Token::Connecting(id) => {
                let outcome = self.connects.ready(id, &self.poller);
                self.conclude(outcome);
            }
        }
    }

    /// Takes what waits at a socket of the host.
    fn take(&mut self, id: u32, which: u8) {
        let guest = self.agent.as_ref().map(Agent::guest);
        let datagrams = self
            .published
            .get(id)
            .is_some_and(|published| published.is_udp());
        match datagrams {
            true => {
                let published = &mut self.published;
                self.datagrams
                    .take((id, which), published, guest, &self.poller);
            }
            false => self.published.accept(id, which, guest, &self.poller),
        }
    }

    /// Carries out all that is asked for; false when it is time to end.
    fn obey(&mut self) -> bool {
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
            Command::Publish(publish, reply) => {
                let published = self.publish(&publish);
                let unknown = self.agent.as_ref().is_some_and(Agent::is_about_to_report);
                match published {
                    Ok(forwards) if unknown => {
                        let due = Instant::now() + REPORT_PATIENCE;
                        self.late.push((due, reply, forwards));
                    }
                    result => drop(reply.send(result)),
                }
            }
            Command::Remove(publish, reply) => drop(reply.send(self.remove(&publish))),
            Command::SetAuto(auto) => self.set_auto(auto),
            Command::Reverse(wish, reply) => self.reverse(wish, Some(reply)),
            Command::RemoveReverse(reverse, reply) => {
                let removed = self.reverses.remove(&reverse, self.agent.as_mut());
                drop(reply.send(removed));
            }
            Command::AwaitReverses(reply) => self.reverses.await_answers(reply),
            Command::OfferSshAgent(path) => self.reverses.offer(path),
            Command::LookedUp(id, found) => {
                let outcome = self.connects.looked_up(id, found, &self.poller);
                self.conclude(outcome);
            }
            Command::List(reply) => {
                let all = self.published.list().chain(self.reverses.list());
                drop(reply.send(all.collect()));
            }
            Command::Dial { target, done } => self.dials.begin(self.agent.as_mut(), target, done),
            Command::Tell(message) => {
                if let Some(agent) = &mut self.agent {
                    agent.tell(&message);
                }
            }
            Command::End => {}
        }
    }

    fn attach(&mut self, guest: Arc<dyn Guest>, control: UnixStream) {
        self.drop_agent();
        match Agent::new(guest, control, &self.poller) {
            Ok(mut agent) => {
                self.reverses.attach(&mut agent);
                self.agent = Some(agent);
                self.follow();
            }
            Err(error) => tracing::error!("ports are not forwarded: {error}"),
        }
    }

    fn detach(&mut self) {
        self.drop_agent();
        self.follow();
    }

    /// Forgets the agent and all that hung on it.
    fn drop_agent(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.close(&self.poller);
        }
        self.news = Some(PortSet::new());
        self.answer_late();
        self.dials.fail();
        self.reverses.detach();
        self.connects.fail(&self.poller);
        self.datagrams.close(&self.poller);
    }

    /// Sends what waits, and gives up an agent that is of no use any more.
    fn tend_agent(&mut self) {
        let Some(agent) = &mut self.agent else {
            return;
        };
        let Some(error) = agent.tend(&self.poller) else {
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
                .is_some_and(|guest| Arc::ptr_eq(guest, agent.guest()))
            {
                *current = None;
            }
        }
        self.detach();
    }

    /// Does what the agent has to say.
    fn hear(&mut self, ready: Ready) {
        if let Some(agent) = &mut self.agent {
            agent.handle(ready);
        }
        while let Some(message) = self.agent.as_mut().and_then(Agent::next) {
            self.answer(message);
        }
    }

    fn answer(&mut self, message: FromForwarder) {
        match message {
            FromForwarder::Listeners(listeners) => self.reported(&listeners),
            FromForwarder::Dialed { token, result } => self.dialed(token, result),
            FromForwarder::Bound { id, result } => {
                self.reverses.bound(id, result, &mut self.announcer);
            }
            FromForwarder::Accepted { id, token } => {
                let purpose = Purpose { forward: id, token };
                let (connects, poller) = (&mut self.connects, &self.poller);
                let outcome = self.reverses.accepted(purpose, connects, poller);
                self.conclude(outcome);
            }
        }
    }

    /// Takes what listens in the guest, and does what that asks for unless it did so just now.
    fn reported(&mut self, listeners: &[Listener]) {
        let Some(agent) = &mut self.agent else {
            return;
        };
        let first = agent.is_about_to_report();
        if !agent.reported() {
            return;
        }
        self.news = Some(PortSet::reachable(listeners));
        if first || Instant::now() >= self.news_due {
            self.follow();
        }
        self.answer_late();
    }

    fn answer_late(&mut self) {
        for (_, reply, forwards) in self.late.drain(..) {
            // Whoever asked may have gone.
            let _ = reply.send(Ok(forwards));
        }
    }

    /// Does what is to be done about a connection of the guest, where that is known by now.
    fn conclude(&mut self, outcome: Option<Outcome>) {
        if let Some(outcome) = outcome {
            let announcer = &mut self.announcer;
            self.reverses
                .conclude(outcome, self.agent.as_mut(), announcer);
        }
    }

    /// Does what the guest's listeners ask for.
    fn follow(&mut self) {
        if let Some(news) = self.news.take() {
            self.guest_ports = news;
            self.news_due = Instant::now() + LISTENERS_PAUSE;
        }
        let of_ports = |one: &Published| one.guest_port().is_some();
        let needed = self.auto.is_on() || self.published.iter().any(of_ports);
        if let Some(agent) = &mut self.agent {
            agent.watch(needed);
        }
        if !needed {
            // Nobody says when they go.
            self.guest_ports = PortSet::new();
        }
        let published = &mut self.published;
        let news = self.auto.follow(&self.guest_ports, published, &self.poller);
        let ports = self.agent.is_some().then_some(&self.guest_ports);
        published.follow(ports, &self.poller);
        for announcement in news {
            self.announcer.say(announcement);
        }
    }

    /// Publishes all that is asked for, or nothing.
    pub fn publish(&mut self, publish: &Publish) -> Result<Vec<Forward>, BindError> {
        // What was published by itself makes way, and may come back elsewhere.
        let (rules, taken) = (publish.rules(), host_ports(publish));
        self.published.remove(&self.poller, |one| {
            let same = |rule: &Rule| {
                rule.guest == one.rule().guest && rule.protocol == one.rule().protocol
            };
            one.is_auto() && (taken.contains(&one.port()) || rules.iter().any(same))
        });
        let bound: Result<Vec<_>, _> = rules
            .into_iter()
            .map(|rule| PublishedPorts::bind(Kind::Published, rule))
            .collect();
        let inserted = bound.and_then(|bound| {
            let inserted = self.published.insert_all(bound, &self.poller);
            inserted.map_err(BindError::broken)
        });
        self.follow();
        inserted
    }

    fn remove(&mut self, publish: &Publish) -> Vec<Forward> {
        let guest = self.agent.as_ref().map(Agent::guest);
        let removed = self.published.remove_meant(publish, guest, &self.poller);
        for one in &removed {
            if let (true, Some(port)) = (one.is_auto(), one.guest_port()) {
                self.auto.exclude(port);
            }
        }
        self.datagrams.forget(&self.published);
        self.follow();
        removed.iter().map(Forward::from).collect()
    }

    /// Publishes by itself from now on, or no more.
    pub fn set_auto(&mut self, auto: Option<Auto>) {
        self.auto.set(auto);
        self.follow();
    }

    /// Lets the guest reach something of the host, when there is an agent.
    pub fn declare(&mut self, wish: Wish) -> Result<Forward, ForwardError> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.reverse(wish, Some(reply));
        answer.try_recv().map_err(|_| ForwardError::Ended)?
    }

    /// Lets the guest reach something of the host.
    fn reverse(&mut self, wish: Wish, reply: Option<Reply<Result<Forward, ForwardError>>>) {
        self.reverses.add(wish, reply, self.agent.as_mut());
    }

    fn dialed(&mut self, token: u64, result: Result<(), DialError>) {
        let Some(done) = self.dials.take(token) else {
            // Given up already; what is held for it is not needed.
            if let Some(agent) = &mut self.agent {
                agent.tell(&ToForwarder::Drop { token });
            }
            return;
        };
        // Without handles nobody is left to use it.
        if let Some(shared) = self.shared.upgrade() {
            done(result.map(|()| Dialed::new(token, Forwarder { shared })));
        }
    }
}
