//! A command that runs elsewhere on this process's standard streams, signals and terminal: the loop that waits
//! for its end.

use std::process::ExitCode;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use agent::protocol::{FromSession, Refusal};
use anyhow::{Context, Result};
use signal_hook::consts::SIGWINCH;

use crate::event::Event;
use crate::session::Session;
use crate::terminal::{self, RawMode};

/// Why a command's exit code is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// The connection ended before the command did.
    Ended,
    /// A signal asked it to end, and it did not.
    Stuck,
}

/// Stays with `session`, whose events arrive at `inbox`, until its command has ended and all it wrote is written.
///
/// Signals are passed on. After the first one the command has `grace` to end; a second one does not wait. Where
/// the exit code does not become known, `lost` says why; the terminal is itself again when it is called.
pub fn attend(
    mut session: Session,
    inbox: &Receiver<Event>,
    grace: Duration,
    lost: impl FnOnce(Lost) -> anyhow::Error,
) -> Result<ExitCode> {
    let mut raw = None;
    let mut code = None;
    let mut outputs_done = 0;
    let mut deadline: Option<Instant> = None;
    loop {
        let event = match deadline {
            None => inbox.recv().ok(),
            Some(at) => inbox
                .recv_timeout(at.saturating_duration_since(Instant::now()))
                .ok(),
        };
        match event {
            None => {
                drop(raw);
                return Err(lost(Lost::Stuck));
            }
            Some(Event::Signal(SIGWINCH)) => ignore_gone(session.resize(terminal::window_size())),
            Some(Event::Signal(signal)) if deadline.is_some() => {
                return Ok(exit_code(128 + signal));
            }
            Some(Event::Signal(signal)) => {
                ignore_gone(session.signal(signal));
                deadline = Some(Instant::now() + grace);
            }
            Some(Event::Session(Some(FromSession::Started { .. }))) => {
                // Not before the program is there to receive the keys.
                if session.has_terminal() {
                    raw = RawMode::enter().context("the terminal cannot be put into raw mode")?;
                }
            }
            Some(Event::Session(Some(FromSession::Refused { reason, message }))) => {
                eprintln!("mvm: {message}");
                return Ok(exit_code(refusal_code(reason)));
            }
            Some(Event::Session(Some(FromSession::Exited(status)))) => {
                code = Some(status.shell_code());
            }
            Some(Event::Session(None)) if code.is_none() => {
                drop(raw);
                return Err(lost(Lost::Ended));
            }
            Some(Event::OutputDone) => outputs_done += 1,
            // Of a machine that this process owns, which is not the case here.
            Some(_) => {}
        }
        if let Some(code) = code
            && outputs_done == session.outputs()
        {
            return Ok(exit_code(code));
        }
    }
}

/// What is said to a session that has just ended is of no interest to anybody.
pub fn ignore_gone(result: std::io::Result<()>) {
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

/// The code as this process's own.
pub fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code & 0xff).unwrap_or(u8::MAX))
}
