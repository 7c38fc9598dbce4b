//! What is asked of a machine's vCPUs, and how the machine ended: shared by all that can end it.
//!
//! Lock order: `state` is never held while `threads` is taken.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::exit::RunError;
use crate::vcpu;

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// [`crate::Machine::stop`] was called.
    Stopped,
    /// It could not go on.
    Failed(RunError),
}

/// What a vCPU's thread is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Enter the guest.
    Run,
    /// Enter the guest, which has been paused.
    RunOn,
    /// Leave.
    End,
}

const PAUSED: u8 = 0;
const RUNNING: u8 = 1;
const ENDED: u8 = 2;

/// The requests to vCPU threads and the machine's outcome.
#[derive(Debug)]
pub struct Control {
    /// What vCPUs look at before each entry into the guest; changed only with `state` held.
    request: AtomicU8,
    state: Mutex<State>,
    changed: Condvar,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct State {
    outcome: Option<Outcome>,
    /// vCPU threads that wait outside of the guest while the machine is paused.
    parked: usize,
}

impl Control {
    /// A machine that is paused and has no threads yet.
    pub fn new() -> Self {
        Self {
            request: AtomicU8::new(PAUSED),
            state: Mutex::default(),
            changed: Condvar::new(),
            threads: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is a single assignment: a panic elsewhere cannot have left it half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a vCPU's thread to those that are kicked and joined.
    pub fn add_thread(&self, thread: JoinHandle<()>) {
        self.threads().push(thread);
    }

    /// Called by a vCPU's thread before it enters the guest: waits while the machine is paused.
    pub fn wait_until_running(&self) -> Request {
        if self.request.load(Ordering::Acquire) == RUNNING {
            return Request::Run;
        }
        let mut state = self.state();
        state.parked += 1;
        self.changed.notify_all();
        let mut state = self
            .changed
            .wait_while(state, |_| self.request.load(Ordering::Acquire) == PAUSED)
            .unwrap_or_else(PoisonError::into_inner);
        state.parked -= 1;
        match self.request.load(Ordering::Acquire) {
            RUNNING => Request::RunOn,
            _ => Request::End,
        }
    }

    /// Lets the vCPUs run; nothing where the machine has ended.
    pub fn resume(&self) {
        self.request_unless_ended(RUNNING);
    }

    /// Takes all vCPUs out of the guest and returns when they have left it.
    pub fn pause(&self) {
        if !self.request_unless_ended(PAUSED) {
            return;
        }
        let threads = self.kick_all();
        let state = self.state();
        let _state = self
            .changed
            .wait_while(state, |state| {
                self.request.load(Ordering::Acquire) == PAUSED && state.parked < threads
            })
            .unwrap_or_else(PoisonError::into_inner);
    }

    fn request_unless_ended(&self, request: u8) -> bool {
        let state = self.state();
        if state.outcome.is_some() {
            return false;
        }
        self.request.store(request, Ordering::Release);
        self.changed.notify_all();
        true
    }

    /// Ends the machine with `outcome`, unless it has ended: the first outcome stays.
    pub fn finish(&self, outcome: Outcome) {
        {
            let mut state = self.state();
            if state.outcome.is_some() {
                return;
            }
            state.outcome = Some(outcome);
            self.request.store(ENDED, Ordering::Release);
            self.changed.notify_all();
        }
        self.kick_all();
    }

    fn kick_all(&self) -> usize {
        let threads = self.threads();
        for thread in threads.iter() {
            vcpu::kick(thread);
        }
        threads.len()
    }

    /// For how long each vCPU's thread has run; zero for those that have ended.
    pub fn cpu_times(&self) -> Vec<Duration> {
        self.threads().iter().map(vcpu::cpu_time).collect()
    }

    /// Waits for the machine to end.
    pub fn wait(&self) -> Outcome {
        let mut state = self.state();
        loop {
            if let Some(outcome) = &state.outcome {
                return outcome.clone();
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for the machine to end, at most for `timeout`; None when it has not.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Outcome> {
        let deadline = Instant::now() + timeout;
        let mut state = self.state();
        while state.outcome.is_none() {
            let left = deadline.checked_duration_since(Instant::now())?;
            (state, _) = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.outcome.clone()
    }

    /// Waits for all vCPU threads to end; call after [`Control::finish`], from another thread.
    pub fn join(&self) {
        let threads = std::mem::take(&mut *self.threads());
        // Whoever finished the machine may not have come to its kicks yet, and finds no threads now.
        for thread in &threads {
            vcpu::kick(thread);
        }
        for thread in threads {
            // A panic was caught in the thread and is the outcome.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;
    use vmm_sys_util::signal::{SIGRTMIN, block_signal};

    /// Whether the calling thread has been kicked, where it blocks the signal: proc(5), SigPnd.
    fn kick_is_pending() -> bool {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
        let mask = u64::from_str_radix(mask.unwrap().trim(), 16).unwrap();
        mask >> (SIGRTMIN() - 1) & 1 == 1
    }

    #[test]
    fn a_vcpu_that_nobody_has_kicked_yet_is_kicked_before_it_is_waited_for() {
        let control = Control::new();
        control.finish(Outcome::PowerOff);
        let (ready, kickable) = mpsc::channel();
        let (told, was_kicked) = mpsc::channel();
        control.add_thread(thread::spawn(move || {
            block_signal(SIGRTMIN()).unwrap();
            ready.send(()).unwrap();
            let patience = Instant::now() + Duration::from_secs(60);
            while !kick_is_pending() && Instant::now() < patience {
                thread::yield_now();
            }
            told.send(kick_is_pending()).unwrap();
        }));
        kickable.recv().unwrap();
        control.join();
        assert!(was_kicked.recv().unwrap(), "no kick came");
    }
}
