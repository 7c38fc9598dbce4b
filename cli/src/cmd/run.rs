//! `mvm run`: one machine, one command, one exit code.

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use agent::protocol::{self, AGENT_PORT, FromSession, Hello, Open, Refusal};
use anyhow::{Context, Result, anyhow, bail};
use kernels::cache::Cache;
use signal_hook::consts::{SIGKILL, SIGTERM, SIGWINCH};

use crate::accel::tap::HostTap;
use crate::accel::{self, Choice};
use crate::args::{Net, RunArgs};
use crate::console::{Console, Tail};
use crate::event::{self, Event};
use crate::instance::{Ended, Instance, Plan};
use crate::link::Link;
use crate::session::Session;
use crate::terminal::{self, RawMode};
use crate::timing::Timing;
use crate::{cmd, name, prepare, resolve};

/// Between a request to end and the use of force.
const GRACE: Duration = Duration::from_secs(10);

/// What remaining processes get to end by themselves when the command has ended, in milliseconds.
const POWER_OFF_GRACE_MS: u32 = 2000;

/// The exit code of a command that --timeout ended, as with timeout(1).
const TIMED_OUT: i32 = 124;

/// Console lines shown when a machine fails.
const LINES_SHOWN: usize = 20;

/// Runs the machine that `args` describe; `words` are the same as typed, without `mvm run`.
pub fn run(args: &RunArgs, words: &[OsString]) -> Result<ExitCode> {
    let timing = Timing::start();
    let cache = Cache::open()?;
    if !accel::is_outer() {
        prepare::machine(args, &cache)?;
    }
    let choice = accel::choose(args.host.accel)?;
    if let Choice::Tcg { .. } = choice {
        prepare::outer(args.host.yes, &cache)?;
    }
    let _claim = args.name.as_deref().map(name::claim).transpose()?;
    let (events, inbox) = mpsc::channel();
    // From here on a signal ends the machine in an orderly way.
    event::watch_signals(events.clone()).context("signals cannot be watched")?;
    let tail = Tail::default();
    let plan = Plan {
        args,
        words,
        cache: &cache,
        console: Box::new(Console::new(tail.clone(), console_watcher(args))),
    };
    let machine = launch(plan, choice, &events)?;
    let mut running = Running {
        args,
        machine,
        tail,
        events,
        inbox,
        timing,
        deadline: None,
        signalled: None,
    };
    running.timing.set_up = Some(running.machine.set_up());
    running.timing.launched = Some(Instant::now());
    let code = if args.console || args.initrd.is_some() {
        running.attend_console()
    } else {
        running.attend_command()
    };
    running.machine.stop();
    running.timing.ended = Some(Instant::now());
    if args.timing {
        eprint!("{}", running.timing);
    }
    Ok(ExitCode::from(
        u8::try_from(code? & 0xff).unwrap_or(u8::MAX),
    ))
}

/// Makes the machine where `choice` says, and lets it run.
fn launch(plan: Plan<'_>, choice: Choice, events: &Sender<Event>) -> Result<Instance> {
    match choice {
        Choice::Kvm => Instance::here(plan, events),
        Choice::Tcg { reason } => {
            let tap = match &plan.args.net {
                Net::None => None,
                Net::Tap(name) => Some(HostTap::open(name)?),
            };
            Instance::in_outer_linux(plan, &reason, tap, events)
        }
    }
}

/// Who watches the serial console: standard output where it is the interface, standard error beside a command.
fn console_watcher(args: &RunArgs) -> Option<Box<dyn std::io::Write + Send>> {
    if args.console || args.initrd.is_some() {
        Some(Box::new(std::io::stdout()))
    } else if args.verbose {
        Some(Box::new(std::io::stderr()))
    } else {
        None
    }
}

/// A machine that runs, and who waits for what it does.
struct Running<'a> {
    args: &'a RunArgs,
    machine: Instance,
    tail: Tail,
    events: Sender<Event>,
    inbox: Receiver<Event>,
    timing: Timing,
    /// When patience ends.
    deadline: Option<Instant>,
    /// The first signal that asked for the end.
    signalled: Option<i32>,
}

