//! The host's half of a machine in the outer Linux: starts its runner there, and speaks with it.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent::protocol::{self, ExitStatus, FromSession};
use anyhow::{Context, Result, anyhow, bail};
use devices::virtio::vsock::uds::connect_out;
use vmm::Stats;

use super::wire::{FromRunner, Relay, ToRunner, Up};
use super::{Ended, Plan};
use crate::accel::join::Joiner;
use crate::accel::state::Files;
use crate::accel::tap::{self, HostTap, Offer};
use crate::accel::{client, supervisor};
use crate::event::Event;
use crate::link::{Link, Ports, Relayed};
use crate::session::Streams;
use crate::threads::spawn;
use crate::uds::Uds;

/// How long the runner may take to carry out a request: an emulator on a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long the outer Linux may take to tell why a runner has ended.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A machine in the outer Linux. Dropping it ends the machine.
#[derive(Debug)]
pub struct Outer {
    link: Link,
    requests: Mutex<Requests>,
    /// Held open for as long as the runner is to live: it ends with its session.
    _session: UnixStream,
    _tap: Option<Offer>,
    _uds: Option<Uds>,
}

/// The runner's standard input, and what it answers.
#[derive(Debug)]
struct Requests {
    input: UnixStream,
    answers: Receiver<Answer>,
}

/// What a request is answered with.
type Answer = Result<Option<Stats>, String>;

impl Outer {
    /// Starts a runner for `plan` and waits until the machine was made; it runs then.
    pub fn start(
        plan: Plan<'_>,
        reason: &str,
        tap: Option<HostTap>,
        events: &Sender<Event>,
    ) -> Result<(Self, Up)> {
        let files = Files::of_this_program()?;
        client::ensure_started(&files, Some(reason))?;
        let tap = tap.map(|tap| tap.offer(&files.socket())).transpose()?;
        let mut exec = client::this_program("runner", plan.words);
        if let Some(tap) = &tap {
            exec.env.push((tap::VARIABLE.into(), tap.variable().into()));
        }
        let streams = client::open_session(&files, reason, exec)?;
        let (stdin, mut stdout, stderr) = plumbing(&streams)?;
        spawn("runner-errors", move || copy_errors(stderr))?;
        let up = match first_word(&mut stdout, &streams.control, &files)? {
            FromRunner::Up(up) => up,
            FromRunner::Failed(reason) => bail!("{reason}"),
            other => bail!("the machine's runner makes no sense: it begins with {other:?}"),
        };
        let (answered, answers) = mpsc::channel();
        let joiner = Joiner::connect(&files.join())?;
        let ports = Ports {
            relay: up.port,
            agent: up.agent_port,
        };
        let relayed = Arc::new(Relayed::new(files.socket(), joiner, ports));
        let uds = plan.args.vsock_uds.as_deref();
        let listener = Listener {
            control: streams.control.try_clone()?,
            console: plan.console,
            events: events.clone(),
            answered,
            ports: uds.map(|path| (path.to_owned(), relayed.clone())),
        };
        spawn("runner", move || listener.listen(stdout))?;
        let uds = uds
            .map(|path| Uds::serve(path, relayed.clone()))
            .transpose()?;
        let outer = Self {
            link: Link::Relayed(relayed),
            _uds: uds,
            requests: Mutex::new(Requests {
                input: stdin,
                answers,
            }),
            _session: streams.control,
            _tap: tap,
        };
        outer.resume()?;
        Ok((outer, up))
    }

    /// The way to the guest's ports.
    pub fn link(&self) -> Link {
        self.link.clone()
    }

    /// Ends the machine now.
    pub fn stop(&self) {
        let mut requests = self.lock();
        if let Err(error) = protocol::send(&mut requests.input, &ToRunner::Stop) {
            tracing::debug!("the machine's runner has gone: {error}");
        }
    }

    /// Takes all vCPUs out of the guest.
    pub fn pause(&self) -> Result<()> {
        self.ask(&ToRunner::Pause).map(drop)
    }

    /// Lets the vCPUs run.
    pub fn resume(&self) -> Result<()> {
        self.ask(&ToRunner::Resume).map(drop)
    }

    /// A stream into the serial console.
    pub fn console_input(&self) -> Result<UnixStream> {
        let Link::Relayed(relayed) = &self.link else {
            bail!("the machine has no relay");
        };
        relayed
            .open(&Relay::ConsoleInput)
            .context("the machine's console cannot be reached")
    }

    /// What the machine has used.
    pub fn stats(&self) -> Result<Stats> {
        self.ask(&ToRunner::Stats)?
            .context("the machine's runner makes no sense")
    }

