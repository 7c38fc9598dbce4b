//! The host's end of one command in a guest: its control connection and its byte streams.
//!
//! Each stream is a vsock connection of its own, so a reader that stops holds up nothing but what
//! it reads. The threads here only copy; what is to happen is decided by whoever reads the events.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use agent::protocol::{self, AGENT_PORT, Exec, Open, StreamKind, ToSession, WindowSize};

use crate::copy;
use crate::event::Event;
use crate::link::Link;
use crate::record::{self, Stream};
use crate::threads::spawn;

/// Where a command's output goes.
#[derive(Debug, Clone)]
pub enum Output {
    /// To this process's standard streams.
    Stdio,
    /// Into the machine's log.
    Record(Arc<record::Writer>),
}

impl Output {
    /// Something that mvm itself has to say about the command; one sentence.
    pub fn note(&self, sentence: &str) {
        match self {
            Self::Stdio => eprintln!("mvm: {sentence}"),
            Self::Record(log) => log.write(Stream::Note, sentence.as_bytes()),
        }
    }

    /// Waits, not for long, until all that was taken is where it belongs.
    pub fn flush(&self) {
        if let Self::Record(log) = self {
            log.flush();
        }
    }

    fn take(&self, kind: StreamKind, data: &[u8]) -> io::Result<()> {
        match (self, kind) {
            (Self::Stdio, StreamKind::Stderr) => copy::write_all(rustix::stdio::stderr(), data)?,
            (Self::Stdio, _) => copy::write_all(rustix::stdio::stdout(), data)?,
            (Self::Record(log), StreamKind::Stderr) => log.write(Stream::Stderr, data),
            (Self::Record(log), StreamKind::Terminal) => log.write(Stream::Terminal, data),
            (Self::Record(log), _) => log.write(Stream::Stdout, data),
        }
        Ok(())
    }
}

/// The connections of a command that an agent was asked for, nothing read from any yet.
#[derive(Debug)]
pub struct Streams {
    /// What the agent reports, and takes signals and sizes from.
    pub control: UnixStream,
    /// Where the command does not run on a terminal, and reads its input.
    pub stdin: Option<UnixStream>,
    /// Where the command does not run on a terminal.
    pub stdout: Option<UnixStream>,
    /// Where the command does not run on a terminal.
    pub stderr: Option<UnixStream>,
    /// Where it does.
    pub terminal: Option<UnixStream>,
    reads_input: bool,
}

impl Streams {
    /// Asks the agent behind `link` to run `exec`, and opens all that the command needs.
    pub fn open(link: &Link, exec: Exec) -> io::Result<Self> {
        let mut control = link.connect(AGENT_PORT)?;
        let (session, on_terminal, reads_input) =
            (exec.session, exec.terminal.is_some(), exec.stdin);
        protocol::send(&mut control, &Open::Exec(exec))?;
        let open = |wanted: bool, kind| -> io::Result<Option<UnixStream>> {
            if !wanted {
                return Ok(None);
            }
            let mut stream = link.connect(AGENT_PORT)?;
            protocol::send(&mut stream, &Open::Stream { session, kind })?;
            Ok(Some(stream))
        };
        Ok(Self {
            control,
            stdin: open(!on_terminal && reads_input, StreamKind::Stdin)?,
            stdout: open(!on_terminal, StreamKind::Stdout)?,
            stderr: open(!on_terminal, StreamKind::Stderr)?,
            terminal: open(on_terminal, StreamKind::Terminal)?,
            reads_input,
        })
    }
}

/// A command that runs in a guest, or is about to.
#[derive(Debug)]
pub struct Session {
    control: UnixStream,
    outputs: usize,
    terminal: bool,
    first_output: Arc<OnceLock<Instant>>,
}

impl Session {
    /// Asks the agent behind `link` to run `exec`, with this process's standard input and its output
    /// going to `output`.
    ///
    /// What becomes of it arrives at `events`: [`Event::Session`], and [`Event::OutputDone`] once for
    /// each of [`Session::outputs`].
    pub fn start(
        link: &Link,
        exec: Exec,
        output: &Output,
        events: &Sender<Event>,
    ) -> io::Result<Self> {
        // All connections are open before the first byte is taken from standard input: a start that
        // fails has consumed nothing.
        let streams = Streams::open(link, exec)?;
        let first_output = Arc::new(OnceLock::new());
        let mut outputs = Vec::new();
        let terminal = streams.terminal.is_some();
        let input = match streams.terminal {
            Some(stream) => {
                let keyboard = stream.try_clone()?;
                outputs.push((stream, StreamKind::Terminal));
                streams.reads_input.then_some(keyboard)
            }
            None => streams.stdin,
        };
        outputs.extend(streams.stdout.map(|from| (from, StreamKind::Stdout)));
        outputs.extend(streams.stderr.map(|from| (from, StreamKind::Stderr)));
        let session = Self {
            control: streams.control.try_clone()?,
            outputs: outputs.len(),
            terminal,
            first_output: first_output.clone(),
        };
        if let Some(input) = input {
            spawn("input", move || copy::input(rustix::stdio::stdin(), &input))?;
        }
        for (stream, kind) in outputs {
            let (events, first, output) = (events.clone(), first_output.clone(), output.clone());
            spawn("output", move || {
                copy_output(&stream, kind, &output, &first);
                let _ = events.send(Event::OutputDone);
            })?;
        }
        let (control, events) = (streams.control, events.clone());
        spawn("session", move || read_replies(control, &events))?;
        Ok(session)
    }

    /// How many output streams there are to wait for.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Whether the command runs on a terminal.
    pub fn has_terminal(&self) -> bool {
        self.terminal
    }

    /// When the first byte of output arrived.
    pub fn first_output(&self) -> Option<Instant> {
        self.first_output.get().copied()
    }

    /// Sends a signal to the command.
    pub fn signal(&mut self, signal: i32) -> io::Result<()> {
        protocol::send(&mut self.control, &ToSession::Signal(signal))
    }

    /// Tells the command's terminal its new size.
    pub fn resize(&mut self, size: WindowSize) -> io::Result<()> {
        protocol::send(&mut self.control, &ToSession::Resize(size))
    }
}

/// A number that no other session of a guest will have: it ties streams to their session.
pub fn fresh_id() -> u64 {
    RandomState::new().hash_one((std::process::id(), Instant::now()))
}

fn read_replies(mut control: UnixStream, events: &Sender<Event>) {
    loop {
        let reply = match protocol::receive(&mut control) {
            Ok(reply) => reply,
            Err(error) => {
                tracing::debug!("the session's connection broke: {error}");
                None
            }
        };
        let last = reply.is_none();
        if events.send(Event::Session(reply)).is_err() || last {
            return;
        }
    }
}

/// Copies one of the command's streams until it ends, and notes when the first of it came. Where nobody takes
/// it any more the command is told (it gets SIGPIPE, as it would in a pipeline).
fn copy_output(from: &UnixStream, kind: StreamKind, to: &Output, first: &OnceLock<Instant>) {
    let copied = copy::output(from, |data| {
        first.get_or_init(Instant::now);
        to.take(kind, data)
    });
    if let Err(error) = copied {
        tracing::debug!("{error}");
    }
}
