//! What is done with a machine from its first instruction to its end: one loop that waits for events.

use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use agent::protocol::{self, Exec, FromSession, Hello};
use anyhow::{Context, Result, anyhow, bail};
use signal_hook::consts::{SIGKILL, SIGTERM, SIGWINCH};

use super::{Mode, Owned, declare};
use crate::console::Tail;
use crate::control::protocol::State;
use crate::event::Event;
use crate::foreground::{ignore_gone, refusal_code};
use crate::instance::Ended;
use crate::link::{self, AgentLink, Link};
use crate::session::{Output, Session};
use crate::terminal::{self, RawMode};
use crate::timing::Timing;
use crate::{cmd, resolve, supervise};

/// Between a request to end and the use of force.
const GRACE: Duration = Duration::from_secs(10);

/// What remaining processes get to end by themselves when the command has ended.
const POWER_OFF_GRACE: Duration = Duration::from_secs(2);

/// The exit code of a command that --timeout ended, as with timeout(1).
const TIMED_OUT: i32 = 124;

/// Why a machine without a root is ended.
const ORPHANED: &str =
    "the guest lost its root, as the agent that carries it was killed there, and did not power off";

/// Console lines shown when a machine fails.
const LINES_SHOWN: usize = 20;

/// Console lines shown of a kernel's panic: the fault, its registers and its calls.
const PANIC_LINES_SHOWN: usize = 60;

/// The loop that waits for what a machine does, and decides.
pub struct Attendant {
    machine: Arc<Owned>,
    mode: Mode,
    tail: Tail,
    inbox: Receiver<Event>,
    timing: Timing,
    output: Output,
    /// When patience ends.
    deadline: Option<Instant>,
    /// The first signal that asked for the end.
    signalled: Option<i32>,
    /// The guest has lost its root.
    orphaned: bool,
}

/// How far a command's session has come.
#[derive(Default)]
struct Progress {
    code: Option<i32>,
    outputs_done: usize,
    /// --timeout struck: its exit code counts, whatever the command's is.
    timed_out: bool,
}

impl Attendant {
    /// One for a machine that was just made.
    pub fn new(
        machine: Arc<Owned>,
        mode: Mode,
        tail: Tail,
        inbox: Receiver<Event>,
        mut timing: Timing,
        output: Output,
    ) -> Self {
        timing.set_up = Some(machine.instance.set_up());
        timing.launched = Some(Instant::now());
        Self {
            machine,
            mode,
            tail,
            inbox,
            timing,
            output,
            deadline: None,
            signalled: None,
            orphaned: false,
        }
    }

    /// Stays until the machine is to end; returns the exit code.
    pub fn attend(&mut self) -> Result<i32> {
        let code = self.attend_machine();
        // Whoever waits for the end finds all the output.
        self.output.flush();
        code
    }

    fn attend_machine(&mut self) -> Result<i32> {
        if self.machine.args.console || self.machine.args.initrd.is_some() {
            return self.attend_console();
        }
        if let Some(code) = self.await_agent()? {
            return Ok(code);
        }
        let link = self.machine.instance.link()?;
        let code = self.attend_guest(&link)?;
        *self.machine.state() = State::Stopping;
        self.power_off(&link);
        Ok(code)
    }

