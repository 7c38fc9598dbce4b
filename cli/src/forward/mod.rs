//! The host's side of port forwarding: what the host publishes of the guest, what the guest may reach of
//! the host, and connections that others ask for.
//!
//! The process that owns a machine owns one [`Forwarder`]:
//!
//! 1. [`Forwarder::new`] takes the host's ports, before the machine boots: what is in the way shows at
//!    once. Nothing listens yet, so connections are refused.
//! 2. [`Forwarder::attach`], when the agent is up, and again whenever a new one is. TCP ports listen from
//!    now on while the guest does. When the connection to the agent is lost, all that hangs on it is
//!    undone until the next attach.
//! 3. [`Forwarder::publish`], [`Forwarder::reverse`], [`Forwarder::remove`], [`Forwarder::remove_reverse`],
//!    [`Forwarder::set_auto`], [`Forwarder::list`] and [`Forwarder::offer_ssh_agent`] at any time;
//!    [`Forwarder::dial`] and its kin for connections without a port of the host.
//! 4. [`Forwarder::end`], or dropping the last clone, gives the host's ports and socket files back.
//!
//! One thread does all of it (`hub`), and no byte of a TCP connection passes through it: an accepted
//! connection is joined to one of the guest by whoever moves bytes to and from guest memory ([`Guest`]).
//! What is removed takes no more connections; those that run go on.

mod announce;
mod auto;
mod connect;
mod control;
mod datagrams;
mod dial;
mod error;
mod framed;
mod hub;
mod listener;
mod names;
mod occupant;
mod poll;
mod ports;
pub mod proxy;
mod published;
mod reverse;
pub mod spec;

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use agent::protocol::{MAX_FRAME, Open, Target, ToForwarder};
use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

pub use self::announce::Announcement;
pub use self::auto::Auto;
pub use self::dial::{DialDone, Dialed};
use self::error::BindError;
pub use self::error::ForwardError;
use self::hub::Hub;
use self::reverse::Wish;
use self::spec::{Protocol, Publish, Reverse};
use crate::link::AgentLink;

/// The way to the agent of one guest. Neither call may block for long.
pub trait Guest: Send + Sync {
    /// Opens a connection to the agent.
    fn connect(&self) -> io::Result<UnixStream>;

    /// Opens a connection to the agent, sends `prelude`, and makes the connection one with `stream` from
    /// there on, half-closes and resets included. Where the guest refuses, `stream` is reset.
    fn join(&self, prelude: Vec<u8>, stream: OwnedFd) -> io::Result<()>;
}

impl Guest for AgentLink {
    fn connect(&self) -> io::Result<UnixStream> {
        Self::connect(self)
    }

    fn join(&self, prelude: Vec<u8>, stream: OwnedFd) -> io::Result<()> {
        Self::join(self, prelude, stream)
    }
}

/// What is forwarded from the start.
#[derive(Debug, Clone, Default)]
pub struct Declarations {
    /// What the host publishes of the guest.
    pub publish: Vec<Publish>,
    /// What the guest reaches of the host.
    pub reverse: Vec<Reverse>,
    /// Publish whatever listens in the guest.
    pub auto: Option<Auto>,
    /// Where in the guest the caller's SSH agent is to be, an absolute path.
    pub ssh_agent: Option<PathBuf>,
}

/// One forward, for listing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// Which way, and why.
    pub kind: Kind,
    /// What is carried.
    pub protocol: Protocol,
    /// The host's end, as it is typed.
    pub host: String,
    /// The guest's end, as it is typed.
    pub guest: String,
    /// Whether something answers behind it; None where that is not known before a connection is made.
    pub answers: Option<bool>,
    /// Connections (for UDP: flows) so far.
    pub connections: u64,
}

/// What kind of forward it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The guest's, published as it was asked for.
    Published,
    /// The guest's, published because it listens.
    Auto,
    /// The host's, which the guest may reach.
    Reverse,
    /// The caller's SSH agent, which the guest may reach.
    SshAgent,
}

