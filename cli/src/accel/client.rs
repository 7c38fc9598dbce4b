//! Running a command in the outer Linux: starting it where it is not up, then one session of its agent.

use std::env;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use agent::protocol::{Exec, WindowSize};
use anyhow::{Context, Result, anyhow, bail};

use super::state::Files;
use super::{OUTER_VARIABLE, outer, supervisor};
use crate::event;
use crate::foreground::{self, Lost};
use crate::link::Link;
use crate::session::{self, Output, Session, Streams};
use crate::terminal;

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
        cwd_or_home: false,
        in_initramfs: false,
    }
}

/// Runs `exec` in the outer Linux and returns its exit code; `reason` says why it is not KVM's.
pub fn run(reason: &str, exec: Exec) -> Result<ExitCode> {
    let (events, inbox) = mpsc::channel();
    event::watch_signals(events.clone()).context("signals cannot be watched")?;
    let files = Files::of_this_program()?;
    let session = with_outer(&files, reason, exec, |link, exec| {
        Session::start(link, exec, &Output::Stdio, &events)
    })?;
    foreground::attend(session, &inbox, GRACE, |why| match why {
        Lost::Stuck => anyhow!("the outer Linux does not answer; end it with `mvm accel stop`"),
        Lost::Ended => match supervisor::last_words(&files) {
            Some(words) => anyhow!("the outer Linux ended unexpectedly:\n  {words}"),
            None => anyhow!("the outer Linux ended unexpectedly"),
        },
    })
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
