//! The machine's clocks.

use std::io;
use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

/// A clock that is this close to the host's is left alone.
const TOLERANCE: Duration = Duration::from_millis(500);

/// In a second.
const NANOSECONDS: i64 = 1_000_000_000;

/// Time since the kernel started (CLOCK_BOOTTIME).
pub fn since_boot() -> Duration {
    duration(clock_gettime(ClockId::Boottime))
}

/// CLOCK_REALTIME in nanoseconds since 1970-01-01 UTC, once it is shifted by so many.
pub fn shift(by_ns: i64) -> io::Result<u64> {
    if by_ns != 0 {
        adjust(by_ns)?;
    }
    Ok(u64::try_from(now().as_nanos()).unwrap_or(u64::MAX))
}

/// Has the kernel add this to CLOCK_REALTIME: nothing that runs meanwhile makes it wrong.
fn adjust(by_ns: i64) -> io::Result<()> {
    // SAFETY: `timex` is numbers only, for which zeros are values.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
    // With ADJ_NANO the field for microseconds takes nanoseconds, which may not be negative (adjtimex(2)).
    change.time.tv_sec = by_ns.div_euclid(NANOSECONDS);
    change.time.tv_usec = by_ns.rem_euclid(NANOSECONDS);
    // SAFETY: the kernel reads and writes this structure alone, which lives until it is back.
    match unsafe { libc::adjtimex(&raw mut change) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// CLOCK_REALTIME.
fn now() -> Duration {
    duration(clock_gettime(ClockId::Realtime))
}

/// Sets CLOCK_REALTIME to this time since 1970-01-01 UTC.
fn set(epoch: Duration) -> io::Result<()> {
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
    if expected.abs_diff(now()) > TOLERANCE {
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
