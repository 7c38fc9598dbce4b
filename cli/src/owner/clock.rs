//! The guest's clock: it stands still while the machine or its host does, and is set when they go on.

use std::sync::Weak;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent::protocol::{self, AGENT_PORT, Done, Open};
use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::Owned;
use crate::link::Link;

/// How long the guest may take to set its clock.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a request may take on its way without the guest being told the time again, corrected for it.
const FAST: Duration = Duration::from_millis(10);

/// Sets the guest's clock to the host's.
pub fn set(link: &Link) -> Result<()> {
    let mut lag = Duration::ZERO;
    for _ in 0..3 {
        let took = set_ahead(link, lag)?;
        if took <= FAST || took <= lag * 3 {
            break;
        }
        // Half of the way there and back.
        lag = took / 2;
    }
    Ok(())
}

/// Sets it to the host's time and `lag`; returns how long that took.
fn set_ahead(link: &Link, lag: Duration) -> Result<Duration> {
    let stream = link
        .connect(AGENT_PORT)
        .context("the guest's agent cannot be reached")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let asked = Instant::now();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .context("the host's clock is before 1970")?;
    let epoch_ns = u64::try_from((now + lag).as_nanos()).context("the host's clock is too late")?;
    protocol::send(&stream, &Open::SetTime { epoch_ns })?;
    match protocol::receive(&stream)? {
        Some(Done(Ok(()))) => Ok(asked.elapsed()),
        Some(Done(Err(reason))) => bail!("{reason}"),
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
