//! Does what was done on the host once more on the mount, where somebody watches.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use agent::protocol::{ChangeKind, HostChange};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::attach::Attached;
use super::redo::{Redo, path};
use super::view::{Lookout, View};
use super::watchers::{Watched, Watchers};
use crate::tree::Tree;

/// How long the folder is held after a change for the next one, as taking hold of it is dear. Where the machine
/// itself unmounts it, its end comes that much later, or after the other time where one change follows another.
const LINGER: Duration = Duration::from_secs(1);
const MAX_HOLD: Duration = Duration::from_secs(5);

/// How far the clocks of host and machine may be apart, in seconds.
const CLOCKS_DIFFER: i64 = 2;

/// Little is called, and what is long is on the heap.
const STACK: usize = 128 << 10;

/// The thread that does the host's changes again.
#[derive(Debug)]
pub struct Replayer {
    /// The thread, as the kernel names it in its requests.
    pub thread: u32,
    to: Sender<Task>,
    done: Arc<Done>,
    handle: JoinHandle<()>,
}

/// What the thread is asked for.
enum Task {
    Replay(Vec<HostChange>),
    LetGo,
}

/// How far the thread is.
#[derive(Debug)]
struct Done {
    /// Tasks that are not done.
    waiting: Mutex<usize>,
    idle: Condvar,
    /// Counts replays that are done.
    event: OwnedFd,
}