    /// Shows where the time went, where that was asked for; to be called when the machine has ended.
    pub fn report(&mut self) {
        self.timing.ended = Some(Instant::now());
        if self.machine.args.timing {
            eprint!("{}", self.timing);
        }
    }

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
        // The machine keeps the channel connected, so the only error is the timeout.
        received.ok()
    }

    /// The serial console is the interface; the machine's end is the end.
    fn attend_console(&mut self) -> Result<i32> {
        let _raw = RawMode::enter().context("the terminal cannot be put into raw mode")?;
        if terminal::stdin_is_ours() {
            cmd::console::feed(self.machine.instance.keyboard()?, &self.machine.events)?;
        }
        self.deadline = self.patience();
        loop {
            match self.next() {
                None => return Ok(TIMED_OUT),
                Some(Event::Signal(SIGWINCH)) => {}
                Some(Event::Signal(signal) | Event::Kill(signal)) => return Ok(128 + signal),
                Some(Event::Stop(_)) => return Ok(128 + SIGTERM),
                Some(Event::Machine(Ended::Failed(reason))) => return Err(anyhow!(reason)),
                Some(Event::Machine(_)) => return Ok(0),
                Some(_) => {}
            }
        }
    }

    /// Runs the command, or waits for the end of a machine that has none.
    fn attend_guest(&mut self, link: &Link) -> Result<i32> {
        self.machine
            .forwarder
            .attach(AgentLink::new(link.clone()))
            .context("the guest's ports cannot be forwarded")?;
        declare::offer_ssh_agent(&self.machine);
        // The guest's own clock began when its kernel was some way into its boot.
        self.machine.set_clock();
        if let Some(code) = self.await_folders(link)? {
            return Ok(code);
        }
        if self.machine.args.init.is_some() {
            // An init may kill the agent and have nothing left by which it could end the machine.
            let events = self.machine.events.clone();
            let folders = &self.machine.folders;
            folders
                .at_end_of_root(move || drop(events.send(Event::RootGone)))
                .context("no thread for the machine's root")?;
        }
        // What runs now may connect at once.
        self.machine.forwarder.await_reverses();
        *self.machine.state() = State::Running;
        vmm::release_program();
        if self.mode == Mode::Background && self.machine.args.command.is_empty() {
            self.say_ready()?;
            return self.await_end();
        }
        let session = Session::start(link, self.exec(), &self.output, &self.machine.events)
            .context("the guest's agent cannot be reached")?;
        self.await_command(session)
    }

    /// Has the guest mount the declared folders; an exit code where a signal came first.
    fn await_folders(&mut self, link: &Link) -> Result<Option<i32>> {
        let (folders, link) = (self.machine.folders.clone(), link.clone());
        if folders.is_empty() {
            folders.attach(&link)?;
            return Ok(None);
        }
        let events = self.machine.events.clone();
        let mounter = thread::Builder::new().name("folders".into());
        mounter
            .spawn(move || drop(events.send(Event::Folders(folders.attach(&link)))))
            .context("no thread for the shared folders")?;
        // It takes no longer than it may.
        self.deadline = None;
        loop {
            match self.next() {
                Some(Event::Folders(mounted)) => return Ok(mounted.map(|()| None)?),
                Some(event) => {
                    if let Some(code) = self.ended_by(event)? {
                        return Ok(Some(code));
                    }
                }
                None => {}
            }
        }
    }

    /// The exit code where something ends the machine before its command.
    fn ended_by(&self, event: Event) -> Result<Option<i32>> {
        match event {
            Event::Machine(ended) => Err(self.ended_early(ended)),
            Event::Signal(signal) | Event::Kill(signal) if signal != SIGWINCH => {
                Ok(Some(128 + signal))
            }
            Event::Stop(_) => Ok(Some(128 + SIGTERM)),
            _ => Ok(None),
        }
    }

    /// Lets go of whoever started this process, where it is a supervisor.
    fn say_ready(&self) -> Result<()> {
        match &self.output {
            Output::Record(log) => supervise::say_ready(log.clone()),
            Output::Stdio => Ok(()),
        }
    }

    /// The command as the agent is asked for it.
    fn exec(&self) -> Exec {
        let args = &self.machine.args;
        let mut exec = resolve::exec(args, self.machine.host_root.as_ref());
        if self.mode == Mode::Background {
            exec.stdin = false;
        }
        if let Some(path) = declare::ssh_agent_path(args) {
            exec.env.push((
                b"SSH_AUTH_SOCK".to_vec(),
                path.as_os_str().as_bytes().to_vec(),
            ));
        }
        exec
    }

    /// A machine without a command runs until it is told to end, or ends by itself.
    fn await_end(&mut self) -> Result<i32> {
        self.deadline = self.patience();
        loop {
            match self.next() {
                None if self.orphaned => return Err(self.failure(ORPHANED)),
                None => return Ok(TIMED_OUT),
                Some(Event::RootGone) => self.await_end_of_orphan(),
                Some(Event::Signal(SIGWINCH)) => {}
                Some(Event::Signal(_) | Event::Stop(_)) => return Ok(0),
                Some(Event::Kill(SIGKILL)) => {
                    self.machine.instance.stop();
                    return Ok(128 + SIGKILL);
                }
                Some(Event::Kill(_)) => return Ok(0),
                Some(Event::Machine(Ended::PowerOff | Ended::Stopped)) => return Ok(0),
                Some(Event::Machine(ended)) => return Err(self.ended_early(ended)),
                Some(_) => {}
            }
        }
    }

    /// A guest without its root can still power off, and nothing else.
    fn await_end_of_orphan(&mut self) {
        self.orphaned = true;
        self.deadline = Some(Instant::now() + GRACE);
    }

    /// When --timeout strikes.
    fn patience(&self) -> Option<Instant> {
        let timeout = self.machine.args.timeout?;
        Some(Instant::now() + timeout)
    }

    /// Waits until the agent is ready; an exit code where a signal came first.
    fn await_agent(&mut self) -> Result<Option<i32>> {
        self.deadline = Some(Instant::now() + self.machine.args.boot_timeout);
        loop {
            match self.next() {
                None => {
                    return Err(self.failure(&format!(
                        "the guest was not up after {}: see what it waits for with --verbose, or \
                         give it longer with --boot-timeout",
                        humantime::format_duration(self.machine.args.boot_timeout)
                    )));
                }
                Some(Event::Hello(Hello::Ready {
                    version,
                    agent_started_ns,
                    agent_ready_ns,
                    kernel_release,
                })) => {
                    if version != protocol::VERSION {
                        bail!("the guest's agent is of another version of mvm");
                    }
                    // It reports once.
                    let _ = self.machine.kernel.set(kernel_release);
                    let started = Duration::from_nanos(agent_started_ns);
                    self.timing.ready = Some(Instant::now());
                    self.timing.agent = Duration::from_nanos(agent_ready_ns).checked_sub(started);
                    return Ok(None);
                }
                Some(Event::Hello(Hello::Failed(reason))) => {
                    return Err(anyhow!("the guest cannot be used: {reason}"));
                }
                Some(event) => {
                    if let Some(code) = self.ended_by(event)? {
                        return Ok(Some(code));
                    }
                }
            }
        }
    }

    fn await_command(&mut self, mut session: Session) -> Result<i32> {
        let mut progress = Progress::default();
        let mut raw = None;
        self.deadline = self.patience();
        loop {
            match self.next() {
                None if self.orphaned => return Err(self.failure(ORPHANED)),
                Some(Event::RootGone) => self.await_end_of_orphan(),
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
                    self.ask_to_end(&mut session, SIGTERM, GRACE);
                }
                Some(Event::Signal(SIGWINCH)) => {
                    ignore_gone(session.resize(terminal::window_size()));
                }
                Some(Event::Signal(signal)) if self.signalled.is_some() => return Ok(128 + signal),
                Some(Event::Signal(signal)) => {
                    self.signalled = Some(signal);
                    self.ask_to_end(&mut session, signal, GRACE);
                }
                Some(Event::Stop(grace)) => {
                    self.signalled = Some(SIGTERM);
                    self.ask_to_end(&mut session, SIGTERM, grace);
                }
                Some(Event::Kill(SIGKILL)) => {
                    self.machine.instance.stop();
                    return Ok(128 + SIGKILL);
                }
                Some(Event::Kill(signal)) => ignore_gone(session.signal(signal)),
                Some(Event::Session(Some(FromSession::Started { .. }))) => {
                    self.say_ready()?;
                    // Not before the guest's program is there to receive the keys.
                    if session.has_terminal() {
                        raw =
                            RawMode::enter().context("the terminal cannot be put into raw mode")?;
                    }
                }
                Some(Event::Session(Some(FromSession::Refused { reason, message }))) => {
                    self.tell(&message);
                    return Ok(refusal_code(reason));
                }
                Some(Event::Session(Some(FromSession::Exited(status)))) => {
                    self.timing.exited = Some(Instant::now());
                    progress.code = Some(status.shell_code());
                }
                Some(Event::OutputDone) => progress.outputs_done += 1,
                Some(Event::Machine(ended)) => {
                    drop(raw.take());
                    return match ended {
                        // A shell may power its machine off.
                        Ended::PowerOff if self.machine.args.command.is_empty() => {
                            Ok(progress.code.unwrap_or(0))
                        }
                        Ended::PowerOff => progress.code.ok_or_else(|| self.ended_early(ended)),
                        ended => Err(self.ended_early(ended)),
                    };
                }
                // Either its machine is ending, which is told in a moment, or it was asked to.
                Some(Event::Session(None)) => {
                    self.deadline.get_or_insert(Instant::now() + GRACE);
                }
                Some(Event::Hello(_) | Event::Folders(_)) => {}
            }
            if let Some(code) = progress.code
                && progress.outputs_done == session.outputs()
            {
                self.timing.first_output = session.first_output();
                return Ok(if progress.timed_out { TIMED_OUT } else { code });
            }
        }
    }

    /// Says something about the command to whoever wants to know.
    fn tell(&self, sentence: &str) {
        self.output.note(sentence);
        if self.mode == Mode::Background {
            // Whoever started this supervisor still reads its standard error.
            eprintln!("mvm: {sentence}");
        }
    }

    fn ask_to_end(&mut self, session: &mut Session, signal: i32, grace: Duration) {
        ignore_gone(session.signal(signal));
        self.deadline = Some(Instant::now() + grace);
    }

    /// Lets the guest write out what it has to; force when it takes too long.
    fn power_off(&mut self, link: &Link) {
        if !self.machine.instance.writes() && !self.machine.folders.writes() {
            return;
        }
        let asked = link::ask_to_power_off(link, POWER_OFF_GRACE);
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
            Ended::Reset => match self.tail.panic(PANIC_LINES_SHOWN) {
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
        if lines.is_empty() || self.machine.args.verbose {
            return anyhow!("{message}");
        }
        anyhow!("{message}\nFrom its console:\n  {}", lines.join("\n  "))
    }
}
