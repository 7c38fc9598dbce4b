//! How fast the time-stamp counter counts: an emulator passes the host's on, and a guest that had to
//! measure it there could be off by a factor.

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks at the clock.
const SPAN: Duration = Duration::from_millis(20);

/// Looks at the clock, of which the one with the least between counter and clock counts.
const LOOKS: usize = 16;

/// Measurements, two of which in a row have to agree.
const TRIES: usize = 8;

/// How far apart two that agree may be, in millionths.
const TOLERANCE_PPM: u64 = 1000;

/// Ticks a millisecond of this host's counter, measured in some 40 ms; None where two measurements never agree.
pub fn tsc_khz() -> Option<u32> {
    let mut before = None;
    for _ in 0..TRIES {
        let now = measure();
        if let (Some(before), Some(now)) = (before, now)
            && agree(before, now)
        {
            return u32::try_from(now).ok();
        }
        before = now;
    }
    None
}

fn agree(a: u64, b: u64) -> bool {
    a.abs_diff(b).saturating_mul(1_000_000) <= a.max(b).saturating_mul(TOLERANCE_PPM)
}

fn measure() -> Option<u64> {
    let (ticks, time) = look()?;
    thread::sleep(SPAN);
    let (later_ticks, later) = look()?;
    let ticks = u128::from(later_ticks.checked_sub(ticks)?);
    let nanoseconds = later.checked_duration_since(time)?.as_nanos();
    let khz = (ticks * 1_000_000).checked_div(nanoseconds)?;
    u64::try_from(khz).ok().filter(|khz| *khz > 0)
}

/// The counter, and the time at which it was read.
fn look() -> Option<(u64, Instant)> {
    let looks = (0..LOOKS).filter_map(|_| {
        let before = counter();
        let time = Instant::now();
        let between = counter().checked_sub(before)?;
        Some((between, before + between / 2, time))
    });
    let (_, ticks, time) = looks.min_by_key(|(between, ..)| *between)?;
    Some((ticks, time))
}

fn counter() -> u64 {
    // SAFETY: reading the counter touches no memory; every x86-64 processor has it, and Linux leaves it to
    // user space.
    unsafe { _rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_is_measured_the_same_twice() {
        let (Some(first), Some(second)) = (tsc_khz(), tsc_khz()) else {
            panic!("the counter is not steady");
        };
        assert!(first > 100_000, "{first} kHz");
        assert!(
            first.abs_diff(second) < first / 100,
            "{first} and {second} kHz"
        );
    }

    #[test]
    fn measurements_agree_within_a_thousandth() {
        assert!(agree(2_600_000, 2_602_000));
        assert!(!agree(2_600_000, 2_603_000));
        assert!(!agree(666_107, 2_594_345));
        assert!(agree(u64::MAX, u64::MAX));
    }
}
