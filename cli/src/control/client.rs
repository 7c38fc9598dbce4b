//! The other end of a machine's control socket: how mvm's verbs reach a machine that runs.

use std::io;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use agent::protocol as agent_protocol;
use anyhow::{Context, Result, anyhow, bail};

use super::protocol::{self, Answer, ControlError, ErrorKind, Op, Outcome, Reply, Request};
use crate::store::{Ending, Name, Standing, Store};

/// How long an owner may take to answer what it can answer at once.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often an owner is tried that does not listen yet.
const POLL: Duration = Duration::from_millis(20);

/// A connection to the owner of a machine.
#[derive(Debug)]
pub struct Client {
    name: Name,
    stream: UnixStream,
    /// For what can be answered at once.
    patience: Duration,
}

impl Client {
    /// Connects to the owner of the machine `name`; fails with a sentence where it does not run.
    pub fn connect(store: &Store, name: &Name) -> Result<Self> {
        Self::connect_within(store, name, PATIENCE)
    }

    /// As [`Client::connect`], for one who waits no longer than `patience` for each answer either.
    pub fn connect_within(store: &Store, name: &Name, patience: Duration) -> Result<Self> {
        store.check_exists(name)?;
        let deadline = Instant::now() + patience;
        loop {
            match store.connect(name, patience) {
                Ok(stream) => {
                    stream.set_write_timeout(Some(patience))?;
                    return Ok(Self {
                        name: name.clone(),
                        stream,
                        patience,
                    });
                }
                Err(error)
                    if is_absent(&error) && store.is_owned(name) && Instant::now() < deadline =>
                {
                    thread::sleep(POLL);
                }
                Err(error) => return Err(unreachable(store, name, error)),
            }
        }
    }

    /// Asks for `op` and waits for the answer, as long as what is asked for takes.
    pub fn ask(&mut self, op: Op) -> Result<Answer> {
        let patience = match op {
            Op::Wait => None,
            // After force there is some writing out to do.
            // The guest has to do something, and an emulated one is slow.
            Op::MountAdd { .. } | Op::MountRm { .. } => Some(self.patience * 12),
            Op::Stop { timeout } => Some(self.patience * 3 + Duration::from_secs(timeout.into())),
            _ => Some(self.patience),
        };
        self.stream.set_read_timeout(patience)?;
        let name = &self.name;
        let sent = match protocol::send(&self.stream, &Request::from(op)) {
            // An owner that has no room for a connection says so and closes it, whatever was asked.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            sent => sent,
        };
        let reply = sent.and_then(|()| protocol::receive::<Reply>(&self.stream));
        let reply = match reply {
            Ok(Some(reply)) => reply,
            Ok(None) => bail!("machine {name} ended before it answered"),
            Err(error) if is_timeout(&error) => bail!(
                "the process that owns machine {name} does not answer: end it with `mvm rm -f {name}`"
            ),
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("the connection to machine {name} broke"));
            }
        };
        match reply.outcome {
            Outcome::Ok(answer) => Ok(answer),
            Outcome::Error(error) => Err(self.explain(error, reply.version)),
        }
    }

    /// An error as it is told to a person.
    fn explain(&self, error: ControlError, version: u32) -> anyhow::Error {
        let name = &self.name;
        match error.kind {
            ErrorKind::Version | ErrorKind::UnknownOp => anyhow!(
                "machine {name} is run by another version of mvm, which speaks version {version} of the control \
                 protocol ({}): restart it with `mvm restart {name}`",
                error.message
            ),
            _ => anyhow!("machine {name}: {}", error.message),
        }
    }

    /// Turns the connection into one to vsock port `port` of the guest.
    pub fn into_guest(mut self, port: u32) -> Result<UnixStream> {
        let answer = self.ask(Op::Connect { port })?;
        let Answer::Connected { agent } = answer else {
            return Err(self.unexpected(&answer));
        };
        if port == agent_protocol::AGENT_PORT && agent != agent_protocol::VERSION {
            let name = &self.name;
            bail!(
                "machine {name} was started by another version of mvm, whose agent this one cannot talk to: \
                 use that version, or restart the machine with `mvm restart {name}`"
            );
        }
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(None)?;
        Ok(self.stream)
    }

    /// The error of an answer that belongs to another question.
    pub fn unexpected(&self, answer: &Answer) -> anyhow::Error {
        anyhow!(
            "the process that owns machine {} answered something else: {answer:?}",
            self.name
        )
    }
}

/// Asks the owner of the machine `name` for `op`, on a connection of its own.
pub fn ask(store: &Store, name: &Name, op: Op) -> Result<Answer> {
    Client::connect(store, name)?.ask(op)
}

/// Opens a connection to the agent of the machine that is called `name`.
pub fn agent(name: &str) -> Result<UnixStream> {
    let name: Name = name.parse()?;
    Client::connect(&Store::open()?, &name)?.into_guest(agent_protocol::AGENT_PORT)
}

/// Why the owner of a machine that exists is not reached.
fn unreachable(store: &Store, name: &Name, error: io::Error) -> anyhow::Error {
    match store.standing(name) {
        Err(error) => error.context(format!("machine {name}")),
        Ok(Standing::Ended(ending)) => anyhow!("{}", stopped(name, Some(&ending))),
        Ok(Standing::Killed) => anyhow!("{}", stopped(name, None)),
        Ok(Standing::Owned) if is_absent(&error) => {
            anyhow!("machine {name} is just starting or ending: try again in a moment")
        }
        Ok(Standing::Owned) => match error.kind() {
            io::ErrorKind::PermissionDenied => {
                anyhow!("machine {name} belongs to another user")
            }
            io::ErrorKind::TimedOut => anyhow!(
                "the process that owns machine {name} does not answer: end it with `mvm rm -f {name}`"
            ),
            _ => anyhow::Error::new(error).context(format!("machine {name} cannot be reached")),
        },
    }
}

fn stopped(name: &Name, ending: Option<&Ending>) -> String {
    let how = match ending {
        None => "was killed",
        Some(ending) if ending.error.is_some() => "has failed",
        Some(_) => "has ended",
    };
    format!("machine {name} {how}: start it with `mvm start {name}`")
}

/// Whether nobody listens: the owner does not yet, or no more.
fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}
