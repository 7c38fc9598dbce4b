//! How the host's connection and one in the guest find each other: dialed at once, or held under a
//! token until the host attaches to it.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use agent::protocol::{DialError, FromForwarder, Target};
use rustix::net::{AddressFamily, sockopt};

use super::control::Owner;
use super::dial::{Dialed, Dialing};
use super::greeting::Caller;
use super::listen::Listening;
use super::pair::{self, Pair, Side};
use super::poller::Token;
use super::reactor::{Reactor, State};
use super::resolve::{Answer, Found, Plan, Question};
use super::slots::Index;

/// How long it may take to connect to something in the guest, its name's resolution included.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection is held for the host to attach to it.
const HOLD_TIMEOUT: Duration = Duration::from_secs(30);

/// Connections that are held or dialed for a token, at a time.
pub(super) const MAX_HELD: usize = 1024;

/// What a connection in the guest is for.
pub(super) enum Purpose {
    /// To be joined to this one of the host.
    Join(Caller),
    /// To be held under a token.
    Hold { owner: Owner, token: u64 },
    /// Not one, but a socket that listens.
    Listen { owner: Owner, id: u32 },
}

/// A connection to the guest whose address is not known yet.
pub(super) struct Resolving {
    question: u64,
    purpose: Purpose,
    pub deadline: Instant,
}

/// A connection to the guest on its way.
pub(super) struct Dial {
    attempts: Dialing,
    purpose: Purpose,
    pub deadline: Instant,
}

/// A connection in the guest that waits for the host.
pub(super) struct Held {
    guest: OwnedFd,
    owner: Owner,
    token: u64,
    pub deadline: Instant,
}

impl Purpose {
    fn is_of(&self, by: Owner) -> bool {
        match self {
            Self::Join(_) => false,
            Self::Hold { owner, .. } | Self::Listen { owner, .. } => *owner == by,
        }
    }
}

impl Resolving {
    pub fn is_of(&self, owner: Owner) -> bool {
        self.purpose.is_of(owner)
    }

    pub fn listens_as(&self, by: Owner, number: u32) -> bool {
        matches!(self.purpose, Purpose::Listen { owner, id } if (owner, id) == (by, number))
    }
}

impl Dial {
    pub fn is_of(&self, owner: Owner) -> bool {
        self.purpose.is_of(owner)
    }
}

impl Held {
    pub fn is_of(&self, owner: Owner) -> bool {
        self.owner == owner
    }
}

impl Reactor {
    /// Connects to `target` for the host's connection.
    pub(super) fn join(&mut self, index: Index, caller: Caller, target: Target) -> Option<State> {
        self.begin(index, target, Purpose::Join(caller))
    }

    /// Connects to `target`, to be held under `token`.
    pub(super) fn dial_for(&mut self, owner: Owner, token: u64, target: Target) {
        let refusal = if self.tokens.contains_key(&token) {
            Some("the token is in use".to_owned())
        } else if self.tokens.len() >= MAX_HELD || self.is_full() {
            Some("the guest's agent holds too many connections already".to_owned())
        } else {
            None
        };
        if let Some(reason) = refusal {
            let result = Err(DialError::Other(reason));
            let refused = FromForwarder::Dialed { token, result };
            return self.told.push((owner, refused));
        }
        let index = self.states.reserve();
        self.tokens.insert(token, index);
        match self.begin(index, target, Purpose::Hold { owner, token }) {
            Some(state) => self.states.put(index, state),
            None => self.states.free(index),
        }
    }

    fn begin(&mut self, index: Index, target: Target, purpose: Purpose) -> Option<State> {
        let deadline = Instant::now() + DIAL_TIMEOUT;
        self.poller.look_at(index, deadline);
        match Plan::of(target) {
            Plan::Connect(addresses) => {
                let attempts = Dialing::new(addresses);
                let dial = Dial {
                    attempts,
                    purpose,
                    deadline,
                };
                self.dial(index, Box::new(dial))
            }
            Plan::Ask(question) => self.ask(index, question, purpose, deadline),
            Plan::Impossible(error) => self.failed(purpose, error),
        }
    }

