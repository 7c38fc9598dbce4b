//! One folder that a guest has mounted: its connections to the agent, and the threads that serve it.

use std::ffi::OsStr;
use std::io;
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use agent::protocol::{
    self, AGENT_PORT, FromMount, HostMemory, Mount, MountPoint, MountStream, Mounted, Open, ToMount,
};
use share::{HostEvent, Share};
use vmm::{CALL_PORT, Call};

use super::desk::Desk;
use super::error::FolderError;
use super::gather::{self, Gathered};
use super::stream::{Notices, Queue};
use super::window::Window;
use crate::link::Link;
use crate::session;

/// How long the guest may take to mount a folder: an emulated one is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long threads may take to end when there is nothing more to serve.
const FAREWELL: Duration = Duration::from_secs(5);

/// How often whoever waits for the agent looks whether it has answered somebody else.
const POLL: Duration = Duration::from_millis(10);

/// How many threads work on the requests of one queue.
const THREADS: usize = 3;

/// What the agent is told of a folder.
#[derive(Debug)]
pub struct Place<'a> {
    /// Where the guest has it.
    pub at: MountPoint,
    /// What its list of mounts shows as its source.
    pub source: &'a OsStr,
    /// Whether it can change nothing.
    pub read_only: bool,
    /// How many queues carry its requests.
    pub queues: u32,
    /// Whether the agent does the host's changes again, for who watches.
    pub replayed: bool,
}

/// A folder that is mounted until this is ended or dropped.
#[derive(Debug)]
pub struct Served {
    shared: Arc<Shared>,
}

/// What the threads of a folder share.
#[derive(Debug)]
struct Shared {
    share: Arc<Share>,
    queues: Arc<[Queue]>,
    /// Has the guest's calls come to the queues.
    _calls: Vec<Call>,
    notices: Notices,
    /// Held from a request to the agent until its answer.
    control: Mutex<UnixStream>,
    /// The same connection, to be ended by whoever wants to.
    hang_up: UnixStream,
    gathered: Gathered,
    /// How many threads serve, and how many there are.
    threads: Mutex<Threads>,
    fewer: Condvar,
}

#[derive(Debug, Default)]
struct Threads {
    serving: usize,
    all: usize,
}

impl Served {
    /// Has the agent behind `link` mount `share` at `place`, and serves it from then on.
    ///
    /// # Errors
    /// Where the agent cannot mount it, with its sentence, or is not reached.
    pub fn start(link: &Link, share: Share, place: &Place<'_>) -> Result<Self, FolderError> {
        let mode = share
            .root_mode()
            .map_err(|errno| FolderError::Lost(errno.into()))?;
        let desks = Desks::of(link, share, place.queues);
        let request = Mount {
            mount: session::fresh_id(),
            at: place.at.clone(),
            source: place.source.as_bytes().to_vec(),
            mode,
            read_only: place.read_only,
            queues: place.queues,
            memory: desks.described(),
        };
        let served = Self::connect(link, desks, &request).map_err(FolderError::Lost)?;
        for queue in 0..served.shared.queues.len() {
            for _ in 0..THREADS {
                let serve = move |shared: &Shared| shared.serve(queue);
                served
                    .spawn("folder", true, serve)
                    .map_err(FolderError::Thread)?;
            }
        }
        let mounted = served.await_mounted()?;
        let replayed = place.replayed;
        let notify = move |shared: &Shared| shared.watch(replayed);
        let replay = move |shared: &Shared| shared.replay(mounted.replayer);
        served
            .spawn("folder-watch", false, notify)
            .and_then(|()| match replayed {
                true => served.spawn("folder-events", false, replay),
                false => Ok(()),
            })
            .map_err(FolderError::Thread)?;
        Ok(served)
    }

