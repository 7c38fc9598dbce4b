//! Children: forked under a lock, reaped by one thread, signalled only while their numbers are theirs.
//!
//! PID 1 inherits every orphan, so one thread waits for any child. A number becomes free for reuse
//! when its zombie is reaped; [`Reaper`] therefore looks at a zombie without reaping it, and reaps,
//! forks and signals under one lock. What was forked is always registered before it can be reaped.
//!
//! Lock order: `state` is the only lock and nothing is waited for under it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use agent::protocol::ExitStatus;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// The end of one child.
#[derive(Debug)]
pub struct Exit {
    status: OnceLock<ExitStatus>,
    event: OwnedFd,
}

impl Exit {
    fn new() -> io::Result<Self> {
        Ok(Self {
            status: OnceLock::new(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// How the child ended; None while it runs.
    pub fn status(&self) -> Option<ExitStatus> {
        self.status.get().copied()
    }

    /// Waits for the end; fails with TimedOut where it does not come within `patience`.
    pub fn wait(&self, patience: Duration) -> io::Result<ExitStatus> {
        let timeout = Timespec {
            tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(patience.subsec_nanos()),
        };
        match poll(&mut [PollFd::new(self, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => self.status().ok_or_else(|| io::ErrorKind::TimedOut.into()),
            Err(error) => Err(error.into()),
        }
    }

    fn announce(&self, status: ExitStatus) {
        if self.status.set(status).is_ok() {
            // The counter is 0 before its only write, so the write neither blocks nor fails.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }
}

/// Readable from the child's end on (and never read, so that every waiter sees it).
impl AsFd for Exit {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// A child that was forked through a [`Reaper`].
#[derive(Debug)]
pub struct Child {
    /// Its process id, which is also the id of its process group and session.
    pub pid: libc::pid_t,
    /// Its end.
    pub exit: Arc<Exit>,
}

/// Forks, reaps and signals children.
#[derive(Debug, Default)]
pub struct Reaper {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    children: HashMap<libc::pid_t, Arc<Exit>>,
    childless: bool,
}

impl Reaper {
    /// Forks; `child` runs in the new process, which exits with 127 where `child` comes back.
    ///
    /// # Safety
    /// `child` may only do what is async-signal-safe: the process has more threads, whose locks
    /// stay as they were in the copy. No allocation, no std I/O, no panic.
    pub unsafe fn fork(&self, child: impl FnOnce()) -> io::Result<Child> {
        let exit = Arc::new(Exit::new()?);
        let mut state = self.state();
        // SAFETY: the caller promises that the child's side is async-signal-safe.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                child();
                // SAFETY: takes no memory; what the agent does at its own exit is not run.
                unsafe { libc::_exit(127) }
            }
            pid => {
                state.children.insert(pid, Arc::clone(&exit));
                state.childless = false;
                self.changed.notify_all();
                Ok(Child { pid, exit })
            }
        }
    }

    /// Starts a test's program as a child of this reaper's, which would take its end from std's `wait`.
    ///
    /// Gives std's side too, whose pipes are the caller's; waiting is for [`Child::exit`].
    #[cfg(test)]
    pub fn spawn(
        &self,
        command: &mut std::process::Command,
    ) -> io::Result<(std::process::Child, Child)> {
        let exit = Arc::new(Exit::new()?);
        let mut state = self.state();
        let spawned = command.spawn()?;
        let pid = libc::pid_t::try_from(spawned.id()).map_err(io::Error::other)?;
        state.children.insert(pid, Arc::clone(&exit));
        state.childless = false;
        self.changed.notify_all();
        Ok((spawned, Child { pid, exit }))
    }

    /// Signals the process group that `child` leads; false where the child has ended.
    pub fn signal_group(&self, child: &Child, signal: i32) -> bool {
        let state = self.state();
        if !state.children.contains_key(&child.pid) {
            return false;
        }
        // SAFETY: kill(2) takes no memory. The number is the child's own: it is unreaped under the lock.
        unsafe { libc::kill(-child.pid, signal) == 0 }
    }

    /// Reaps children for ever: registered ones are announced, orphans vanish.
    pub fn run(&self) -> ! {
        loop {
            match wait_for_zombie() {
                Ok(pid) => self.reap(pid),
                Err(error) if error.raw_os_error() == Some(libc::ECHILD) => self.wait_for_fork(),
                Err(_interrupted) => {}
            }
        }
    }

    /// Waits until no child is left, at most `timeout`; false where that ran out.
    pub fn wait_until_childless(&self, timeout: Duration) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(self.state(), timeout, |state| !state.childless);
        waited.unwrap_or_else(PoisonError::into_inner).0.childless
    }

    fn reap(&self, pid: libc::pid_t) {
        let mut state = self.state();
        let mut raw = 0;
        // SAFETY: `raw` lives through the call; waitpid writes nothing else.
        if unsafe { libc::waitpid(pid, &mut raw, libc::WNOHANG) } != pid {
            return;
        }
        if let Some(exit) = state.children.remove(&pid) {
            exit.announce(match libc::WIFSIGNALED(raw) {
                true => ExitStatus::Signal(libc::WTERMSIG(raw)),
                false => ExitStatus::Code(libc::WEXITSTATUS(raw)),
            });
        }
    }

    /// There is no child at all: nothing to wait for until something is forked.
    fn wait_for_fork(&self) {
        let mut state = self.state();
        // Looked at again under the lock: a fork since then would never be noticed otherwise.
        if state.children.is_empty() && !has_children() {
            state.childless = true;
            self.changed.notify_all();
            while state.childless {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Blocks until any child is a zombie, and leaves it one.
fn wait_for_zombie() -> io::Result<libc::pid_t> {
    peek(libc::WEXITED | libc::WNOWAIT)
}

fn has_children() -> bool {
    let peeked = peek(libc::WEXITED | libc::WNOWAIT | libc::WNOHANG);
    !peeked.is_err_and(|error| error.raw_os_error() == Some(libc::ECHILD))
}

fn peek(options: i32) -> io::Result<libc::pid_t> {
    // SAFETY: siginfo_t is plain data for which all zeroes is a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` lives through the call and is all that waitid writes.
    if unsafe { libc::waitid(libc::P_ALL, 0, &mut info, options) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: waitid filled in the SIGCHLD form of siginfo_t, or left it zero, and pid is 0 then.
    Ok(unsafe { info.si_pid() })
}