    fn ask(
        &mut self,
        index: Index,
        what: Question,
        purpose: Purpose,
        deadline: Instant,
    ) -> Option<State> {
        let question = self.number();
        match self.resolver.ask(index, question, what, deadline) {
            Ok(()) => Some(State::Resolving(Box::new(Resolving {
                question,
                purpose,
                deadline,
            }))),
            Err(reason) => self.failed(purpose, DialError::Other(reason)),
        }
    }

    /// Has a socket listen at a path of the machine's root.
    pub(super) fn listen_unix(&mut self, owner: Owner, id: u32, path: Vec<u8>) {
        let deadline = Instant::now() + DIAL_TIMEOUT;
        let index = self.states.reserve();
        self.poller.look_at(index, deadline);
        let purpose = Purpose::Listen { owner, id };
        match self.ask(index, Question::Listen(path), purpose, deadline) {
            Some(state) => self.states.put(index, state),
            None => self.states.free(index),
        }
    }

    /// Goes on with the entry that asked `question`, if it still waits.
    pub(super) fn resolved(&mut self, index: Index, question: u64, answer: Answer) {
        let resolving = match self.states.take(index) {
            Some(State::Resolving(resolving)) if resolving.question == question => *resolving,
            Some(State::Carrier(mut carrier)) => {
                carrier.resolved(question, answer);
                return self.states.put(index, State::Carrier(carrier));
            }
            another => {
                if let Some(another) = another {
                    self.states.put(index, another);
                }
                if let Ok(Found::Listener(bound)) = answer {
                    self.resolver.remove(bound.name);
                }
                return;
            }
        };
        match self.go_on(index, resolving, answer) {
            Some(state) => {
                self.states.put(index, state);
                self.states.enqueue(index);
            }
            None => self.states.free(index),
        }
    }

    fn go_on(&mut self, index: Index, resolving: Resolving, answer: Answer) -> Option<State> {
        let Resolving {
            purpose, deadline, ..
        } = resolving;
        match (answer, purpose) {
            (Ok(Found::Addresses(addresses)), purpose) => {
                let attempts = Dialing::new(addresses);
                let dial = Dial {
                    attempts,
                    purpose,
                    deadline,
                };
                self.dial(index, Box::new(dial))
            }
            (Ok(Found::Stream(guest)), purpose) => {
                match self.poller.watch(&guest, Token::Entry(index, Side::Guest)) {
                    Ok(()) => self.connected(index, guest, AddressFamily::UNIX, purpose),
                    Err(error) => self.failed(purpose, DialError::Other(error.to_string())),
                }
            }
            (Ok(Found::Listener(bound)), Purpose::Listen { owner, id }) => {
                self.listening(index, owner, id, bound)
            }
            (Ok(Found::Listener(bound)), _) => {
                self.resolver.remove(bound.name);
                None
            }
            (Err(error), purpose) => self.failed(purpose, error),
        }
    }

    pub(super) fn dial(&mut self, index: Index, mut dial: Box<Dial>) -> Option<State> {
        let token = Token::Entry(index, Side::Guest);
        let poller = &self.poller;
        match dial.attempts.proceed(|socket| poller.watch(socket, token)) {
            Dialed::Waiting => Some(State::Dialing(dial)),
            Dialed::Connected(guest) => {
                self.connected(index, guest, AddressFamily::INET, dial.purpose)
            }
            Dialed::Failed(error) => self.failed(dial.purpose, error),
        }
    }

    fn connected(
        &mut self,
        index: Index,
        guest: OwnedFd,
        family: AddressFamily,
        purpose: Purpose,
    ) -> Option<State> {
        match purpose {
            Purpose::Join(host) => Some(State::Pair(Pair::new(host, guest, family))),
            Purpose::Hold { owner, token } => {
                let result = Ok(());
                let dialed = FromForwarder::Dialed { token, result };
                self.told.push((owner, dialed));
                Some(self.hold(index, guest, owner, token))
            }
            // No question of this purpose is answered with a connection.
            Purpose::Listen { .. } => None,
        }
    }