    fn connect(link: &Link, desks: Desks, request: &Mount) -> io::Result<Self> {
        let control = open(link, &Open::Mount(request.clone()))?;
        let stream = |kind| {
            let mount = request.mount;
            open(link, &Open::MountStream { mount, kind })
        };
        let mut of_queues = desks.of_queues.iter().cloned();
        let queues = (0..request.queues)
            .map(|queue| {
                let stream = stream(MountStream::Requests { queue })?;
                let window = link.reach().map(|reach| Window::new(reach.memory.clone()));
                Ok(Queue::new(stream, window, of_queues.next()))
            })
            .collect::<io::Result<Arc<[Queue]>>>()?;
        let notices = Notices::new(stream(MountStream::Notifications)?, queues.clone());
        control.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            shared: Arc::new(Shared {
                share: desks.share,
                queues,
                _calls: desks.calls,
                notices,
                hang_up: control.try_clone()?,
                control: Mutex::new(control),
                gathered: Gathered::default(),
                threads: Mutex::default(),
                fewer: Condvar::new(),
            }),
        })
    }

    fn await_mounted(&self) -> Result<Mounted, FolderError> {
        let control = lock(&self.shared.control);
        match answer(&control) {
            Ok(FromMount::Mounted(mounted)) => {
                // The host's changes take as long as they take.
                control.set_read_timeout(None).map_err(FolderError::Lost)?;
                mounted.map_err(FolderError::refused)
            }
            Ok(_) => Err(FolderError::Lost(nonsense())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(FolderError::TooSlow),
            Err(error) => Err(FolderError::Lost(error)),
        }
    }

    /// Runs `body` on a thread of its own; the folder counts as served while one that is `serving` does.
    fn spawn(
        &self,
        name: &str,
        serving: bool,
        body: impl FnOnce(&Shared) + Send + 'static,
    ) -> io::Result<()> {
        let shared = self.shared.clone();
        let counted = Counted::new(shared, serving);
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || body(&counted.shared))?;
        Ok(())
    }

    /// Whether the guest still has it.
    pub fn is_there(&self) -> bool {
        lock(&self.shared.threads).serving > 0
    }

    /// Has `done` called once the guest has it no more.
    ///
    /// # Errors
    /// Where no thread can be started that waits for it.
    pub fn at_end(&self, done: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let shared = self.shared.clone();
        let wait = move || {
            let threads = lock(&shared.threads);
            let fewer = &shared.fewer;
            drop(fewer.wait_while(threads, |threads| threads.serving > 0));
            done();
        };
        let waiting = thread::Builder::new().name("folder-end".to_owned());
        waiting.spawn(wait).map(drop)
    }

    /// How many threads there are for it.
    #[cfg(test)]
    pub fn threads(&self) -> usize {
        lock(&self.shared.threads).all
    }

    /// Takes it away from the guest, with `force` also from whoever uses it, and whether or not the guest answers.
    ///
    /// # Errors
    /// With the agent's sentence where it stays.
    pub fn unmount(&self, force: bool) -> Result<(), FolderError> {
        let asked = match force {
            false => self.ask_to_unmount(PATIENCE, None),
            true => self.ask_to_unmount(FAREWELL, Some(FAREWELL)),
        };
        match asked {
            Ok(FromMount::Unmounted(outcome)) => outcome.map_err(FolderError::refused)?,
            Ok(_) if !force => return Err(FolderError::Lost(nonsense())),
            // The end of its connections ends it in the guest.
            Ok(_) => tracing::debug!("{}", nonsense()),
            Err(error) if force => tracing::debug!("the guest does not let go of it: {error}"),
            // It was unmounted in the guest meanwhile.
            Err(error) if !self.is_there() => tracing::debug!("the folder is gone: {error}"),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(FolderError::Silent);
            }
            Err(error) => return Err(FolderError::Lost(error)),
        }
        self.end();
        let threads = lock(&self.shared.threads);
        // What hangs in a system call on a filesystem that does not answer ends when that does.
        let fewer = &self.shared.fewer;
        drop(fewer.wait_timeout_while(threads, FAREWELL, |threads| threads.all > 0));
        Ok(())
    }

    /// Asks the agent to unmount it, once it has answered what it was asked before; `WouldBlock` where it does not do
    /// the one in time, or the other.
    fn ask_to_unmount(&self, before: Duration, answer: Option<Duration>) -> io::Result<FromMount> {
        let deadline = Instant::now() + before;
        let control = loop {
            match self.shared.control.try_lock() {
                Ok(control) => break control,
                Err(TryLockError::Poisoned(control)) => break control.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => thread::sleep(POLL),
                Err(TryLockError::WouldBlock) => return Err(io::ErrorKind::WouldBlock.into()),
            }
        };
        control.set_read_timeout(answer)?;
        ask(
            &control,
            &ToMount::Unmount {
                force: answer.is_some(),
            },
        )
    }

    /// Ends all threads; whoever uses it in the guest gets errors from then on.
    pub fn end(&self) {
        self.shared.end();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.end();
    }
}

