//! Calls: the guest asks something of this process, and has the answer when its processor goes on.
//!
//! A program of the guest writes the number of a call to [`CALL_PORT`](crate::CALL_PORT), and leaves the guest by that. The
//! callee runs on the vCPU's thread, and finds in the guest's memory what is asked; what it puts there is seen by the next
//! instruction. No thread is woken for it, and no interrupt is sent.
//!
//! All that the guest has running on that vCPU stands still meanwhile. A callee is to do what takes no time; where it has
//! waited all the same, for a slow disk, it is left alone for a while, the longer the more often it waits: that takes no
//! more than a twentieth of the vCPU's time.

use std::collections::HashMap;
use std::fmt;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use devices::bus::BusDevice;

/// Who takes longer has waited, unless the host had other work for its thread.
const LONG: Duration = Duration::from_millis(2);

/// A callee that has waited is left alone for as long as that took, and twice as long if that happens again soon, and so on, up
/// to so many times as long.
const MAX_REST: u32 = 20;
const SOON: Duration = Duration::from_secs(1);

/// Whose call it is.
pub trait Callee: Send + Sync {
    /// Called on a vCPU's thread, by several at a time where a guest does that, whenever the guest likes. Its guest's vCPU
    /// stands still meanwhile, so this must not wait for anything, and must never panic.
    fn call(&self);
}

impl<T: Callee + ?Sized> Callee for Arc<T> {
    fn call(&self) {
        (**self).call();
    }
}

#[derive(Default)]
struct Table {
    next: u32,
    callees: HashMap<u32, Arc<Entry>>,
}

struct Entry {
    callee: Box<dyn Callee>,
    made: Instant,
    /// Until when it is left alone, nanoseconds after it was made.
    rests_until: AtomicU64,
    /// Until when it is looked at whether it waits.
    suspect_until: AtomicU64,
    last_rest: Mutex<Option<Rest>>,
}

/// What came of a call that took long.
#[derive(Clone, Copy)]
struct Rest {
    end: Instant,
    /// How many times as long as the call.
    times: u32,
}

impl Entry {
    fn new(callee: impl Callee + 'static) -> Self {
        Self {
            callee: Box::new(callee),
            made: Instant::now(),
            rests_until: AtomicU64::new(0),
            suspect_until: AtomicU64::new(0),
            last_rest: Mutex::default(),
        }
    }

    fn call(&self) {
        let start = Instant::now();
        let now = since(self.made, start);
        if now < self.rests_until.load(Ordering::Relaxed) {
            return;
        }
        // To know takes about as long as all the rest here: it is looked at where there is reason to.
        let is_suspect = now < self.suspect_until.load(Ordering::Relaxed);
        let waits = is_suspect.then(waits_of_this_thread);
        self.callee.call();
        let took = start.elapsed();
        if took <= LONG {
            return;
        }
        let suspect_until = since(self.made, start + took + SOON);
        self.suspect_until.store(suspect_until, Ordering::Relaxed);
        if waits.is_some_and(|waits| waits_of_this_thread() != waits) {
            self.rest(start, took);
        }
    }

    fn rest(&self, start: Instant, took: Duration) {
        let mut last = self
            .last_rest
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let times = match *last {
            Some(last) if start < last.end + SOON => (last.times * 2).min(MAX_REST),
            _ => 1,
        };
        let end = start + took * (times + 1);
        *last = Some(Rest { end, times });
        self.rests_until
            .store(since(self.made, end), Ordering::Relaxed);
    }
}

fn since(start: Instant, now: Instant) -> u64 {
    u64::try_from(now.duration_since(start).as_nanos()).unwrap_or(u64::MAX)
}

/// How often this thread has given up its processor to wait for something.
fn waits_of_this_thread() -> i64 {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel writes a `struct rusage`, which is plain numbers, for which zero is one too where it fails.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_nvcsw
    }
}

/// Who is called in one machine, by number.
#[derive(Clone, Default)]
pub struct Calls(Arc<RwLock<Table>>);

impl fmt::Debug for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.read().callees.keys()).finish()
    }
}

impl Calls {
    /// Has `callee` called under a number of its own, until what this returns is dropped.
    pub fn add(&self, callee: impl Callee + 'static) -> Call {
        let mut table = self.write();
        let number = table.next;
        table.next = number.wrapping_add(1);
        table.callees.insert(number, Arc::new(Entry::new(callee)));
        let calls = self.clone();
        Call { calls, number }
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Calls {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, offset: u64, data: &[u8]) {
        let (0, Ok(number)) = (offset, data.try_into()) else {
            return;
        };
        let callee = self
            .read()
            .callees
            .get(&u32::from_le_bytes(number))
            .cloned();
        if let Some(callee) = callee {
            callee.call();
        }
    }
}

/// A number that is called as long as this is kept; a call that is under way then goes on to its end.
#[derive(Debug)]
pub struct Call {
    calls: Calls,
    number: u32,
}

impl Call {
    /// What the guest has to write.
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let gone = self.calls.write().callees.remove(&self.number);
        // With no lock held: whatever it owns goes with it.
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Counter(AtomicU32);

    impl Callee for Counter {
        fn call(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn who_is_called_is_found_by_number_until_the_end() {
        let calls = Calls::default();
        let counters: [Arc<Counter>; 2] = Default::default();
        let [first, second] = [0, 1].map(|at: usize| calls.add(counters[at].clone()));
        let call = |call: u32| BusDevice::write(&calls, 0, &call.to_le_bytes());
        call(first.number());
        call(second.number());
        call(second.number());
        let number = second.number();
        drop(second);
        call(number);
        let counted = counters
            .each_ref()
            .map(|counter| counter.0.load(Ordering::Relaxed));
        assert_eq!(counted, [1, 2]);
        assert_eq!(Arc::strong_count(&counters[1]), 1);
    }

    #[test]
    fn who_has_waited_is_left_alone_for_a_while() {
        struct Sleeper(AtomicU32);
        impl Callee for Sleeper {
            fn call(&self) {
                self.0.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(LONG * 5);
            }
        }
        let calls = Calls::default();
        let sleeper = Arc::new(Sleeper(AtomicU32::new(0)));
        let call = calls.add(sleeper.clone());
        let start = Instant::now();
        let mut called = 0;
        while sleeper.0.load(Ordering::Relaxed) < 5 {
            BusDevice::write(&calls, 0, &call.number().to_le_bytes());
            called += 1;
        }
        // It was suspect then, and has rested for once, twice and four times as long.
        assert!(start.elapsed() >= LONG * 5 * 8, "after {called} calls");
        assert!(called > 5);
    }

    #[test]
    fn what_is_no_number_calls_nobody() {
        let calls = Calls::default();
        let counter = Arc::new(Counter::default());
        let call = calls.add(counter.clone());
        let number = call.number().to_le_bytes();
        for (offset, data) in [
            (0, &number[..1]),
            (1, &number),
            (0, &[0; 8]),
            (0, &[0xff; 4]),
        ] {
            BusDevice::write(&calls, offset, data);
        }
        let mut read = [7; 4];
        BusDevice::read(&calls, 0, &mut read);
        assert_eq!((counter.0.load(Ordering::Relaxed), read), (0, [7; 4]));
    }
}