/// Forwards that were added.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Added {
    /// One for each port.
    pub forwards: Vec<Forward>,
    /// One sentence to be shown; only the first wide forward of a machine has it.
    pub warning: Option<String>,
}

/// The forwards of one machine; clones are handles to the same.
#[derive(Debug, Clone)]
pub struct Forwarder {
    shared: Arc<Shared>,
}

struct Shared {
    commands: mpsc::Sender<Command>,
    wake: OwnedFd,
    guest: Mutex<Option<Arc<dyn Guest>>>,
    /// Whether it was said that others can reach the guest.
    warned: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Where a command's answer goes.
type Reply<T> = SyncSender<T>;

/// What is asked of the forwarder's thread.
enum Command {
    Attach(Arc<dyn Guest>, UnixStream),
    Publish(Publish, Reply<Result<Vec<Forward>, BindError>>),
    Remove(Publish, Reply<Vec<Forward>>),
    SetAuto(Option<Auto>),
    Reverse(Wish, Reply<Result<Forward, ForwardError>>),
    RemoveReverse(Reverse, Reply<Option<Forward>>),
    AwaitReverses(Reply<()>),
    OfferSshAgent(PathBuf),
    /// The addresses of a name, for the connection with this number.
    LookedUp(u32, io::Result<Vec<IpAddr>>),
    List(Reply<Vec<Forward>>),
    Dial {
        target: Target,
        done: DialDone,
    },
    Tell(ToForwarder),
    End,
}

impl Forwarder {
    /// Takes what of the host is declared, all of it or nothing; `announce` hears what happens later and
    /// must not block.
    pub fn new(
        declarations: Declarations,
        announce: impl Fn(Announcement) + Send + 'static,
    ) -> Result<Self, ForwardError> {
        let wake =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(io::Error::from)?;
        let (commands, receiver) = mpsc::channel();
        let look_up = names::in_threads(commands.clone(), wake.try_clone()?)?;
        let mut hub = Hub::new(receiver, wake.try_clone()?, Box::new(announce), look_up)?;
        for publish in &declarations.publish {
            hub.publish(publish).map_err(BindError::explain)?;
        }
        let listed = declarations.reverse.into_iter().map(Wish::Listed);
        let ssh_agent = declarations.ssh_agent.into_iter().map(Wish::SshAgent);
        for wish in listed.chain(ssh_agent) {
            hub.declare(wish)?;
        }
        hub.set_auto(declarations.auto);
        let shared = Arc::new(Shared {
            commands,
            wake,
            guest: Mutex::new(None),
            warned: AtomicBool::new(false),
            thread: Mutex::new(None),
        });
        let forwarder = Self { shared };
        hub.shared = Arc::downgrade(&forwarder.shared);
        if let Some(warning) = forwarder.warning(&declarations.publish) {
            hub.announcer.say(Announcement::Warning(warning));
        }
        let thread = thread::Builder::new().name("forward".into());
        let thread = thread.spawn(move || hub.run())?;
        *lock(&forwarder.shared.thread) = Some(thread);
        Ok(forwarder)
    }

    /// Connects to the agent, in place of the one that was there: forwards work from now on.
    pub fn attach(&self, guest: impl Guest + 'static) -> io::Result<()> {
        let guest: Arc<dyn Guest> = Arc::new(guest);
        let mut control = guest.connect()?;
        agent::protocol::send(&mut control, &Open::Forward)?;
        *lock(&self.shared.guest) = Some(guest.clone());
        let _ = self.send(Command::Attach(guest, control));
        Ok(())
    }

    /// Publishes ports of the guest, all of them or none.
    pub fn publish(&self, publish: &Publish) -> Result<Added, ForwardError> {
        let forwards = self
            .ask(|reply| Command::Publish(publish.clone(), reply))?
            .map_err(BindError::explain)?;
        let warning = self.warning(std::slice::from_ref(publish));
        Ok(Added { forwards, warning })
    }