/// Where the calls of a folder's queues are answered, where the guest's memory is in this process.
struct Desks {
    share: Arc<Share>,
    of_queues: Vec<Arc<Desk>>,
    calls: Vec<Call>,
}

impl Desks {
    fn of(link: &Link, share: Share, queues: u32) -> Self {
        let share = Arc::new(share);
        let (of_queues, calls) = (0..queues)
            .filter_map(|_| {
                let reach = link.reach()?;
                let desk = Arc::new(Desk::new(share.clone(), reach.memory.clone()));
                Some((desk.clone(), reach.calls.add(desk)))
            })
            .unzip();
        Self {
            share,
            of_queues,
            calls,
        }
    }

    /// What the agent has to know of them.
    fn described(&self) -> Option<HostMemory> {
        (!self.calls.is_empty()).then(|| HostMemory {
            call_port: CALL_PORT,
            calls: self.calls.iter().map(Call::number).collect(),
        })
    }
}

impl Shared {
    fn end(&self) {
        self.share.stop();
        self.gathered.end();
        self.notices.end();
        for queue in &*self.queues {
            queue.end();
        }
        // The agent may have hung up first.
        let _ = self.hang_up.shutdown(Shutdown::Both);
    }

    fn serve(&self, queue: usize) {
        let Some(queue) = self.queues.get(queue) else {
            return;
        };
        if let Err(error) = share::serve(&self.share, queue) {
            // One that makes no sense is not served any more at all.
            tracing::debug!("a folder's connection broke: {error}");
        }
        queue.end();
    }

    fn watch(&self, replayed: bool) {
        let mut tell = |events: &[HostEvent]| {
            if replayed {
                self.gathered.add(events);
            }
        };
        if let Err(error) = share::watch(&self.share, &self.notices, &mut tell) {
            tracing::debug!("a folder's changes are not followed any more: {error}");
        }
    }

    /// Has the agent do the host's changes again, until this ends.
    fn replay(&self, replayer: u32) {
        while let Some(events) = self.gathered.take() {
            let changes = events.iter().cloned().map(gather::told).collect();
            let control = lock(&self.control);
            self.share.replay(replayer, events);
            let replayed = ask(&control, &ToMount::Replay(changes));
            self.share.replayed();
            match replayed {
                Ok(FromMount::Replayed) => {}
                // It was unmounted in the guest meanwhile.
                Ok(FromMount::Unmounted(_)) => return,
                Ok(_) => return tracing::warn!("{}", nonsense()),
                Err(error) => return tracing::debug!("a folder's agent is gone: {error}"),
            }
        }
    }
}

/// A thread that counts, for as long as it runs.
struct Counted {
    shared: Arc<Shared>,
    serving: usize,
}

impl Counted {
    fn new(shared: Arc<Shared>, serving: bool) -> Self {
        let serving = usize::from(serving);
        {
            let mut threads = lock(&shared.threads);
            threads.all += 1;
            threads.serving += serving;
        }
        Self { shared, serving }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut threads = lock(&self.shared.threads);
        threads.all -= 1;
        threads.serving -= self.serving;
        let is_over = self.serving > 0 && threads.serving == 0;
        drop(threads);
        if is_over {
            // The guest has it no more: nothing is left to watch.
            self.shared.end();
        }
        self.shared.fewer.notify_all();
    }
}

fn open(link: &Link, first: &Open) -> io::Result<UnixStream> {
    let stream = link.connect(AGENT_PORT)?;
    protocol::send(&stream, first)?;
    Ok(stream)
}

fn ask(mut control: &UnixStream, request: &ToMount) -> io::Result<FromMount> {
    protocol::send(&mut control, request)?;
    answer(control)
}

fn answer(control: &UnixStream) -> io::Result<FromMount> {
    let answer = protocol::receive(control)?;
    answer.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn nonsense() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the guest's agent answers something else than it was asked",
    )
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
