//! The machine's clocks.

use std::io;
use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

/// A clock that is this close to the host's is left alone.
const TOLERANCE: Duration = Duration::from_millis(500);

/// Time since the kernel started (CLOCK_BOOTTIME).
pub fn since_boot() -> Duration {
    duration(clock_gettime(ClockId::Boottime))
}

/// Sets CLOCK_REALTIME to this time since 1970-01-01 UTC.
pub fn set(epoch: Duration) -> io::Result<()> {
    let overflow = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let time = Timespec {
        tv_sec: i64::try_from(epoch.as_secs()).map_err(overflow)?,
        tv_nsec: i64::from(epoch.subsec_nanos()),
    };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

/// Sets the clock where it is off: `at_start` is the host's clock just before this kernel started.
pub fn correct(at_start: Duration) -> io::Result<()> {
    let expected = at_start.saturating_add(since_boot());
    let actual = duration(clock_gettime(ClockId::Realtime));
    if expected.abs_diff(actual) > TOLERANCE {
        set(expected)?;
    }
    Ok(())
}

/// These clocks are never negative; a broken one counts as zero.
fn duration(time: Timespec) -> Duration {
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanos = u32::try_from(time.tv_nsec).unwrap_or_default();
    Duration::new(seconds, nanos)
}