/// How far a command's session has come.
#[derive(Default)]
struct Progress {
    code: Option<i32>,
    outputs_done: usize,
    /// --timeout struck: its exit code counts, whatever the command's is.
    timed_out: bool,
}

impl Running<'_> {
    /// The next event; None when the deadline has passed.
    fn next(&self) -> Option<Event> {
        let received = match self.deadline {
            None => self
                .inbox
                .recv()
                .map_err(|_| RecvTimeoutError::Disconnected),
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                self.inbox.recv_timeout(left)
            }
        };
        // `self.events` keeps the channel connected, so the only error is the timeout.
        received.ok()
    }

    /// The serial console is the interface; the machine's end is the end.
    fn attend_console(&mut self) -> Result<i32> {
        let _raw = RawMode::enter().context("the terminal cannot be put into raw mode")?;
        if terminal::stdin_is_ours() {
            cmd::console::feed(self.machine.keyboard()?, &self.events)?;
        }
        self.deadline = self.args.timeout.map(|timeout| Instant::now() + timeout);
        loop {
            match self.next() {
                None => return Ok(TIMED_OUT),
                Some(Event::Signal(SIGWINCH)) => {}
                Some(Event::Signal(signal)) => return Ok(128 + signal),
                Some(Event::Machine(Ended::Failed(reason))) => return Err(anyhow!(reason)),
                Some(Event::Machine(_)) => return Ok(0),
                Some(_) => {}
            }
        }
    }

    /// Boots, runs the command, powers off.
    fn attend_command(&mut self) -> Result<i32> {
        if let Some(code) = self.await_agent()? {
            return Ok(code);
        }
        let link = self.machine.link()?;
        let session = Session::start(&link, resolve::exec(self.args), &self.events)
            .context("the guest's agent cannot be reached")?;
        let code = self.await_command(session)?;
        self.power_off(&link);
        Ok(code)
    }

    /// Waits until the agent is ready; an exit code where a signal came first.
    fn await_agent(&mut self) -> Result<Option<i32>> {
        self.deadline = Some(Instant::now() + self.args.boot_timeout);
        loop {
            match self.next() {
                None => {
                    return Err(self.failure(&format!(
                        "the guest was not up after {}: see what it waits for with --verbose, or \
                         give it longer with --boot-timeout",
                        humantime::format_duration(self.args.boot_timeout)
                    )));
                }
                Some(Event::Hello(Hello::Ready {
                    version,
                    agent_started_ns,
                    agent_ready_ns,
                    ..
                })) => {
                    if version != protocol::VERSION {
                        bail!("the guest's agent is of another version of mvm");
                    }
                    let started = Duration::from_nanos(agent_started_ns);
                    self.timing.ready = Some(Instant::now());
                    self.timing.agent = Duration::from_nanos(agent_ready_ns).checked_sub(started);
                    return Ok(None);
                }
                Some(Event::Hello(Hello::Failed(reason))) => {
                    return Err(anyhow!("the guest cannot be used: {reason}"));
                }
                Some(Event::Machine(ended)) => return Err(self.ended_early(ended)),
                Some(Event::Signal(SIGWINCH)) => {}
                Some(Event::Signal(signal)) => return Ok(Some(128 + signal)),
                Some(_) => {}
            }
        }
    }

    fn await_command(&mut self, mut session: Session) -> Result<i32> {
        let mut progress = Progress::default();
        let mut raw = None;
        self.deadline = self.args.timeout.map(|timeout| Instant::now() + timeout);
        loop {
            match self.next() {
                None if progress.timed_out || self.signalled.is_some() => {
                    // It was asked to end and did not.
                    return Ok(if progress.timed_out {
                        TIMED_OUT
                    } else {
                        128 + SIGKILL
                    });
                }
                None => {
                    progress.timed_out = true;
                    self.ask_to_end(&mut session, SIGTERM);
                }
                Some(Event::Signal(SIGWINCH)) => {
                    ignore_gone(session.resize(terminal::window_size()));
                }
                Some(Event::Signal(signal)) => {
                    if self.signalled.is_some() {
                        return Ok(128 + signal);
                    }
                    self.signalled = Some(signal);
                    self.ask_to_end(&mut session, signal);
                }
                Some(Event::Session(Some(FromSession::Started { .. }))) => {
                    // Not before the guest's program is there to receive the keys.
                    if session.has_terminal() {
                        raw =
                            RawMode::enter().context("the terminal cannot be put into raw mode")?;
                    }
                }
                Some(Event::Session(Some(FromSession::Refused { reason, message }))) => {
                    eprintln!("mvm: {message}");
                    return Ok(refusal_code(reason));
                }
                Some(Event::Session(Some(FromSession::Exited(status)))) => {
                    self.timing.exited = Some(Instant::now());
                    progress.code = Some(status.shell_code());
                }
                Some(Event::OutputDone) => progress.outputs_done += 1,
                Some(Event::Machine(ended)) => {
                    drop(raw.take());
                    if let (Some(code), Ended::PowerOff) = (progress.code, &ended) {
                        return Ok(code);
                    }
                    if self.args.command.is_empty() && ended == Ended::PowerOff {
                        return Ok(0);
                    }
                    return Err(self.ended_early(ended));
                }
                // Either its machine is ending, which is told in a moment, or it was asked to.
                Some(Event::Session(None)) => {
                    self.deadline.get_or_insert(Instant::now() + GRACE);
                }
                Some(Event::Hello(_)) => {}
            }
            if let Some(code) = progress.code
                && progress.outputs_done == session.outputs()
            {
                self.timing.first_output = session.first_output();
                return Ok(if progress.timed_out { TIMED_OUT } else { code });
            }
        }
    }

    fn ask_to_end(&mut self, session: &mut Session, signal: i32) {
        ignore_gone(session.signal(signal));
        self.deadline = Some(Instant::now() + GRACE);
    }

    /// Lets the guest write out what it has to; force when it takes too long.
    fn power_off(&mut self, link: &Link) {
        if !self.machine.writes() {
            return;
        }
        let asked = link.connect(AGENT_PORT).and_then(|stream| {
            let grace_ms = POWER_OFF_GRACE_MS;
            protocol::send(&stream, &Open::PowerOff { grace_ms }).map(|()| stream)
        });
        let Ok(_asked) = asked else { return };
        self.deadline = Some(Instant::now() + GRACE);
        while let Some(event) = self.next() {
            match event {
                Event::Machine(_) => return,
                Event::Signal(signal) if signal != SIGWINCH => return,
                _ => {}
            }
        }
        tracing::warn!("the guest did not power off in time and was stopped");
    }

    /// The machine ended while something was still expected of it.
    fn ended_early(&self, ended: Ended) -> anyhow::Error {
        match ended {
            Ended::PowerOff => self.failure("the guest powered off before the command ended"),
            Ended::Reset => match self.tail.panic(LINES_SHOWN) {
                Some((reason, lines)) => {
                    self.with_console(&format!("the guest's kernel panicked: {reason}"), &lines)
                }
                None => self.failure("the guest rebooted before the command ended"),
            },
            Ended::Stopped => self.failure("the machine was stopped"),
            Ended::Failed(reason) => self.failure(&reason),
        }
    }

    /// An error with the last lines of the console below it.
    fn failure(&self, message: &str) -> anyhow::Error {
        self.with_console(message, &self.tail.last_lines(LINES_SHOWN))
    }

    fn with_console(&self, message: &str, lines: &[String]) -> anyhow::Error {
        if lines.is_empty() || self.args.verbose {
            return anyhow!("{message}");
        }
        anyhow!("{message}\nFrom its console:\n  {}", lines.join("\n  "))
    }
}

/// What is said to a session that has just ended is of no interest to anybody.
fn ignore_gone(result: std::io::Result<()>) {
    if let Err(error) = result {
        tracing::debug!("the session has gone: {error}");
    }
}

/// The exit code of a command that could not be started, as shells give it.
pub fn refusal_code(reason: Refusal) -> i32 {
    match reason {
        Refusal::NotFound => 127,
        Refusal::NotExecutable => 126,
        Refusal::Other => 125,
    }
}
