//! One session: a command, its streams, and the connection that controls it.
//!
//! Lifecycle: streams meet ([`Rendezvous`](crate::rendezvous)) → the command starts → pumps carry
//! bytes while this thread passes on signals and sizes → the command ends, `Exited` is sent, each
//! pump drains and ends its own stream → the host closes the control connection → all is freed.
//! A host that goes away earlier hangs the command up.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use agent::protocol::{self, Exec, FromSession, Refusal, StreamKind, ToSession};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use crate::command::{Command, Refused};
use crate::connection::Connection;
use crate::process;
use crate::reap::{Child, Reaper};
use crate::rendezvous::{PATIENCE, Streams};
use crate::serve::Machine;
use crate::spawn::{self, Stdio};
use crate::stream::{self, Endpoint};
use crate::terminal;
use crate::tree::Tree;
use crate::users::{self, User};

/// What a hung-up command has between SIGTERM and SIGKILL.
const HANG_UP_GRACE: Duration = Duration::from_secs(10);

/// How often a hung-up session is looked at.
const HANG_UP_STEP: Duration = Duration::from_millis(100);

/// More than the default of 64 KiB means fewer wake-ups; memory is taken only as it fills.
const PIPE_SIZE: usize = 256 << 10;

/// Runs what `exec` asks for, to the end of its control connection.
pub fn run(machine: &Machine, control: &Connection, exec: &Exec) -> io::Result<()> {
    let session = match Session::start(machine, exec) {
        Ok(session) => session,
        Err(Refused { reason, message }) => {
            return protocol::send(control, &FromSession::Refused { reason, message });
        }
    };
    let served = session.serve(machine, control);
    session.close();
    served
}

struct Session {
    child: Child,
    streams: Vec<Arc<Connection>>,
    pumps: Vec<JoinHandle<()>>,
    /// The master of the session's pty.
    master: Option<Arc<OwnedFd>>,
}

/// The agent's ends of what a command has as 0, 1 and 2.
struct Plumbing {
    stdio: Stdio,
    input: Option<(StreamKind, Endpoint)>,
    outputs: Vec<(StreamKind, Endpoint)>,
    master: Option<Arc<OwnedFd>>,
}

impl Session {
    fn start(machine: &Machine, exec: &Exec) -> Result<Self, Refused> {
        let kinds = stream_kinds(exec);
        let streams = machine.rendezvous.collect(exec.session, kinds, PATIENCE);
        let streams = streams.map_err(|missing| {
            let patience = PATIENCE.as_secs();
            Refused::other(format!(
                "the host did not open {missing:?} within {patience} seconds"
            ))
        })?;
        machine.wait_for_root().map_err(Refused::other)?;
        let tree: &Tree = if exec.in_initramfs {
            &machine.initramfs
        } else {
            &machine.root
        };
        let command = Command::new(exec, find_user(tree, exec.user.as_deref())?)?;
        let plumbing = Plumbing::new(tree, exec, &command.user).map_err(|error| {
            Refused::other(format!("the command's streams could not be made: {error}"))
        })?;
        let child = spawn::spawn(&machine.reaper, tree, &command, plumbing.stdio)?;
        let mut session = Self {
            child,
            streams: streams.values().cloned().collect(),
            pumps: Vec::new(),
            master: plumbing.master,
        };
        let started = session.start_pumps(&streams, plumbing.input, plumbing.outputs);
        if let Err(error) = started {
            machine.reaper.signal_group(&session.child, libc::SIGKILL);
            session.close();
            return Err(Refused::other(format!(
                "no thread could be started for the command's streams: {error}"
            )));
        }
        Ok(session)
    }

