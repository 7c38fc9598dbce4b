//! What may wait for a disk or a name server, on a few threads of its own: names become addresses,
//! paths of the machine's root become sockets.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use agent::names::is_localhost;
use agent::protocol::{DialError, Target};

use super::dial;
use super::handle::{Handle, Message};
use super::names;
use super::slots::Index;
use super::unix::{self, Bound};
use crate::tree::Tree;

/// Threads at a time: a slow name server holds up this many questions before others wait.
const MAX_THREADS: usize = 16;

/// Questions that wait for a thread.
const MAX_QUESTIONS: usize = 1024;

/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(10);

/// Buffers for messages are on the heap.
const STACK: usize = 128 << 10;

/// The longest name of DNS, and the longest that is taken.
const MAX_NAME: usize = 255;

/// How to get to a target.
#[derive(Debug, PartialEq, Eq)]
pub enum Plan {
    /// Connect to the first of these that can be connected to.
    Connect(Vec<SocketAddr>),
    /// Ask this first.
    Ask(Question),
    /// Not at all.
    Impossible(DialError),
}

/// Something that may take a while to find out.
#[derive(Debug, PartialEq, Eq)]
pub enum Question {
    /// The addresses of a name, for this port.
    Name(String, u16),
    /// A connection to the Unix socket at this path of the machine's root.
    Connect(Vec<u8>),
    /// A Unix socket that listens at this path of the machine's root.
    Listen(Vec<u8>),
}

/// What was found.
#[derive(Debug)]
pub enum Found {
    /// Of a name: not empty.
    Addresses(Vec<SocketAddr>),
    /// Of a path: connected and non-blocking.
    Stream(OwnedFd),
    /// Of a path: listening and non-blocking.
    Listener(Bound),
}

/// How a question ended.
pub type Answer = Result<Found, DialError>;

impl Plan {
    /// The way to `target`.
    pub fn of(target: Target) -> Self {
        let impossible = |reason: &str| Self::Impossible(DialError::Other(reason.to_owned()));
        match target {
            Target::Loopback(0) | Target::Host { port: 0, .. } => impossible("there is no port 0"),
            Target::Loopback(port) => Self::Connect(dial::loopback(port).to_vec()),
            Target::Host { host, port } => match host.parse::<IpAddr>() {
                Ok(address) => Self::Connect(vec![SocketAddr::new(address, port)]),
                Err(_) if is_localhost(&host) => Self::Connect(dial::loopback(port).to_vec()),
                Err(_) if host.is_empty() || host.len() > MAX_NAME => {
                    Self::Impossible(DialError::NoSuchHost)
                }
                Err(_) => Self::Ask(Question::Name(host, port)),
            },
            Target::Unix(path) => Self::Ask(Question::Connect(path)),
        }
    }
}

/// Answers questions for the reactor.
#[derive(Debug)]
pub struct Resolver(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    root: Arc<Tree>,
    handle: Handle,
    work: Mutex<Work>,
    available: Condvar,
}

#[derive(Debug, Default)]
struct Work {
    jobs: VecDeque<Job>,
    threads: usize,
    /// Threads that wait for a job.
    idle: usize,
}

#[derive(Debug)]
enum Job {
    /// Answered with [`Message::Resolved`], unless it is too late for that.
    Answer(Index, u64, Question, Instant),
    /// The socket's name is to go.
    Remove(unix::Name),
}

impl Resolver {
    /// Without threads, until there is a question.
    pub fn new(handle: Handle, root: Arc<Tree>) -> Self {
        Self(Arc::new(Shared {
            root,
            handle,
            work: Mutex::default(),
            available: Condvar::new(),
        }))
    }

    /// Asks on behalf of entry `index`; answered with [`Message::Resolved`] and `number`, unless
    /// `deadline` has passed by then. Fails with a sentence.
    pub fn ask(
        &self,
        index: Index,
        number: u64,
        question: Question,
        deadline: Instant,
    ) -> Result<(), String> {
        self.start(Job::Answer(index, number, question, deadline))
    }

    /// Removes the name of a socket that listens no more.
    pub fn remove(&self, name: unix::Name) {
        if let Err(error) = self.start(Job::Remove(name)) {
            eprintln!("mvm-agent: a socket that is not listened at stays behind: {error}");
        }
    }

    fn start(&self, job: Job) -> Result<(), String> {
        let mut work = self.0.work();
        if work.jobs.len() >= MAX_QUESTIONS {
            return Err(format!(
                "more than {MAX_QUESTIONS} names and paths wait to be looked up in the guest"
            ));
        }
        work.jobs.push_back(job);
        if work.jobs.len() > work.idle && work.threads < MAX_THREADS {
            let shared = Arc::clone(&self.0);
            let thread = thread::Builder::new()
                .name("resolver".to_owned())
                .stack_size(STACK);
            match thread.spawn(move || shared.run()) {
                Ok(_) => work.threads += 1,
                // Threads that there are will come to it.
                Err(_) if work.threads > 0 => {}
                Err(error) => {
                    work.jobs.pop_back();
                    return Err(format!("no thread can be started in the guest: {error}"));
                }
            }
        }
        self.0.available.notify_one();
        Ok(())
    }
}

impl Shared {
    fn run(&self) {
        while let Some(job) = self.next() {
            match job {
                Job::Answer(index, number, question, deadline) if Instant::now() < deadline => {
                    let answer = self.answer(question, deadline);
                    self.handle.send(Message::Resolved(index, number, answer));
                }
                Job::Answer(..) => {}
                Job::Remove(name) => name.remove(),
            }
        }
    }

    /// Waits for a job; none means that this thread is to end.
    fn next(&self) -> Option<Job> {
        let mut work = self.work();
        work.idle += 1;
        let is_empty = |work: &mut Work| work.jobs.is_empty();
        let waited = self.available.wait_timeout_while(work, IDLE, is_empty);
        work = waited.unwrap_or_else(PoisonError::into_inner).0;
        work.idle -= 1;
        let job = work.jobs.pop_front();
        if job.is_none() {
            work.threads -= 1;
        }
        job
    }

    fn answer(&self, question: Question, deadline: Instant) -> Answer {
        match question {
            Question::Name(host, port) => {
                let addresses = names::lookup(&self.root, &host, deadline)?;
                let with_port = |address| SocketAddr::new(address, port);
                Ok(Found::Addresses(
                    addresses.into_iter().map(with_port).collect(),
                ))
            }
            Question::Connect(path) => {
                unix::connect(&self.root, &path, deadline).map(Found::Stream)
            }
            Question::Listen(path) => unix::listen(&self.root, &path)
                .map(Found::Listener)
                .map_err(DialError::Other),
        }
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