    /// Tells why; a connection of the host is closed without a word, which is a reset.
    fn failed(&mut self, purpose: Purpose, error: DialError) -> Option<State> {
        let (owner, message) = match purpose {
            Purpose::Join(_) => return None,
            Purpose::Hold { owner, token } => {
                self.tokens.remove(&token);
                let result = Err(error);
                (owner, FromForwarder::Dialed { token, result })
            }
            Purpose::Listen { owner, id } => {
                let result = Err(match error {
                    DialError::Other(reason) => reason,
                    _ => "the guest's filesystem does not answer".to_owned(),
                });
                (owner, FromForwarder::Bound { id, result })
            }
        };
        self.told.push((owner, message));
        None
    }

    fn hold(&mut self, index: Index, guest: OwnedFd, owner: Owner, token: u64) -> State {
        let deadline = Instant::now() + HOLD_TIMEOUT;
        self.poller.look_at(index, deadline);
        State::Held(Held {
            guest,
            owner,
            token,
            deadline,
        })
    }

    /// Holds a connection that began in the guest, and tells the host; resets it where too many are held.
    pub(super) fn offer(&mut self, guest: OwnedFd, listening: &Listening) {
        if self.tokens.len() >= MAX_HELD || self.is_full() {
            return pair::reset(&guest);
        }
        let index = self.states.reserve();
        if let Err(error) = self.poller.watch(&guest, Token::Entry(index, Side::Guest)) {
            eprintln!("mvm-agent: a connection to the host cannot be watched: {error}");
            self.states.free(index);
            return pair::reset(&guest);
        }
        // The host's tokens are random, so a small number is none of them.
        let token = self.number();
        self.tokens.insert(token, index);
        let held = self.hold(index, guest, listening.owner, token);
        self.states.put(index, held);
        let id = listening.id;
        let accepted = FromForwarder::Accepted { id, token };
        self.told.push((listening.owner, accepted));
    }

    /// Joins the host's connection to the one held under `token`; it is dropped where there is none.
    pub(super) fn attach(&mut self, caller: Caller, token: u64) {
        let Some(&index) = self.tokens.get(&token) else {
            return;
        };
        let held = match self.states.take(index) {
            Some(State::Held(held)) => held,
            Some(another) => return self.states.put(index, another),
            None => return,
        };
        self.tokens.remove(&token);
        let renamed = self
            .poller
            .rename(&caller.connection, Token::Entry(index, Side::Host));
        if let Err(error) = renamed {
            eprintln!("mvm-agent: a connection from the host cannot be watched: {error}");
            pair::reset(&held.guest);
            return self.states.free(index);
        }
        // Where that cannot be told, it is as good as the one that takes more care.
        let family = sockopt::socket_domain(&held.guest).unwrap_or(AddressFamily::UNIX);
        let pair = Pair::new(caller, held.guest, family);
        self.states.put(index, State::Pair(pair));
        self.states.enqueue(index);
    }

    /// Resets the connection held under `token`, or gives up dialing it.
    pub(super) fn drop_held(&mut self, token: u64) {
        if let Some(index) = self.tokens.get(&token).copied()
            && let Some(state) = self.states.take(index)
        {
            self.states.free(index);
            self.drop_state(state);
        }
    }

    /// Lets go of an entry whose owner, or whose time, is over.
    pub(super) fn drop_state(&mut self, state: State) {
        let purpose = match state {
            State::Held(held) => {
                self.tokens.remove(&held.token);
                return pair::reset(&held.guest);
            }
            State::Resolving(resolving) => resolving.purpose,
            State::Dialing(dial) => dial.purpose,
            State::Listening(listening) => return self.close(*listening),
            _ => return,
        };
        if let Purpose::Hold { token, .. } = purpose {
            self.tokens.remove(&token);
        }
    }

    /// What was waited for did not come.
    pub(super) fn timed_out(&mut self, state: State) {
        match state {
            State::Resolving(resolving) => self.failed(resolving.purpose, DialError::TimedOut),
            State::Dialing(dial) => self.failed(dial.purpose, DialError::TimedOut),
            state => {
                self.drop_state(state);
                None
            }
        };
    }
}