impl Replayer {
    /// Starts the thread.
    pub fn start(
        attached: Arc<Attached>,
        root: Arc<Tree>,
        device: Arc<OwnedFd>,
    ) -> io::Result<Self> {
        let (to, from) = mpsc::channel();
        let (say, hear) = mpsc::channel();
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE;
        let done = Arc::new(Done {
            waiting: Mutex::new(0),
            idle: Condvar::new(),
            event: eventfd(0, flags)?,
        });
        let shared = Arc::clone(&done);
        let state = State {
            watchers: Watchers::new(attached.device),
            lookout: Lookout::new(attached, root),
            device,
            known: now(),
        };
        let handle = thread::Builder::new()
            .name("fuse-replay".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let own = rustix::thread::gettid().as_raw_nonzero().get();
                if say.send(own.cast_unsigned()).is_ok() {
                    run(state, &from, &shared);
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
        self.ask(Task::Replay(changes));
    }

    fn ask(&self, task: Task) {
        *self.done.lock() += 1;
        // The thread lives as long as this.
        let _ = self.to.send(task);
    }

    /// Whether one more replay is done than was told before.
    pub fn take_replayed(&self) -> bool {
        rustix::io::read(&self.done.event, &mut [0; 8]).is_ok()
    }

    /// Waits until everything that was asked for is done, and the folder is not held any more.
    pub fn let_go(&self) {
        self.ask(Task::LetGo);
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

    /// One task is done.
    fn one(&self) {
        *self.lock() -= 1;
        self.idle.notify_all();
    }
}

/// What the thread knows.
struct State {
    lookout: Lookout,
    device: Arc<OwnedFd>,
    watchers: Watchers,
    /// When it was last known what has changed: seconds since 1970.
    known: i64,
}

/// The folder; None where it is not at its place any more, so that nobody sees it there.
pub fn watched(lookout: &mut Lookout) -> Option<&View> {
    lookout.view().unwrap_or_else(|error| {
        eprintln!(
            "mvm-agent: those who watch a shared folder are not told of the host's changes: {error}"
        );
        None
    })
}

fn run(mut state: State, from: &Receiver<Task>, done: &Done) {
    loop {
        let next = match state.lookout.is_open() {
            true => from.recv_timeout(LINGER),
            false => from.recv().map_err(RecvTimeoutError::from),
        };
        match next {
            Ok(Task::Replay(changes)) => {
                state.redo(&changes);
                state.lookout.close_older(MAX_HOLD);
                done.one();
                // The counter is far from its end, so the write neither blocks nor fails.
                let _ = rustix::io::write(&done.event, &1u64.to_ne_bytes());
            }
            Ok(Task::LetGo) => {
                state.lookout.close();
                done.one();
            }
            Err(RecvTimeoutError::Timeout) => state.lookout.close(),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

impl State {
    fn redo(&mut self, changes: &[HostChange]) {
        let is_watched = |change| is_watched(&self.watchers.watched, change);
        if !changes.iter().all(is_watched) {
            self.watchers.look(&mut self.lookout);
        }
        if !self.watchers.watched.is_empty()
            && let Some(view) = watched(&mut self.lookout)
        {
            let redo = Redo {
                view,
                watched: &self.watchers.watched,
                device: &self.device,
                since: self.known - CLOCKS_DIFFER,
            };
            redo_all(&redo, changes);
        }
        self.known = now();
    }
}

fn redo_all(redo: &Redo<'_>, changes: &[HostChange]) {
    let wanted = wanted(redo.watched, changes);
    let mut rest = wanted.as_slice();
    while let Some((change, later)) = rest.split_first() {
        let of_it = later.iter().take_while(|next| is_of(change, next)).count();
        let (with_it, others) = later.split_at(of_it);
        rest = others;
        match redo.make(change, with_it) {
            Ok(()) => {}
            // It has gone, or come, or become something else since: a later change tells of that.
            Err(
                Errno::NOENT
                | Errno::EXIST
                | Errno::NOTDIR
                | Errno::ISDIR
                | Errno::NOTEMPTY
                | Errno::STALE
                | Errno::LOOP,
            ) => {}
            // The folder is being given up, and says so.
            Err(Errno::NOTCONN | Errno::CONNABORTED) => return,
            Err(errno) => eprintln!(
                "mvm-agent: those who watch {:?} are not told that the host has changed it: {errno}",
                String::from_utf8_lossy(&path(&change.dir, &change.name))
            ),
        }
    }
}

/// Those of `changes` that somebody hears, and those that have to be made before them: the host answers as if nothing
/// of what is still to be made had happened to a name.
fn wanted<'a>(watched: &Watched, changes: &'a [HostChange]) -> Vec<&'a HostChange> {
    let mut names: HashSet<Vec<u8>> = HashSet::new();
    let mut wanted = Vec::new();
    for change in changes.iter().rev() {
        let mut ends = vec![path(&change.dir, &change.name)];
        if let ChangeKind::Moved { dir, name } = &change.what {
            ends.push(path(dir, name));
        }
        let is_needed = names_something(&change.what) && ends.iter().any(|end| names.contains(end));
        if is_needed || is_watched(watched, change) {
            wanted.push(change);
            for end in &ends {
                let slashes = end.iter().enumerate().filter(|(_, byte)| **byte == b'/');
                names.extend(slashes.filter_map(|(at, _)| end.get(..at).map(<[u8]>::to_vec)));
            }
            names.extend(ends);
        }
    }
    wanted.reverse();
    wanted
}

/// Whether what follows the creation of a file is what its creator has done with it: both are made with one file.
fn is_of(change: &HostChange, next: &HostChange) -> bool {
    change.what == ChangeKind::CreatedFile
        && matches!(next.what, ChangeKind::Modified | ChangeKind::CloseWrite)
        && (&change.dir, &change.name) == (&next.dir, &next.name)
}

/// Whether a name means something else than before.
fn names_something(what: &ChangeKind) -> bool {
    !matches!(
        what,
        ChangeKind::Modified | ChangeKind::CloseWrite | ChangeKind::Attributes
    )
}

/// Whether somebody watches what has changed, or where it has.
fn is_watched(watched: &Watched, change: &HostChange) -> bool {
    let at = |dir: &[u8], name: &[u8]| watched.has(dir) || watched.has(&path(dir, name));
    at(&change.dir, &change.name)
        || match &change.what {
            ChangeKind::Moved { dir, name } => at(dir, name),
            ChangeKind::Overflow => !watched.is_empty(),
            _ => false,
        }
}

fn now() -> i64 {
    rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec
}
