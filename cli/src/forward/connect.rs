//! Connections to programs of the host, made without waiting for any of them.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::poll::{Poller, Token};

/// Connections being made at once. The guest asks for them.
const MAX_CONNECTING: usize = 1024;

/// Addresses tried for one name.
const MAX_ATTEMPTS: usize = 4;

/// How long one address may take, or a name; all of them stay under the 30 s that the agent waits.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// How much longer than that is waited for a name.
const LOOK_UP_SLACK: Duration = Duration::from_secs(2);

/// How long to wait for room in the queue of a Unix socket, and how often.
const FULL_PAUSE: Duration = Duration::from_millis(20);
const FULL_TRIES: u32 = 100;

/// Something to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attempt {
    /// A TCP port.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

/// For what a connection is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Purpose {
    /// The number of the reverse forward.
    pub forward: u32,
    /// By which the guest's agent knows the connection.
    pub token: u64,
}

/// What became of a connection.
#[derive(Debug)]
pub struct Outcome {
    /// What it was for.
    pub purpose: Purpose,
    /// Here it is, non-blocking; or why the last attempt came to nothing.
    pub result: io::Result<OwnedFd>,
}

impl Outcome {
    /// It came to nothing.
    pub fn failed(purpose: Purpose, reason: impl Into<io::Error>) -> Self {
        let result = Err(reason.into());
        Self { purpose, result }
    }
}

/// Where the addresses of a name come from: the connection's number and the name to look up. The answer
/// is [`Connects::looked_up`].
pub type LookUp = Box<dyn Fn(u32, String) -> io::Result<()> + Send>;

#[derive(Debug)]
struct Connecting {
    purpose: Purpose,
    /// The one under way is the first.
    attempts: VecDeque<Attempt>,
    /// None while a name is looked up, or a queue is full.
    socket: Option<OwnedFd>,
    /// The port of the name that is looked up.
    port: u16,
    /// When the attempt under way is given up, or made again.
    due: Instant,
    /// How often a full queue was found.
    full: u32,
    /// Why the last attempt failed.
    error: io::Error,
}

/// Connections that are being made.
pub struct Connects {
    all: HashMap<u32, Connecting>,
    due: BTreeSet<(Instant, u32)>,
    next: u32,
    look_up: LookUp,
}

/// How one attempt began.
enum Begun {
    Connected(OwnedFd),
    UnderWay(OwnedFd),
    /// The queue of the listener is full.
    Full,
}

impl Connects {
    /// None yet.
    pub fn new(look_up: LookUp) -> Self {
        Self {
            all: HashMap::new(),
            due: BTreeSet::new(),
            next: 0,
            look_up,
        }
    }

    /// Connects to the first of `attempts` that can be connected to. None: it is under way.
    pub fn begin(
        &mut self,
        purpose: Purpose,
        attempts: Vec<Attempt>,
        poller: &Poller,
    ) -> Option<Outcome> {
        let Some(id) = self.fresh_id() else {
            return Some(Outcome::failed(purpose, too_many()));
        };
        let connecting = Connecting {
            purpose,
            attempts: attempts.into(),
            socket: None,
            port: 0,
            due: Instant::now(),
            full: 0,
            error: io::ErrorKind::NotFound.into(),
        };
        self.go_on(id, connecting, poller)
    }

    /// Looks `host` up, and connects to what is found.
    pub fn look_up(&mut self, purpose: Purpose, host: &str, port: u16) -> Option<Outcome> {
        let Some(id) = self.fresh_id() else {
            return Some(Outcome::failed(purpose, too_many()));
        };
        if let Err(error) = (self.look_up)(id, host.to_owned()) {
            return Some(Outcome::failed(purpose, error));
        }
        let connecting = Connecting {
            purpose,
            attempts: VecDeque::new(),
            socket: None,
            port,
            // The lookup itself ends by then, and knows why.
            due: Instant::now() + PATIENCE + LOOK_UP_SLACK,
            full: 0,
            error: io::ErrorKind::TimedOut.into(),
        };
        self.insert(id, connecting);
        None
    }

    /// A name was looked up for the connection with this number.
    pub fn looked_up(
        &mut self,
        id: u32,
        found: io::Result<Vec<std::net::IpAddr>>,
        poller: &Poller,
    ) -> Option<Outcome> {
        let mut connecting = self.take(id)?;
        match found {
            Ok(found) => {
                let port = connecting.port;
                let found = found.into_iter().take(MAX_ATTEMPTS);
                let attempts = found.map(|ip| Attempt::Tcp(SocketAddr::new(ip, port)));
                connecting.attempts = attempts.collect();
                self.go_on(id, connecting, poller)
            }
            Err(error) => Some(Outcome::failed(connecting.purpose, error)),
        }
    }