    fn start_pumps(
        &mut self,
        streams: &Streams<StreamKind>,
        input: Option<(StreamKind, Endpoint)>,
        outputs: Vec<(StreamKind, Endpoint)>,
    ) -> io::Result<()> {
        for (kind, endpoint) in outputs {
            if let Some(stream) = streams.get(&kind) {
                let exit = Arc::clone(&self.child.exit);
                self.pumps
                    .push(stream::start_output(endpoint, Arc::clone(stream), exit)?);
            }
        }
        if let Some((kind, endpoint)) = input
            && let Some(stream) = streams.get(&kind)
        {
            let exit = Arc::clone(&self.child.exit);
            self.pumps
                .push(stream::start_input(Arc::clone(stream), endpoint, exit)?);
        }
        Ok(())
    }

    /// Passes messages both ways until the command has ended and the host has closed.
    fn serve(&self, machine: &Machine, control: &Connection) -> io::Result<()> {
        let pid = u32::try_from(self.child.pid).unwrap_or_default();
        protocol::send(control, &FromSession::Started { pid })
            .map(|()| {
                // What it listens at is looked for more often from now on.
                machine.forwarder.report_listeners();
            })
            .and_then(|()| self.obey(&machine.reaper, control))
            .inspect_err(|_| self.hang_up(&machine.reaper))?;
        match self.child.exit.status() {
            Some(status) => {
                // A command that started a service and ended leaves a port that is known.
                machine.forwarder.report_listeners();
                protocol::send(control, &FromSession::Exited(status))?;
            }
            None => {
                self.hang_up(&machine.reaper);
                return Ok(());
            }
        }
        // The host closes when it has all output; what it still says concerns nobody any more.
        while receive(control)?.is_some() {}
        Ok(())
    }

