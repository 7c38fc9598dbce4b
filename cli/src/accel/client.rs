//! Running a command in the outer Linux: starting it where it is not up, then one session of its agent.

use std::env;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use agent::protocol::{Exec, FromSession, WindowSize};
use anyhow::{Context, Result, bail};
use signal_hook::consts::SIGWINCH;

use super::state::Files;
use super::{OUTER_VARIABLE, outer, supervisor};
use crate::event::{self, Event};
use crate::link::Link;
use crate::owner::refusal_code;
use crate::session::{self, Output, Session, Streams};
use crate::terminal::{self, RawMode};

/// Longer than what an mvm in the outer Linux gives its machine, so that it is the one to use force.
const GRACE: Duration = Duration::from_secs(25);

/// How to run the `verb` of this program in the outer Linux, with `words` behind it and all of its streams.
pub fn this_program(verb: &str, words: &[OsString]) -> Exec {
    let mut argv = vec![OsString::from(outer::PROGRAM), verb.into()];
    argv.extend_from_slice(words);
    let mut exec = exec(&argv, None);
    exec.stdin = true;
    exec
}

/// How to run `argv` in the outer Linux, as it would run here.
pub fn exec(argv: &[OsString], terminal: Option<WindowSize>) -> Exec {
    let mut env: Vec<_> = env::vars_os()
        .map(|(name, value)| (name.into_vec(), value.into_vec()))
        .collect();
    env.push((OUTER_VARIABLE.into(), b"1".to_vec()));
    Exec {
        session: session::fresh_id(),
        argv: argv.iter().map(|word| word.as_bytes().to_vec()).collect(),
        env,
        clear_env: true,
        cwd: env::current_dir()
            .ok()
            .map(|dir| dir.into_os_string().into_vec()),
        user: None,
        terminal,
        stdin: terminal::stdin_is_ours(),
        in_initramfs: false,
    }
}

/// Runs `exec` in the outer Linux and returns its exit code; `reason` says why it is not KVM's.
pub fn run(reason: &str, exec: Exec) -> Result<ExitCode> {
    let (events, inbox) = mpsc::channel();
    event::watch_signals(events.clone()).context("signals cannot be watched")?;
    let files = Files::of_this_program()?;
    let mut session = with_outer(&files, reason, exec, |link, exec| {
        Session::start(link, exec, &Output::Stdio, &events)
    })?;

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
            None => bail!("the outer Linux does not answer; end it with `mvm accel stop`"),
            Some(Event::Signal(SIGWINCH)) => drop(session.resize(terminal::window_size())),
            Some(Event::Signal(signal)) => {
                drop(session.signal(signal));
                deadline.get_or_insert(Instant::now() + GRACE);
            }
            Some(Event::Session(Some(FromSession::Started { .. }))) if session.has_terminal() => {
                raw = RawMode::enter().context("the terminal cannot be put into raw mode")?;
            }
            Some(Event::Session(Some(FromSession::Started { .. }))) => {}
            Some(Event::Session(Some(FromSession::Refused { reason, message }))) => {
                eprintln!("mvm: {message}");
                return Ok(exit_code(refusal_code(reason)));
            }
            Some(Event::Session(Some(FromSession::Exited(status)))) => {
                code = Some(status.shell_code());
            }
            Some(Event::Session(None)) if code.is_none() => {
                drop(raw);
                match supervisor::last_words(&files) {
                    Some(words) => bail!("the outer Linux ended unexpectedly:\n  {words}"),
                    None => bail!("the outer Linux ended unexpectedly"),
                }
            }
            Some(Event::OutputDone) => outputs_done += 1,
            Some(
                Event::Session(None)
                | Event::Hello(_)
                | Event::Machine(_)
                | Event::Stop(_)
                | Event::Kill(_),
            ) => {}
        }
        if let Some(code) = code
            && outputs_done == session.outputs()
        {
            return Ok(exit_code(code));
        }
    }
}

/// Opens a session of the outer Linux, which is started where need be.
pub fn open_session(files: &Files, reason: &str, exec: Exec) -> Result<Streams> {
    with_outer(files, reason, exec, Streams::open)
}

/// Starts a session, and the outer Linux where need be: again where it ended just then, which it does
/// when it has not been used for a while.
fn with_outer<T>(
    files: &Files,
    reason: &str,
    exec: Exec,
    start: impl Fn(&Link, Exec) -> io::Result<T>,
) -> Result<T> {
    let link = Link::Socket(files.socket());
    ensure_started(files, Some(reason))?;
    start(&link, exec.clone())
        .or_else(|error| {
            tracing::debug!("the outer Linux has gone: {error}");
            ensure_started(files, Some(reason)).map_err(io::Error::other)?;
            start(&link, exec)
        })
        .context("the outer Linux cannot be reached")
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code & 0xff).unwrap_or(u8::MAX))
}

/// Starts the outer Linux where it is not up.
pub fn ensure_started(files: &Files, reason: Option<&str>) -> Result<()> {
    if is_up(files) {
        return Ok(());
    }
    let _starting = files.lock_start()?;
    if is_up(files) {
        return Ok(());
    }
    if let Some(reason) = reason {
        eprintln!(
            "mvm: {reason}; machines run in a Linux that QEMU emulates, which is slow (starting it once)"
        );
    }
    let mut supervisor = Command::new(env::current_exe()?)
        .args(["accel", "supervise"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .current_dir("/")
        .spawn()
        .context("the supervisor of the outer Linux cannot be started")?;
    let mut said = String::new();
    if let Some(mut stdout) = supervisor.stdout.take() {
        stdout.read_to_string(&mut said)?;
    }
    if said.trim_end() == "ready" {
        return Ok(());
    }
    let _ = supervisor.wait();
    match (said.trim_end(), supervisor::last_words(files)) {
        ("", None) => bail!("the outer Linux did not start"),
        ("", Some(words)) => bail!("the outer Linux did not start:\n  {words}"),
        (said, _) => bail!("{said}"),
    }
}

/// Whether somebody answers at the outer Linux's socket.
pub fn is_up(files: &Files) -> bool {
    match UnixStream::connect(files.socket()) {
        Ok(_) => true,
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::debug!("the socket of the outer Linux does not answer: {error}");
            }
            false
        }
    }
}