    fn ask(&self, request: &ToRunner) -> Result<Option<Stats>> {
        let mut requests = self.lock();
        protocol::send(&mut requests.input, request)
            .context("the machine's runner has gone")
            .and_then(|()| match requests.answers.recv_timeout(PATIENCE) {
                Ok(answer) => answer.map_err(|reason| anyhow!(reason)),
                Err(_) => bail!("the machine's runner does not answer"),
            })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Requests> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn plumbing(streams: &Streams) -> Result<(UnixStream, UnixStream, UnixStream)> {
    let [Some(stdin), Some(stdout), Some(stderr)] =
        [&streams.stdin, &streams.stdout, &streams.stderr]
    else {
        bail!("the machine's runner lacks a stream");
    };
    Ok((stdin.try_clone()?, stdout.try_clone()?, stderr.try_clone()?))
}

/// What the runner says in its library's warnings is for the user.
fn copy_errors(mut from: UnixStream) {
    if let Err(error) = io::copy(&mut from, &mut io::stderr()) {
        tracing::debug!("the runner's messages cannot be passed on: {error}");
    }
}

/// The runner's first message, or why there is none.
fn first_word(
    stdout: &mut UnixStream,
    mut control: &UnixStream,
    files: &Files,
) -> Result<FromRunner> {
    if let Ok(Some(word)) = protocol::receive::<FromRunner>(stdout) {
        return Ok(word);
    }
    loop {
        match protocol::receive(&mut control) {
            Ok(Some(FromSession::Started { .. })) => {}
            Ok(Some(FromSession::Refused { message, .. })) => {
                bail!("mvm cannot be run in the outer Linux: {message}")
            }
            Ok(Some(FromSession::Exited(status))) => {
                bail!("the machine's runner ended at once ({status:?})")
            }
            Ok(None) | Err(_) => match supervisor::last_words(files) {
                Some(words) => bail!("the outer Linux ended unexpectedly:\n  {words}"),
                None => bail!("the outer Linux ended unexpectedly"),
            },
        }
    }
}

/// Why a runner says no more.
fn fate(mut control: &UnixStream) -> String {
    // A timeout that cannot be set is not worth a word beside what has happened.
    let _ = control.set_read_timeout(Some(LAST_WORDS));
    loop {
        match protocol::receive(&mut control) {
            Ok(Some(FromSession::Exited(ExitStatus::Signal(signal)))) => {
                return format!(
                    "the machine's process in the outer Linux was killed by signal {signal}"
                );
            }
            Ok(Some(FromSession::Exited(ExitStatus::Code(code)))) => {
                return format!("the machine's process in the outer Linux ended with code {code}");
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => {
                return "the outer Linux ended, and the machine with it".to_owned();
            }
        }
    }
}

/// Where the runner's messages go.
struct Listener {
    /// The runner's session.
    control: UnixStream,
    console: Box<dyn Write + Send>,
    events: Sender<Event>,
    answered: Sender<Answer>,
    /// Where the ports of the host are that the guest may connect to, and the way back.
    ports: Option<(PathBuf, Arc<Relayed>)>,
}

impl Listener {
    /// Connects a guest that wants a port of the host to whoever listens there.
    fn answer(&self, port: u32, number: u64) {
        let Some((path, relayed)) = &self.ports else {
            return;
        };
        let answered = match connect_out(path, port) {
            Some(stream) => relayed.accept(number, stream),
            None => relayed.refuse(number),
        };
        if let Err(error) = answered {
            tracing::debug!("the guest does not hear of port {port}: {error}");
        }
    }

    fn listen(mut self, mut from: UnixStream) {
        let ended = loop {
            match protocol::receive(&mut from) {
                Ok(Some(FromRunner::Hello(hello))) => drop(self.events.send(Event::Hello(hello))),
                Ok(Some(FromRunner::Console(bytes))) => drop(self.console.write_all(&bytes)),
                Ok(Some(FromRunner::Done(answer))) => {
                    drop(self.answered.send(answer.map(|()| None)));
                }
                Ok(Some(FromRunner::Stats(stats))) => drop(self.answered.send(Ok(Some(stats)))),
                Ok(Some(FromRunner::Asked { port, number })) => self.answer(port, number),
                Ok(Some(FromRunner::Ended(ended))) => break ended,
                Ok(Some(FromRunner::Failed(reason))) => break Ended::Failed(reason),
                Ok(Some(FromRunner::Up(_))) => {}
                Ok(None) | Err(_) => break Ended::Failed(fate(&self.control)),
            }
        };
        let _ = self.events.send(Event::Machine(ended));
        // What the console printed last comes after the machine's end.
        while let Ok(Some(message)) = protocol::receive(&mut from) {
            if let FromRunner::Console(bytes) = message {
                drop(self.console.write_all(&bytes));
            }
        }
    }
}