    /// Carries out messages until the command ends or the host closes the connection.
    fn obey(&self, reaper: &Reaper, control: &Connection) -> io::Result<()> {
        loop {
            let mut fds = [
                PollFd::new(&*self.child.exit, PollFlags::IN),
                PollFd::new(control, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [ended, spoken] = fds.map(|fd| !fd.revents().is_empty());
            if ended {
                return Ok(());
            }
            if spoken {
                match protocol::receive(control)? {
                    Some(message) => self.carry_out(reaper, message),
                    None => return Ok(()),
                }
            }
        }
    }

    fn carry_out(&self, reaper: &Reaper, message: ToSession) {
        match (message, &self.master) {
            (ToSession::Signal(signal), _) if !(1..=libc::SIGRTMAX()).contains(&signal) => {}
            (ToSession::Signal(signal), master) => {
                let in_foreground = |master| terminal::signal_foreground(master, signal);
                if !master.as_deref().is_some_and(in_foreground) {
                    reaper.signal_group(&self.child, signal);
                }
            }
            (ToSession::Resize(size), Some(master)) => {
                // It fails only where the terminal is hung up, and then has no size to follow.
                let _ = terminal::resize(master, size);
            }
            (ToSession::Resize(_), None) => {}
        }
    }

    /// Ends a command whose host is gone: politely, then by force, with all of its session.
    ///
    /// The session's number stays taken while it has members, so watching that it never empties
    /// tells that the members are still this command's.
    fn hang_up(&self, reaper: &Reaper) {
        for stream in &self.streams {
            stream.hang_up();
        }
        for signal in [libc::SIGHUP, libc::SIGTERM, libc::SIGCONT] {
            reaper.signal_group(&self.child, signal);
        }
        let deadline = Instant::now() + HANG_UP_GRACE;
        let mut members = self.members();
        while !members.is_empty() && Instant::now() < deadline {
            self.pause(HANG_UP_STEP);
            members = self.members();
        }
        for pid in members {
            // SAFETY: kill(2) takes no memory; the number was just seen in this command's session.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }

    fn members(&self) -> Vec<libc::pid_t> {
        process::session_members(self.child.pid).unwrap_or_else(|error| {
            eprintln!("mvm-agent: /proc cannot be listed: {error}");
            Vec::new()
        })
    }

    /// Sleeps, but not past the command's end.
    fn pause(&self, step: Duration) {
        if self.child.exit.status().is_some() {
            return std::thread::sleep(step);
        }
        // Waking early, for whatever reason, only means to look again.
        let _ = self.child.exit.wait(step);
    }

    /// Wakes pumps that are blocked on the host, waits for all, and frees everything.
    fn close(self) {
        for stream in &self.streams {
            stream.hang_up();
        }
        for pump in self.pumps {
            // A pump that panicked has taken the agent down with it (panic = "abort").
            let _ = pump.join();
        }
    }
}

impl Plumbing {
    fn new(tree: &Tree, exec: &Exec, user: &User) -> io::Result<Self> {
        match exec.terminal {
            Some(size) => {
                let terminal::Terminal { master, slave } = terminal::open(tree, size, user.uid)?;
                let master = Arc::new(master);
                let endpoint = Endpoint::Terminal(Arc::clone(&master));
                Ok(Self {
                    stdio: Stdio {
                        stdin: slave.try_clone()?,
                        stdout: slave.try_clone()?,
                        stderr: slave,
                        is_terminal: true,
                    },
                    input: Some((StreamKind::Terminal, endpoint.clone())),
                    outputs: vec![(StreamKind::Terminal, endpoint)],
                    master: Some(master),
                })
            }
            None => Self::with_pipes(exec, user),
        }
    }

    fn with_pipes(exec: &Exec, user: &User) -> io::Result<Self> {
        let (stdin, input) = match exec.stdin {
            true => {
                let (read, write) = pipe(user)?;
                (read, Some((StreamKind::Stdin, endpoint(write)?)))
            }
            false => (std::fs::File::open("/dev/null")?.into(), None),
        };
        let (stdout_read, stdout) = pipe(user)?;
        let (stderr_read, stderr) = pipe(user)?;
        Ok(Self {
            stdio: Stdio {
                stdin,
                stdout,
                stderr,
                is_terminal: false,
            },
            input,
            outputs: vec![
                (StreamKind::Stdout, endpoint(stdout_read)?),
                (StreamKind::Stderr, endpoint(stderr_read)?),
            ],
            master: None,
        })
    }
}

/// A pipe that belongs to the user, who may open it again by its name in /proc (`/dev/stdout`).
fn pipe(user: &User) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    // Only speed depends on it, and memory cgroups or limits may refuse.
    let _ = fcntl_setpipe_size(&write, PIPE_SIZE);
    if user.uid != 0 {
        let uid = Some(rustix::fs::Uid::from_raw(user.uid));
        rustix::fs::fchown(&write, uid, None::<rustix::fs::Gid>)?;
    }
    Ok((read, write))
}

/// The agent's end of a pipe: non-blocking, as pumps need it; the command's end stays blocking.
fn endpoint(end: OwnedFd) -> io::Result<Endpoint> {
    rustix::fs::fcntl_setfl(&end, OFlags::NONBLOCK)?;
    Ok(Endpoint::Pipe(Arc::new(end)))
}

fn stream_kinds(exec: &Exec) -> &'static [StreamKind] {
    match (exec.terminal, exec.stdin) {
        (Some(_), _) => &[StreamKind::Terminal],
        (None, true) => &[StreamKind::Stdin, StreamKind::Stdout, StreamKind::Stderr],
        (None, false) => &[StreamKind::Stdout, StreamKind::Stderr],
    }
}

/// Who `spec` is in `tree`.
pub fn find_user(tree: &Tree, spec: Option<&str>) -> Result<User, Refused> {
    let read = |path| match tree.read(path) {
        // An image without the file has just the users that are numbers.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(|error| {
            Refused::other(format!("the machine's /{path} cannot be read: {error}"))
        }),
    };
    users::resolve(spec, &read("etc/passwd")?, &read("etc/group")?).map_err(|error| Refused {
        reason: Refusal::Other,
        message: error.to_string(),
    })
}

/// Waits for the next message as long as it takes: only half a message has a time limit.
fn receive(control: &Connection) -> io::Result<Option<ToSession>> {
    loop {
        match poll(
            &mut [PollFd::from_borrowed_fd(control.as_fd(), PollFlags::IN)],
            None,
        ) {
            Ok(_) => return protocol::receive(control),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