    /// The socket of this connection is ready, or broken.
    pub fn ready(&mut self, id: u32, poller: &Poller) -> Option<Outcome> {
        let mut connecting = self.take(id)?;
        let Some(socket) = connecting.socket.take() else {
            self.insert(id, connecting);
            return None;
        };
        poller.remove(&socket);
        match sockopt::socket_error(&socket) {
            Ok(Ok(())) => Some(Outcome {
                purpose: connecting.purpose,
                result: Ok(socket),
            }),
            Ok(Err(error)) | Err(error) => {
                connecting.failed(error.into());
                self.go_on(id, connecting, poller)
            }
        }
    }

    /// When something is to be given up or tried again.
    pub fn deadline(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// Gives up what took too long, and tries again what is to be tried again.
    pub fn expire(&mut self, now: Instant, poller: &Poller) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        while let Some((at, id)) = self.due.first().copied()
            && at <= now
        {
            let Some(mut connecting) = self.take(id) else {
                self.due.remove(&(at, id));
                continue;
            };
            if let Some(socket) = connecting.socket.take() {
                poller.remove(&socket);
                connecting.failed(io::ErrorKind::TimedOut.into());
            }
            outcomes.extend(self.go_on(id, connecting, poller));
        }
        outcomes
    }

    /// Gives all of them up, as the agent has gone.
    pub fn fail(&mut self, poller: &Poller) {
        self.due.clear();
        for (_, connecting) in self.all.drain() {
            if let Some(socket) = &connecting.socket {
                poller.remove(socket);
            }
        }
    }

    /// Makes the next attempts until one is under way.
    fn go_on(&mut self, id: u32, mut connecting: Connecting, poller: &Poller) -> Option<Outcome> {
        while let Some(attempt) = connecting.attempts.front() {
            let error = match attempt.begin() {
                Ok(Begun::Connected(socket)) => {
                    return Some(Outcome {
                        purpose: connecting.purpose,
                        result: Ok(socket),
                    });
                }
                Ok(Begun::UnderWay(socket)) => {
                    match poller.add_writer(&socket, Token::Connecting(id)) {
                        Ok(()) => {
                            connecting.socket = Some(socket);
                            connecting.due = Instant::now() + PATIENCE;
                            self.insert(id, connecting);
                            return None;
                        }
                        Err(error) => error,
                    }
                }
                Ok(Begun::Full) if connecting.full < FULL_TRIES => {
                    connecting.full += 1;
                    connecting.due = Instant::now() + FULL_PAUSE;
                    self.insert(id, connecting);
                    return None;
                }
                Ok(Begun::Full) => Errno::AGAIN.into(),
                Err(error) => error,
            };
            connecting.failed(error);
        }
        Some(Outcome::failed(connecting.purpose, connecting.error))
    }

    fn fresh_id(&mut self) -> Option<u32> {
        if self.all.len() >= MAX_CONNECTING {
            return None;
        }
        while self.all.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let id = self.next;
        // An answer that comes late must not be taken for that of another.
        self.next = self.next.wrapping_add(1);
        Some(id)
    }

    fn insert(&mut self, id: u32, connecting: Connecting) {
        self.due.insert((connecting.due, id));
        self.all.insert(id, connecting);
    }

    fn take(&mut self, id: u32) -> Option<Connecting> {
        let connecting = self.all.remove(&id)?;
        self.due.remove(&(connecting.due, id));
        Some(connecting)
    }
}

impl Connecting {
    fn failed(&mut self, error: io::Error) {
        self.attempts.pop_front();
        self.error = error;
        self.full = 0;
    }
}

impl Attempt {
    fn begin(&self) -> io::Result<Begun> {
        match self {
            Self::Tcp(address) => begin_tcp(*address),
            Self::Unix(path) => begin_unix(path),
        }
    }
}

fn too_many() -> io::Error {
    io::Error::other(format!("{MAX_CONNECTING} others are being connected"))
}

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

fn begin_tcp(address: SocketAddr) -> io::Result<Begun> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = net::socket_with(family, SocketType::STREAM, FLAGS, None)?;
    // Whoever wrote decided already how much goes into one packet.
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_socket_oobinline(&socket, true)?;
    match net::connect(&socket, &address) {
        Ok(()) => Ok(Begun::Connected(socket)),
        Err(Errno::INPROGRESS) => Ok(Begun::UnderWay(socket)),
        Err(error) => Err(error.into()),
    }
}

fn begin_unix(path: &Path) -> io::Result<Begun> {
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
    match net::connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) => Ok(Begun::Connected(socket)),
        Err(Errno::AGAIN) => Ok(Begun::Full),
        Err(error) => Err(error.into()),
    }
}
