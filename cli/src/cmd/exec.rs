//! `mvm exec` and `mvm shell`: another command in a machine that runs.

use std::env;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use agent::protocol::Exec;
use anyhow::{Context, Result, anyhow};

use super::mount;
use crate::args::machine::{ExecArgs, ShellArgs};
use crate::control::client::Client;
use crate::control::protocol::{Answer, Inspection, Op};
use crate::event;
use crate::foreground::{self, Lost};
use crate::link::Link;
use crate::session::{self, Output, Session};
use crate::store::{Bytes, Name, Standing, Store};
use crate::{resolve, terminal};

/// Between a signal and the end of patience.
const GRACE: Duration = Duration::from_secs(10);

/// Where the caller's SSH agent is, on the host and in guests that may use it.
const SSH_AUTH_SOCK: &str = "SSH_AUTH_SOCK";

/// Runs the command and returns its exit code.
pub fn run(args: &ExecArgs) -> Result<ExitCode> {
    attend(&args.name, |machine| Exec {
        session: session::fresh_id(),
        argv: args
            .command
            .iter()
            .map(|word| word.as_bytes().to_vec())
            .collect(),
        env: variables(machine, resolve::environment(&args.env, args.tty)),
        clear_env: false,
        cwd: match &args.workdir {
            Some(workdir) => Some(workdir.as_bytes().to_vec()),
            None => machine.workdir.clone().map(|workdir| workdir.0),
        },
        cwd_or_home: args.workdir.is_none(),
        user: args.user.clone().or_else(|| machine.user.clone()),
        terminal: args.tty.then(terminal::window_size),
        stdin: args.interactive,
        in_initramfs: false,
    })
}

/// Opens a shell and returns its exit code.
pub fn shell(args: &ShellArgs) -> Result<ExitCode> {
    let on_terminal = terminal::stdin_is_terminal();
    let here = env::current_dir().ok();
    let here = |machine: &Inspection| {
        let here = here.as_ref()?;
        let inside = mount::in_guest(&machine.mounts, here);
        Some(inside.unwrap_or_else(|| here.clone()).into_os_string())
    };
    attend(&args.name, |machine| Exec {
        session: session::fresh_id(),
        argv: Vec::new(),
        env: variables(machine, resolve::environment(&[], on_terminal)),
        clear_env: false,
        cwd: args
            .workdir
            .clone()
            .or_else(|| here(machine))
            .map(OsStringExt::into_vec),
        cwd_or_home: args.workdir.is_none(),
        user: args.user.clone().or_else(|| machine.user.clone()),
        terminal: on_terminal.then(terminal::window_size),
        stdin: true,
        in_initramfs: false,
    })
}

/// The machine's own variables and, over them, those of one command.
fn variables(machine: &Inspection, own: Vec<(Vec<u8>, Vec<u8>)>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let of_machine = machine.env.iter().filter_map(|Bytes(text)| {
        let at = text.iter().position(|&byte| byte == b'=')?;
        Some((text[..at].to_vec(), text[at + 1..].to_vec()))
    });
    of_machine.chain(own).collect()
}

/// Runs the command that `exec` makes for the machine as it is.
fn attend(name: &Name, exec: impl FnOnce(&Inspection) -> Exec) -> Result<ExitCode> {
    let store = Store::open()?;
    let machine = look(&store, name)?;
    let mut exec = exec(&machine);
    if let Some(path) = machine.ssh_agent {
        exec.env.insert(0, (SSH_AUTH_SOCK.into(), path.0));
    }
    let (events, inbox) = mpsc::channel();
    event::watch_signals(events.clone()).context("signals cannot be watched")?;
    let link = Link::Owned(store.clone(), name.clone());
    let session = Session::start(&link, exec, &Output::Stdio, &events)?;
    foreground::attend(session, &inbox, GRACE, |why| match why {
        Lost::Ended => ended(&store, name),
        Lost::Stuck => anyhow!(
            "the command did not end within {} s of a signal",
            GRACE.as_secs()
        ),
    })
}

/// The machine. Where it may use the caller's SSH agent, that is the one of this process from now on, as the one
/// from before may be gone.
fn look(store: &Store, name: &Name) -> Result<Inspection> {
    let mut client = Client::connect(store, name)?;
    let machine = match client.ask(Op::Inspect)? {
        Answer::Inspection(machine) => machine,
        answer => return Err(client.unexpected(&answer)),
    };
    if let Some(own) = env::var_os(SSH_AUTH_SOCK)
        && machine.ssh_agent.is_some()
    {
        let path = Some(own.into());
        client.ask(Op::SshAgent { path })?;
    }
    Ok(*machine)
}

/// Why the connection to the command ended before the command did.
fn ended(store: &Store, name: &Name) -> anyhow::Error {
    match store.standing(name) {
        Ok(Standing::Ended(ending)) => match ending.error {
            Some(error) => anyhow!("machine {name} failed before the command ended: {error}"),
            None => anyhow!("machine {name} ended before the command did"),
        },
        Ok(Standing::Killed) => anyhow!("machine {name} was killed before the command ended"),
        Ok(Standing::Owned) => anyhow!("the connection to machine {name} broke: it may be ending"),
        Err(error) => error.context(format!("machine {name} ended before the command did")),
    }
}
