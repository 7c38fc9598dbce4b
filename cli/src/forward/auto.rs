//! Publishing what listens in the guest, as it comes and goes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::announce::{Announcement, Announcer, url};
use super::poll::Poller;
use super::ports::PortSet;
use super::published::{Published, PublishedPorts};
use super::spec::PortRange;

/// Ports published at once: each takes descriptors, and a guest can listen at all of them.
const MAX_PUBLISHED: usize = 1024;

/// How long a port stays published after the last listener went. It refuses connections meanwhile, and a
/// service that is started anew keeps its host port.
const GRACE: Duration = Duration::from_secs(2);

/// What to publish of what listens in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Auto {
    /// Ports of the guest that are not published.
    pub exclude: Vec<PortRange>,
}

/// The state of publishing by itself.
pub struct AutoPublisher {
    /// None: nothing is published.
    auto: Option<Auto>,
    /// What cannot be published, until it listens no more.
    skipped: PortSet,
    /// Ports without a listener, and how long they stay.
    going: BTreeMap<u16, Instant>,
    /// The host port each guest port had last.
    before: BTreeMap<u16, u16>,
}

impl AutoPublisher {
    /// Publishes nothing until [`AutoPublisher::set`].
    pub fn new() -> Self {
        Self {
            auto: None,
            skipped: PortSet::new(),
            going: BTreeMap::new(),
            before: BTreeMap::new(),
        }
    }

    /// Publishes by these rules from now on; None takes all away.
    pub fn set(&mut self, auto: Option<Auto>) {
        self.auto = auto;
        self.skipped = PortSet::new();
    }

    /// Whether anything is published.
    pub fn is_on(&self) -> bool {
        self.auto.is_some()
    }

    /// Publishes `port` of the guest no more.
    pub fn exclude(&mut self, port: u16) {
        if let (Some(auto), Some(range)) = (&mut self.auto, PortRange::new(port, port)) {
            auto.exclude.push(range);
        }
    }

    /// Brings what is published in line with what listens in the guest; returns what is to be said of
    /// it once that listens, too.
    pub fn follow(
        &mut self,
        guest: &PortSet,
        published: &mut PublishedPorts,
        poller: &Poller,
    ) -> Vec<Announcement> {
        let mut news = self.withdraw_unwanted(published, poller);
        let now = Instant::now();
        let mut count = 0;
        let mut have = PortSet::new();
        for one in published.iter() {
            let Some(port) = one.guest_port() else {
                continue;
            };
            have.insert(port);
            if !one.is_auto() {
                continue;
            }
            count += 1;
            match guest.contains(port) {
                true => drop(self.going.remove(&port)),
                false => drop(self.going.entry(port).or_insert(now + GRACE)),
            }
        }
        self.skipped.keep(guest);
        for port in guest.iter() {
            if have.contains(port) || !self.is_wanted(port) {
                continue;
            }
            if count >= MAX_PUBLISHED {
                self.skipped.insert(port);
                let sentence = format!("guest port {port} is not published: {count} are already");
                news.push(Announcement::NotPublished(sentence));
                continue;
            }
            let said = self.publish(port, published, poller);
            if let Announcement::Published { .. } = said {
                count += 1;
            }
            news.push(said);
        }
        news
    }

    /// When something is to be withdrawn.
    pub fn deadline(&self) -> Option<Instant> {
        self.going.values().min().copied()
    }

    /// Withdraws what has had no listener for long enough.
    pub fn expire(
        &mut self,
        now: Instant,
        published: &mut PublishedPorts,
        announcer: &mut Announcer,
        poller: &Poller,
    ) {
        let due: PortSet = self
            .going
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(port, _)| *port)
            .collect();
        if due.is_empty() {
            return;
        }
        self.going.retain(|port, _| !due.contains(*port));
        let gone = published.remove(poller, |one| {
            one.is_auto() && one.guest_port().is_some_and(|port| due.contains(port))
        });
        for one in &gone {
            announcer.say(withdrawn(one));
        }
    }

    fn is_wanted(&self, port: u16) -> bool {
        let excluded = |auto: &Auto| auto.exclude.iter().any(|range| range.contains(port));
        let wanted = self.auto.as_ref().is_some_and(|auto| !excluded(auto));
        wanted && !self.skipped.contains(port)
    }

    fn withdraw_unwanted(
        &mut self,
        published: &mut PublishedPorts,
        poller: &Poller,
    ) -> Vec<Announcement> {
        let unwanted = |port| !self.is_wanted(port);
        let gone = published.remove(poller, |one| {
            one.is_auto() && one.guest_port().is_none_or(unwanted)
        });
        for one in &gone {
            if let Some(port) = one.guest_port() {
                self.going.remove(&port);
            }
        }
        gone.iter().map(withdrawn).collect()
    }

    fn publish(
        &mut self,
        port: u16,
        published: &mut PublishedPorts,
        poller: &Poller,
    ) -> Announcement {
        let before = self.before.get(&port).copied().unwrap_or(port);
        let bound = PublishedPorts::bind_auto(port, before).map_err(|error| error.source);
        let inserted = bound.and_then(|bound| {
            self.before.insert(port, bound.port());
            let host = bound.host();
            published.insert(bound, poller).map(|()| host)
        });
        match inserted {
            Ok(host) => Announcement::Published {
                url: url(&host),
                guest: port,
            },
            Err(error) => {
                // Not tried again with each change that the guest makes.
                self.skipped.insert(port);
                Announcement::NotPublished(format!(
                    "guest port {port} is not published: no host port can be taken for it: {error}"
                ))
            }
        }
    }
}

fn withdrawn(one: &Published) -> Announcement {
    Announcement::Withdrawn {
        url: url(&one.host()),
        guest: one.guest_port().unwrap_or_default(),
    }
}
