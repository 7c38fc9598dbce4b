//! `mvm connect`: standard input and output are a connection to a port of the machine, as an SSH
//! client's ProxyCommand wants them.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use agent::protocol::{self, DialError, FromForwarder, Open, Target, ToForwarder};
use anyhow::{Context, Result, bail};

use crate::copy::{self, OutputError};
use crate::session::fresh_id;

/// How long the agent may take to say how it went: it tries for 10 s itself.
const PATIENCE: Duration = Duration::from_secs(20);

/// The exit code where there was no connection, or it broke.
const FAILED: u8 = 1;

/// Connects standard input and output to `port` of the machine `name`, whose agent `open` opens a connection
/// to, until the other end closes.
///
/// # Errors
/// Where the agent is not reached or does not answer; a port that does not is told to the caller, and is no
/// error here.
pub fn run(open: impl Fn() -> Result<UnixStream>, name: &str, port: u16) -> Result<ExitCode> {
    let connected = dial(&open, Target::Loopback(port))?;
    let connection = match connected {
        Ok(connection) => connection,
        Err(error) => {
            eprintln!("mvm: {}", explain(&error, name, port));
            return Ok(ExitCode::from(FAILED));
        }
    };
    match pump(&connection, rustix::stdio::stdin(), rustix::stdio::stdout()) {
        // Whoever does not read any more knows.
        Ok(()) | Err(OutputError::Unwritten(_)) => Ok(ExitCode::SUCCESS),
        Err(OutputError::Broken(error)) => {
            eprintln!("mvm: the connection to port {port} of machine {name} broke: {error}");
            Ok(ExitCode::from(FAILED))
        }
    }
}

/// A connection to something in the guest.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    /// The agent holds what it dialed only as long as this is open; it may not have got to the other end yet.
    _control: UnixStream,
}

/// Connects to `target`; the inner error is the guest's own.
fn dial(
    open: impl Fn() -> Result<UnixStream>,
    target: Target,
) -> Result<Result<Connection, DialError>> {
    let control = open()?;
    let asked = || -> io::Result<Result<u64, DialError>> {
        let token = fresh_id();
        control.set_read_timeout(Some(PATIENCE))?;
        protocol::send(&control, &Open::Forward)?;
        protocol::send(&control, &ToForwarder::Dial { token, target })?;
        match protocol::receive(&control)? {
            Some(FromForwarder::Dialed { token: of, result }) if of == token => {
                Ok(result.map(|()| token))
            }
            // Nothing else was asked for.
            Some(_) => Err(io::ErrorKind::InvalidData.into()),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    };
    let token = match asked() {
        Ok(Ok(token)) => token,
        Ok(Err(error)) => return Ok(Err(error)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            bail!("the machine does not answer: it may be paused or overloaded")
        }
        Err(error) => return Err(error).context("the machine's agent gave no answer"),
    };
    let stream = open()?;
    protocol::send(&stream, &Open::Attach { token })?;
    Ok(Ok(Connection {
        stream,
        _control: control,
    }))
}

/// Copies both ways until the guest's side ends.
fn pump(
    connection: &Connection,
    input: BorrowedFd<'static>,
    output: BorrowedFd<'_>,
) -> Result<(), OutputError> {
    let to = connection.stream.try_clone().map_err(OutputError::Broken)?;
    // It is left in its read when the process ends.
    thread::Builder::new()
        .name("input".into())
        .spawn(move || copy::input(input, &to))
        .map_err(OutputError::Broken)?;
    let ended = copy::output(&connection.stream, |data| {
        Ok(copy::write_all(output, data)?)
    });
    // An orderly end of our side too: a reset would take along what is still on its way into the guest.
    let _ = connection.stream.shutdown(std::net::Shutdown::Write);
    ended
}

/// What a caller is told.
fn explain(error: &DialError, name: &str, port: u16) -> String {
    let what = match error {
        DialError::Refused => "nobody listens there".into(),
        DialError::Unreachable => "there is no way there".into(),
        DialError::NoSuchHost => "there is no such host".into(),
        DialError::TimedOut => "it did not answer in time".into(),
        // The guest's words: they must not steer the caller's terminal.
        DialError::Other(text) => text.escape_debug().take(300).collect::<String>(),
    };
    format!("cannot connect to port {port} of machine {name}: {what}")
}

#[cfg(test)]
#[path = "connect_tests.rs"]
mod tests;
