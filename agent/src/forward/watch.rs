//! The guest's listening sockets, reported to the host as they come and go.
//!
//! The kernel is asked for all of them whenever something happened: it tells so by a tracepoint; where
//! there is none, it is asked some times a second, the more seldom the longer nothing happens, and tells of sockets that went away in between. All
//! of that is only while somebody watches.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use agent::protocol::{FromForwarder, Listener};

use super::control::Owner;
use super::pair::Side;
use super::poller::Token;
use super::reactor::{Reactor, State};
use super::slots::Index;
use super::sock_diag::{self, Source};
use super::tracepoint::Tracepoint;

/// How often is looked where no event tells when to, after something happened.
const INTERVAL: Duration = Duration::from_millis(50);

/// How seldom it may become while nothing does.
const CALM: Duration = Duration::from_millis(400);

/// The least time between two looks, so that a guest whose sockets come and go for ever is no burden.
const PAUSE: Duration = Duration::from_millis(10);

/// The most that is reported; a guest with more than that does not want them forwarded.
const MAX_LISTENERS: usize = 16_384;

/// Watches the guest's listening sockets.
#[derive(Debug)]
pub struct Watch {
    source: Source,
    trigger: Trigger,
    /// What those who watch were told.
    told: Vec<Listener>,
    /// When it was looked.
    looked: Instant,
    /// How long until the next look by the clock.
    interval: Duration,
    /// When to look again, whatever happens.
    pub next: Option<Instant>,
}

/// What tells that it is time to look.
#[derive(Debug)]
enum Trigger {
    Tracepoint(Tracepoint),
    Timer(Option<OwnedFd>),
}

impl Reactor {
    /// Reports listening sockets to `owner` from now on, or not any more.
    pub(super) fn watch(&mut self, owner: Owner, on: bool) {
        if !on {
            self.watchers.retain(|watcher| *watcher != owner);
            if self.watchers.is_empty()
                && let Some(index) = self.watch.take()
            {
                self.remove(index);
            }
        } else if !self.watchers.contains(&owner) {
            self.watchers.push(owner);
            let index = match self.watch {
                Some(index) => index,
                None => self.start_watch(),
            };
            self.look();
            if let Some(State::Watch(watch)) = self.states.get_mut(index) {
                let listeners = FromForwarder::Listeners(watch.told.clone());
                self.told.push((owner, listeners));
            }
        }
        self.handle.set_watched(!self.watchers.is_empty());
    }

    fn start_watch(&mut self) -> Index {
        let index = self.states.reserve();
        let trigger = self.trigger(index);
        self.states.put(
            index,
            State::Watch(Box::new(Watch {
                source: Source::new(),
                trigger,
                told: Vec::new(),
                looked: Instant::now(),
                interval: INTERVAL,
                next: None,
            })),
        );
        self.watch = Some(index);
        index
    }

    fn trigger(&mut self, index: Index) -> Trigger {
        let token = Token::Entry(index, Side::Guest);
        let name = format!("mvm-agent-{}-{}", std::process::id(), self.number());
        if let Ok(tracepoint) = Tracepoint::new(name)
            && let Some(pipe) = tracepoint.pipe()
            && self.poller.watch(pipe, token).is_ok()
        {
            return Trigger::Tracepoint(tracepoint);
        }
        let destroyed = sock_diag::destroyed().ok();
        let watched = |socket: &OwnedFd| self.poller.watch(socket, token).is_ok();
        Trigger::Timer(destroyed.filter(watched))
    }

    /// Looks, where it is time to.
    pub(super) fn turn_watch(&mut self, index: Index, mut watch: Box<Watch>) -> State {
        let now = Instant::now();
        let is_due = watch.next.is_some_and(|next| next <= now);
        let is_triggered = match &watch.trigger {
            Trigger::Tracepoint(tracepoint) => {
                tracepoint.drain();
                true
            }
            Trigger::Timer(None) => false,
            Trigger::Timer(Some(destroyed)) => sock_diag::listener_destroyed(destroyed),
        };
        if is_due || is_triggered {
            let earliest = watch.looked + PAUSE;
            if now < earliest {
                watch.next = Some(earliest);
                self.poller.look_at(index, earliest);
            } else {
                self.look_now(index, &mut watch, now);
            }
        }
        State::Watch(watch)
    }

    /// Looks at once; those who watch are told of a change.
    pub(super) fn look(&mut self) {
        if let Some(index) = self.watch
            && let Some(State::Watch(mut watch)) = self.states.take(index)
        {
            watch.interval = INTERVAL;
            self.look_now(index, &mut watch, Instant::now());
            self.states.put(index, State::Watch(watch));
        }
    }

    fn look_now(&mut self, index: Index, watch: &mut Watch, now: Instant) {
        watch.looked = now;
        watch.next = match watch.trigger {
            Trigger::Tracepoint(_) => None,
            Trigger::Timer(_) => Some(now + watch.interval),
        };
        watch.interval = CALM.min(watch.interval * 2);
        if let Some(next) = watch.next {
            self.poller.look_at(index, next);
        }
        match list(&watch.source, &self.own_listeners) {
            Ok(listeners) if listeners == watch.told => {}
            Ok(listeners) => {
                watch.told = listeners;
                watch.interval = INTERVAL;
                for owner in &self.watchers {
                    let listeners = FromForwarder::Listeners(watch.told.clone());
                    self.told.push((*owner, listeners));
                }
            }
            // The next look may succeed; what was told last stays.
            Err(error) => {
                eprintln!("mvm-agent: the guest's listening sockets cannot be listed: {error}");
            }
        }
    }
}

/// All listening sockets but the agent's own, each once, in order.
fn list(source: &Source, own: &HashSet<u64>) -> std::io::Result<Vec<Listener>> {
    let entries = source.list()?.into_iter();
    let mut listeners: Vec<Listener> = entries
        .filter(|(_, inode)| !own.contains(inode))
        .map(|(listener, _)| listener)
        .collect();
    listeners.sort_unstable();
    listeners.dedup();
    listeners.truncate(MAX_LISTENERS);
    Ok(listeners)
}
