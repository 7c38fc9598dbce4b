//! What the forwarder has to say by itself, at a rate that a person can read whatever the guest does.

use std::fmt;
use std::time::{Duration, Instant};

/// Lines that may come at once.
const BURST: u32 = 32;

/// How often one more may come after that.
const REFILL: Duration = Duration::from_secs(1);

/// Hears announcements; must not block.
pub type Announce = Box<dyn Fn(Announcement) + Send>;

/// Something to be shown, as a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Announcement {
    /// A program of the guest listens, and can be reached at this URL.
    Published {
        /// Where on the host.
        url: String,
        /// The port of the guest.
        guest: u16,
    },
    /// It does not listen any more.
    Withdrawn {
        /// Where on the host it was.
        url: String,
        /// The port of the guest.
        guest: u16,
    },
    /// A program of the guest listens and cannot be published; one sentence.
    NotPublished(String),
    /// Something to be careful with; one sentence.
    Warning(String),
    /// So many announcements were left out, as too many came.
    LeftOut(u64),
}

impl fmt::Display for Announcement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Published { url, guest } => write!(f, "{url} → guest port {guest}"),
            Self::Withdrawn { url, guest } => {
                write!(f, "{url} is gone: nothing listens at guest port {guest}")
            }
            Self::NotPublished(sentence) | Self::Warning(sentence) => f.write_str(sentence),
            Self::LeftOut(count) => {
                write!(f, "{count} more changes of ports: see `mvm port ls`")
            }
        }
    }
}

/// Where announcements go out, not too many of them.
pub struct Announcer {
    announce: Announce,
    left: u32,
    refilled: Instant,
    left_out: u64,
}

impl Announcer {
    /// All go to `announce`.
    pub fn new(announce: Announce) -> Self {
        Self {
            announce,
            left: BURST,
            refilled: Instant::now(),
            left_out: 0,
        }
    }

    /// Says it, or counts it where too much was said lately.
    pub fn say(&mut self, announcement: Announcement) {
        self.refill(Instant::now());
        if self.left == 0 {
            self.left_out = self.left_out.saturating_add(1);
            return;
        }
        self.left -= 1;
        (self.announce)(announcement);
    }

    /// When something that was left out is due to be mentioned.
    pub fn deadline(&self) -> Option<Instant> {
        (self.left_out > 0).then(|| self.refilled + REFILL)
    }

    /// Mentions what was left out, where that is due.
    pub fn expire(&mut self, now: Instant) {
        self.refill(now);
        if self.left_out > 0 && self.left > 0 {
            self.left -= 1;
            (self.announce)(Announcement::LeftOut(std::mem::take(&mut self.left_out)));
        }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.refilled).as_secs();
        let more = u32::try_from(passed / REFILL.as_secs()).unwrap_or(BURST);
        if more > 0 {
            self.left = self.left.saturating_add(more).min(BURST);
            self.refilled = now;
        }
    }
}

/// How a forward of a TCP port is announced.
pub fn url(host: &str) -> String {
    format!("http://{host}")
}