    /// Takes published ports away, also those that were published because the guest listened; connections
    /// that run go on. Returns what was taken away.
    ///
    /// What `publish` leaves out (address, host port) may be any. A port alone is one of the guest, or
    /// where no such port is published, one of the host.
    pub fn remove(&self, publish: &Publish) -> Result<Vec<Forward>, ForwardError> {
        let removed = self.ask(|reply| Command::Remove(publish.clone(), reply))?;
        match removed.is_empty() {
            true => Err(ForwardError::NoSuchForward(publish.to_string())),
            false => Ok(removed),
        }
    }

    /// Publishes whatever listens in the guest from now on, or no more.
    pub fn set_auto(&self, auto: Option<Auto>) -> Result<(), ForwardError> {
        self.send(Command::SetAuto(auto))
            .map_err(|_| ForwardError::Ended)
    }

    /// Lets the guest reach something of the host. Where the agent is up this waits until the guest
    /// listens, and fails where it cannot.
    pub fn reverse(&self, reverse: &Reverse) -> Result<Forward, ForwardError> {
        self.ask(|reply| Command::Reverse(Wish::Listed(reverse.clone()), reply))?
    }

    /// Waits until the guest listens for all that was declared, or has said for which it cannot; seconds, where its
    /// agent says nothing.
    pub fn await_reverses(&self) {
        // Where the forwarder has ended, nobody waits for it.
        let _ = self.ask(Command::AwaitReverses);
    }

    /// Takes it away; connections that run go on.
    pub fn remove_reverse(&self, reverse: &Reverse) -> Result<Forward, ForwardError> {
        let removed = self.ask(|reply| Command::RemoveReverse(reverse.clone(), reply))?;
        removed.ok_or_else(|| ForwardError::NoSuchForward(reverse.to_string()))
    }

    /// Says where the SSH agent of a user of the machine listens: SSH_AUTH_SOCK, an absolute path. The one
    /// that was offered last and answers is what the guest reaches.
    pub fn offer_ssh_agent(&self, path: impl Into<PathBuf>) {
        // Where the machine has ended, nobody needs it.
        let _ = self.send(Command::OfferSshAgent(path.into()));
    }

    /// All forwards there are.
    pub fn list(&self) -> Result<Vec<Forward>, ForwardError> {
        self.ask(Command::List)
    }

    /// Gives back all that was taken of the host. Connections that run go on; nothing else works any more.
    pub fn end(&self) {
        self.shared.end();
    }

    /// The warning that is due for these, once for a machine.
    fn warning(&self, publish: &[Publish]) -> Option<String> {
        let wide = publish.iter().find(|publish| publish.is_wide())?;
        let first = !self.shared.warned.swap(true, Ordering::Relaxed);
        first.then(|| {
            format!("{wide} lets other computers reach the guest, not just programs of this one")
        })
    }

    fn guest(&self) -> io::Result<Arc<dyn Guest>> {
        let guest = lock(&self.shared.guest).clone();
        guest.ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotConnected, "the machine's agent is not up")
        })
    }

    fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, ForwardError> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(command(reply)).map_err(|_| ForwardError::Ended)?;
        answer.recv().map_err(|_| ForwardError::Ended)
    }

    fn send(&self, command: Command) -> Result<(), Command> {
        self.shared.send(command)
    }
}

impl Shared {
    /// Gives the command back where the forwarder has ended.
    fn send(&self, command: Command) -> Result<(), Command> {
        self.commands.send(command).map_err(|error| error.0)?;
        // Fails only on a counter that is full, and then the thread is woken already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        Ok(())
    }

    fn end(&self) {
        let thread = lock(&self.thread).take();
        let _ = self.send(Command::End);
        if let Some(thread) = thread
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the port forwarder's thread panicked");
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.end();
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// What is behind these locks is replaced as a whole, so a panic leaves nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One message as it goes over the wire.
fn frame<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut frame = Vec::new();
    agent::protocol::send(&mut frame, message)?;
    debug_assert!(frame.len() <= MAX_FRAME + 4);
    Ok(frame)
}

#[cfg(test)]
mod tests;
