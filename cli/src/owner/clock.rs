//! The guest's clock: it stands still while the machine or its host does, and is set when they go on.

use std::os::unix::net::UnixStream;
use std::sync::Weak;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent::protocol::{self, AGENT_PORT, Clock, Open, ShiftClock};
use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::Owned;
use crate::link::Link;

/// How long the guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// An answer that comes so soon tells the time well enough.
const FAST: Duration = Duration::from_millis(10);

/// Otherwise this many are asked for, of which the quickest counts.
const QUESTIONS: usize = 8;

/// Sets the guest's clock to the host's.
pub fn set(link: &Link) -> Result<()> {
    let stream = link
        .connect(AGENT_PORT)
        .context("the guest's agent cannot be reached")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    protocol::send(&stream, &Open::Clock)?;
    agree(&stream)?;
    Ok(())
}

/// Has the clock behind `stream` shifted to this one; returns how far they may be apart still.
///
/// A host or a guest that is busy answers late, one time more than the next: so the time is not sent, which would be
/// wrong by what it takes on its way, but the difference, as the quickest of several answers tells it.
fn agree(stream: &UnixStream) -> Result<Duration> {
    let mut best: Option<Reading> = None;
    for _ in 0..QUESTIONS {
        let reading = Reading::take(stream)?;
        if best.is_none_or(|best| reading.unsure < best.unsure) {
            best = Some(reading);
        }
        if reading.unsure * 2 <= FAST {
            break;
        }
    }
    let best = best.context("the guest was not asked")?;
    if Duration::from_nanos(best.ahead_ns.unsigned_abs()) > best.unsure {
        shift(stream, best.ahead_ns.saturating_neg())?;
    }
    Ok(best.unsure)
}

/// What one answer tells of the guest's clock.
#[derive(Debug, Clone, Copy)]
struct Reading {
    /// How far it is ahead of the host's, in nanoseconds.
    ahead_ns: i64,
    /// By how much that may be wrong: half of what the answer took.
    unsure: Duration,
}

impl Reading {
    fn take(stream: &UnixStream) -> Result<Self> {
        let asked = Instant::now();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .context("the host's clock is before 1970")?;
        let guest = shift(stream, 0)?;
        let unsure = asked.elapsed() / 2;
        let host = i128::try_from((now + unsure).as_nanos())?;
        let ahead = i128::from(guest) - host;
        let ahead_ns = i64::try_from(ahead).context("the guest's clock is centuries off")?;
        Ok(Self { ahead_ns, unsure })
    }
}

/// Has the guest's clock shifted; returns what it is then, in nanoseconds since 1970.
fn shift(stream: &UnixStream, by_ns: i64) -> Result<u64> {
    protocol::send(stream, &ShiftClock { by_ns })?;
    match protocol::receive(stream)? {
        Some(Clock(Ok(time))) => Ok(time),
        Some(Clock(Err(reason))) => bail!("{reason}"),
        None => bail!("the guest's agent did not answer"),
    }
}

/// Sets the guest's clock whenever the host's makes a step, as it does when the host wakes up.
pub fn follow(machine: Weak<Owned>) -> Result<()> {
    let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::CLOEXEC)
        .context("the host's clock cannot be watched")?;
    thread::Builder::new().name("clock".into()).spawn(move || {
        loop {
            // A step cancels the timer, which itself never fires in a machine's life.
            let never = Itimerspec {
                it_interval: Timespec::default(),
                it_value: Timespec {
                    tv_sec: i64::MAX / 2_000_000_000,
                    tv_nsec: 0,
                },
            };
            let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
            if let Err(error) = timerfd_settime(&timer, flags, &never) {
                return tracing::warn!("the host's clock cannot be watched: {error}");
            }
            match rustix::io::read(&timer, &mut [0; 8]) {
                Ok(_) | Err(Errno::INTR) => continue,
                Err(Errno::CANCELED) => {}
                Err(error) => return tracing::warn!("the host's clock cannot be watched: {error}"),
            }
            let Some(machine) = machine.upgrade() else {
                return;
            };
            machine.set_clock();
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Serves as a guest whose clock is ahead, and whose answers are as late as that; returns how far it is ahead at
    /// the end, in nanoseconds.
    fn serve(stream: &UnixStream, mut ahead_ns: i64, late: &[u64]) -> i64 {
        let mut late = late.iter().copied();
        while let Some(ShiftClock { by_ns }) = protocol::receive(stream).unwrap() {
            ahead_ns += by_ns;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            let time = i64::try_from(now.as_nanos()).unwrap() + ahead_ns;
            thread::sleep(Duration::from_millis(late.next().unwrap_or_default()));
            protocol::send(stream, &Clock(Ok(time.try_into().unwrap()))).unwrap();
        }
        ahead_ns
    }

    fn after_agreeing(ahead: i64, late: &[u64]) -> (i64, Duration) {
        let (host, guest) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            let guest = scope.spawn(move || serve(&guest, ahead * 1_000_000, late));
            let unsure = agree(&host).unwrap();
            drop(host);
            (guest.join().unwrap(), unsure)
        })
    }

    #[test]
    fn a_guest_that_answers_late_at_first_has_the_right_time_all_the_same() {
        for ahead in [-5_000, 0, 300, 800_000_000_000] {
            let (off, unsure) = after_agreeing(ahead, &[400, 30, 0]);
            assert!(
                off.unsigned_abs() <= unsure.as_nanos() as u64,
                "{off} ns ahead, to be known within {unsure:?}"
            );
            assert!(unsure < Duration::from_millis(200), "{unsure:?}");
        }
    }

    #[test]
    fn a_guest_that_is_always_late_is_asked_so_often_and_no_more() {
        let (off, unsure) = after_agreeing(0, &[25; QUESTIONS + 1]);
        assert_eq!(
            off, 0,
            "what cannot be told from late answers is left alone"
        );
        assert!(unsure >= FAST / 2, "{unsure:?}");
    }
}
