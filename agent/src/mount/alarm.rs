//! Something that is to be done in a while, once for all who asked for it meanwhile.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Tells the thread that [attends](Alarm::attend) to it.
#[derive(Debug, Default)]
pub struct Alarm {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Idle,
    /// Somebody has asked.
    Set,
    /// Nobody will ask any more.
    Ended,
}

impl Alarm {
    /// Asks for it.
    pub fn set(&self) {
        let mut state = self.lock();
        if *state == State::Idle {
            *state = State::Set;
            self.changed.notify_one();
        }
    }

    /// Nobody will ask any more.
    pub fn end(&self) {
        *self.lock() = State::Ended;
        self.changed.notify_one();
    }

    /// Does `work` when so long has passed since somebody asked, until the end.
    pub fn attend(&self, after: Duration, mut work: impl FnMut()) {
        loop {
            let idle = |state: &mut State| *state == State::Idle;
            let waited = self.changed.wait_while(self.lock(), idle);
            let state = waited.unwrap_or_else(PoisonError::into_inner);
            let set = |state: &mut State| *state == State::Set;
            let waited = self.changed.wait_timeout_while(state, after, set);
            let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if *state == State::Ended {
                return;
            }
            // Whoever asks from now on may come too late for this time.
            *state = State::Idle;
            drop(state);
            work();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn it_is_done_once_for_all_who_asked_and_again_for_the_next() {
        let alarm = Alarm::default();
        let (done, times) = mpsc::channel();
        thread::scope(|scope| {
            let attending = scope.spawn(|| {
                alarm.attend(Duration::from_millis(1), || done.send(()).unwrap());
            });
            for _ in 0..3 {
                alarm.set();
                times.recv_timeout(Duration::from_secs(60)).unwrap();
            }
            alarm.end();
            attending.join().unwrap();
        });
        assert!(times.try_recv().is_err());
    }

    #[test]
    fn the_end_waits_for_nothing() {
        let alarm = Alarm::default();
        alarm.set();
        thread::scope(|scope| {
            let attending = scope.spawn(|| {
                alarm.attend(Duration::from_secs(1000), || panic!("too early"));
            });
            alarm.end();
            attending.join().unwrap();
        });
    }
}
