//! When the thread is woken for what the host sends on a connection.
//!
//! Linux's vsock wakes a reader for each packet, of which each holds less than 4 KiB, and tells the host of the room
//! that there is again after each read. A thread that goes before all others then takes a packet at a time, and most of
//! what it does costs as much for one as for many. So once much has come without a pause, it is woken for [`BATCH`]
//! bytes only. The last bytes may be fewer: for them it looks by itself, twice as late as [`BATCH`] bytes should have
//! been there. When little has come by then a few times, each packet wakes again, and for longer than before.
//!
//! Kernels before Linux 6.2 know no such limit for vsock: there each packet wakes, as before.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::socket_option;

/// How many bytes wake the thread then: so many have room at any time, though kernels before Linux 6.8 may have kept
/// the rest of the window of 256 KiB from the host.
const BATCH: usize = 64 << 10;

/// How much has to come before, without a pause: at first, and after more and more pauses.
const ENOUGH: usize = 256 << 10;
const MOST: usize = 16 << 20;

/// How long [`BATCH`] bytes may take.
const SLOWEST: Duration = Duration::from_millis(8);

/// Looks in a row that find little.
const POOR_LOOKS: u8 = 4;

/// How soon the thread looks by itself.
const SOONEST: Duration = Duration::from_micros(200);

/// How a connection is read from.
#[derive(Debug)]
pub struct Pace {
    /// How much is to come without a pause.
    enough: usize,
    /// How much has come since then, each packet a wake-up.
    count: usize,
    since: Option<Instant>,
    batches: Option<Batches>,
}

/// While [`BATCH`] bytes wake.
#[derive(Debug)]
struct Batches {
    /// How much has come since the last look.
    count: usize,
    /// Looks in a row that found less than [`BATCH`].
    poor_looks: u8,
    interval: Duration,
    next_look: Instant,
}

impl Pace {
    /// Each packet wakes.
    pub fn new() -> Self {
        Self {
            enough: ENOUGH,
            count: 0,
            since: None,
            batches: None,
        }
    }

    /// When to look by itself, if ever.
    pub fn next_look(&self) -> Option<Instant> {
        self.batches.as_ref().map(|batches| batches.next_look)
    }

    /// Takes note of bytes that were read.
    pub fn read(&mut self, from: impl AsFd, count: usize, now: Instant) {
        if let Some(batches) = &mut self.batches {
            batches.count = batches.count.saturating_add(count);
            return;
        }
        self.count = self.count.saturating_add(count);
        let since = *self.since.get_or_insert(now);
        // How long a batch takes at this pace.
        let batches = u32::try_from(self.count / BATCH).unwrap_or(u32::MAX);
        let interval = now.saturating_duration_since(since) / batches.max(1);
        if interval > SLOWEST {
            self.count = 0;
            self.since = None;
        } else if self.count >= self.enough && socket_option::wake_at(from, BATCH).is_ok() {
            let interval = SOONEST.max(2 * interval);
            self.batches = Some(Batches {
                count: 0,
                poor_looks: 0,
                interval,
                next_look: now + interval,
            });
        }
    }

    /// Its time to look has come: what is there is to be read now.
    pub fn look(&mut self, from: impl AsFd, now: Instant) {
        let Some(batches) = &mut self.batches else {
            return;
        };
        batches.next_look = now + batches.interval;
        batches.poor_looks = match std::mem::take(&mut batches.count) < BATCH {
            true => batches.poor_looks.saturating_add(1),
            false => 0,
        };
        // A limit that could be set once can be set again; else looking goes on.
        if batches.poor_looks >= POOR_LOOKS && socket_option::wake_at(from, 1).is_ok() {
            *self = Self {
                enough: MOST.min(2 * self.enough),
                ..Self::new()
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    const MILLISECOND: Duration = Duration::from_millis(1);

    /// A pace, a socket, and a clock.
    fn set_up() -> (Pace, UnixStream, Instant) {
        (Pace::new(), UnixStream::pair().unwrap().0, Instant::now())
    }

    /// Has so many bytes come in packets, this much in each millisecond; says when the last one came.
    fn come(
        pace: &mut Pace,
        socket: &UnixStream,
        mut now: Instant,
        bytes: usize,
        each: usize,
    ) -> Instant {
        for _ in 0..bytes / each {
            pace.read(socket, each, now);
            now += MILLISECOND;
        }
        now
    }

    #[test]
    fn what_trickles_wakes_for_each_packet_for_ever() {
        let (mut pace, socket, now) = set_up();
        come(&mut pace, &socket, now, 4 * MOST, 4 << 10);
        assert_eq!(pace.next_look(), None);
    }

    #[test]
    fn what_flows_wakes_for_batches_until_a_few_looks_find_little() {
        let (mut pace, socket, now) = set_up();
        let now = come(&mut pace, &socket, now, ENOUGH - BATCH, BATCH);
        assert_eq!(pace.next_look(), None);
        let mut now = come(&mut pace, &socket, now, BATCH, BATCH);
        for _ in 0..100 {
            let look = pace.next_look().expect("a look is due");
            assert!(look <= now + 2 * MILLISECOND, "{:?}", look - now);
            now = come(&mut pace, &socket, look, BATCH, BATCH);
            pace.look(&socket, now);
        }
        for _ in 1..POOR_LOOKS {
            pace.look(&socket, now);
            assert!(pace.next_look().is_some());
        }
        pace.look(&socket, now);
        assert_eq!(pace.next_look(), None);
        // The next time it takes more.
        let now = come(&mut pace, &socket, now, 2 * ENOUGH - BATCH, BATCH);
        assert_eq!(pace.next_look(), None);
        come(&mut pace, &socket, now, BATCH, BATCH);
        assert!(pace.next_look().is_some());
    }

    #[test]
    fn a_socket_without_such_a_limit_is_read_as_ever() {
        let (mut pace, _, now) = set_up();
        let null = std::fs::File::open("/dev/null").unwrap();
        for _ in 0..4 * ENOUGH / BATCH {
            pace.read(&null, BATCH, now);
        }
        assert_eq!(pace.next_look(), None);
    }
}
