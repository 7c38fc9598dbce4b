//! Does what was done on the host once more on the mount, where somebody watches.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use agent::protocol::HostChange;
use rustix::event::{EventfdFlags, eventfd};

use super::attach::Attached;

/// Little is called, and what is long is on the heap.
const STACK: usize = 128 << 10;

/// The thread that does the host's changes again.
#[derive(Debug)]
pub struct Replayer {
    /// The thread, as the kernel names it in its requests.
    pub thread: u32,
    to: Sender<Vec<HostChange>>,
    done: Arc<Done>,
    handle: JoinHandle<()>,
}

/// How far the thread is.
#[derive(Debug)]
struct Done {
    /// Replays that were asked for and are not done.
    waiting: Mutex<usize>,
    idle: Condvar,
    /// Counts those that are done.
    event: OwnedFd,
}

impl Replayer {
    /// Starts the thread.
    pub fn start(attached: Arc<Attached>) -> io::Result<Self> {
        let (to, from) = mpsc::channel();
        let (say, hear) = mpsc::channel();
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE;
        let done = Arc::new(Done {
            waiting: Mutex::new(0),
            idle: Condvar::new(),
            event: eventfd(0, flags)?,
        });
        let shared = Arc::clone(&done);
        let handle = thread::Builder::new()
            .name("fuse-replay".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let own = rustix::thread::gettid().as_raw_nonzero().get();
                if say.send(own.cast_unsigned()).is_ok() {
                    run(&attached, &from, &shared);
                }
            })?;
        let thread = hear.recv().map_err(io::Error::other)?;
        Ok(Self {
            thread,
            to,
            done,
            handle,
        })
    }

    /// Has these changes done again; [`Replayer::take_replayed`] tells when they are.
    pub fn replay(&self, changes: Vec<HostChange>) {
        *self.done.lock() += 1;
        // The thread lives as long as this.
        let _ = self.to.send(changes);
    }

    /// Whether one more replay is done than was told before.
    pub fn take_replayed(&self) -> bool {
        rustix::io::read(&self.done.event, &mut [0; 8]).is_ok()
    }

    /// Waits until everything that was asked for is done.
    pub fn wait_until_idle(&self) {
        let waited = self
            .done
            .idle
            .wait_while(self.done.lock(), |waiting| *waiting > 0);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Ends the thread, once it is done with what it was asked for.
    pub fn end(self) {
        drop(self.to);
        // A thread that panicked has taken the agent down with it (panic = "abort").
        let _ = self.handle.join();
    }
}

/// Readable while a replay is done that was not told.
impl AsFd for Replayer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.done.event.as_fd()
    }
}

impl Done {
    fn lock(&self) -> std::sync::MutexGuard<'_, usize> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn run(_attached: &Attached, from: &Receiver<Vec<HostChange>>, done: &Done) {
    while let Ok(_changes) = from.recv() {
        *done.lock() -= 1;
        done.idle.notify_all();
        // The counter is far from its end, so the write neither blocks nor fails.
        let _ = rustix::io::write(&done.event, &1u64.to_ne_bytes());
    }
}
