//! The verbs that end machines, begin them again, and remove them.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use signal_hook::consts::SIGKILL;

use crate::control::client::{self, Client};
use crate::control::protocol::{Answer, Op};
use crate::store::{Ending, Name, Standing, Store};
use crate::{FAILED, supervise, table};

/// How long an owner may take to be gone when its machine has ended.
const RELEASE: Duration = Duration::from_secs(30);

/// How long an owner may take before it is killed itself.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often it is looked at meanwhile.
const POLL: Duration = Duration::from_millis(10);

/// The exit code of a machine whose owner was killed, as shells give it.
const KILLED: u8 = 128 + SIGKILL as u8;

/// `mvm stop`: all at once, as each may take its time.
pub fn stop(names: &[Name], timeout: u32) -> Result<ExitCode> {
    let store = Store::open()?;
    let results: Vec<_> = thread::scope(|scope| {
        let stopping: Vec<_> = names
            .iter()
            .map(|name| scope.spawn(|| stop_one(&store, name, timeout)))
            .collect();
        let joined = stopping.into_iter().map(|stopping| stopping.join());
        joined
            .map(|result| {
                result.unwrap_or_else(|_| Err(anyhow!("the thread that stops it panicked")))
            })
            .collect()
    });
    let mut results = results.into_iter();
    each(names, |_| results.next().unwrap_or(Ok(())))
}

/// `mvm kill`.
pub fn kill(names: &[Name], signal: i32) -> Result<ExitCode> {
    let store = Store::open()?;
    each(names, |name| {
        store.check_exists(name)?;
        if !store.is_owned(name) {
            bail!("machine {name} does not run: start it with `mvm start {name}`");
        }
        if signal == SIGKILL {
            return end_by_force(&store, name);
        }
        client::ask(&store, name, Op::Kill { signal }).map(drop)
    })
}

/// `mvm wait`.
pub fn wait(names: &[Name]) -> Result<ExitCode> {
    let store = Store::open()?;
    quietly(names, |name| {
        let ending = wait_for(&store, name)?;
        if let Some(error) = &ending.error {
            eprintln!("mvm: machine {name}: {error}");
        }
        table::print(&format!("{}\n", ending.code)).map(drop)
    })
}

/// `mvm start`. One that runs is left as it is.
pub fn start(names: &[Name]) -> Result<ExitCode> {
    let store = Store::open()?;
    each(names, |name| start_one(&store, name))
}

/// `mvm restart`.
pub fn restart(names: &[Name], timeout: u32) -> Result<ExitCode> {
    let store = Store::open()?;
    each(names, |name| {
        stop_one(&store, name, timeout)?;
        start_one(&store, name)
    })
}

/// `mvm rm`.
pub fn remove(names: &[Name], force: bool) -> Result<ExitCode> {
    let store = Store::open()?;
    each(names, |name| {
        store.check_exists(name)?;
        if store.is_owned(name) {
            if !force {
                bail!(
                    "machine {name} is running: stop it first, or remove it with `mvm rm -f {name}`"
                );
            }
            end_by_force(&store, name)?;
        }
        // It may have been one that removes itself.
        match store.exists(name) {
            true => store.claim(name)?.remove(),
            false => Ok(()),
        }
    })
}

/// `mvm rename`.
pub fn rename(from: &Name, to: &Name) -> Result<ExitCode> {
    let store = Store::open()?;
    store.check_exists(from)?;
    if store.is_owned(from) {
        client::ask(&store, from, Op::Rename { to: to.clone() })?;
    } else {
        store.claim(from)?.rename(to)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// `mvm pause`, `mvm resume`: an operation of nothing but the machine itself.
pub fn ask_each(names: &[Name], op: &Op) -> Result<ExitCode> {
    let store = Store::open()?;
    each(names, |name| {
        client::ask(&store, name, op.clone()).map(drop)
    })
}

/// Does `what` with each machine and prints its name; a failure is told and does not keep it from the others.
fn each(names: &[Name], mut what: impl FnMut(&Name) -> Result<()>) -> Result<ExitCode> {
    quietly(names, |name| {
        what(name)?;
        table::print(&format!("{name}\n")).map(drop)
    })
}

fn quietly(names: &[Name], mut what: impl FnMut(&Name) -> Result<()>) -> Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for name in names {
        if let Err(error) = what(name) {
            eprintln!("mvm: {error:#}");
            code = ExitCode::from(FAILED);
        }
    }
    Ok(code)
}

fn stop_one(store: &Store, name: &Name, timeout: u32) -> Result<()> {
    store.check_exists(name)?;
    if !store.is_owned(name) {
        return Ok(());
    }
    match client::ask(store, name, Op::Stop { timeout }) {
        Err(error) if store.is_owned(name) => Err(error),
        // Told, or gone before it could tell.
        _ => await_release(store, name, RELEASE),
    }
}

fn start_one(store: &Store, name: &Name) -> Result<()> {
    store.check_exists(name)?;
    if store.is_owned(name) {
        return Ok(());
    }
    match supervise::spawn(store, name)? {
        None => Ok(()),
        Some(_) => bail!("machine {name} could not be started"),
    }
}

/// Waits until the owner of `name` has gone, so that whatever comes next finds a machine that has ended.
fn await_release(store: &Store, name: &Name, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    while store.is_owned(name) {
        if Instant::now() > deadline {
            bail!(
                "the process that owns machine {name} has not ended in {} s: end it with `mvm rm -f {name}`",
                patience.as_secs()
            );
        }
        thread::sleep(POLL);
    }
    Ok(())
}

/// Ends the machine at once: its owner does it, or is killed itself where it does not.
fn end_by_force(store: &Store, name: &Name) -> Result<()> {
    let asked = Client::connect_within(store, name, PATIENCE)
        .and_then(|mut client| client.ask(Op::Kill { signal: SIGKILL }))
        .and_then(|_| await_release(store, name, PATIENCE));
    let Err(error) = asked else { return Ok(()) };
    if !store.is_owned(name) {
        return Ok(());
    }
    tracing::debug!("the owner of machine {name} is killed: {error:#}");
    let owner = || -> Result<u32> {
        let owner = store.owner(name)?;
        Ok(owner
            .with_context(|| format!("nobody knows who owns machine {name}"))?
            .pid)
    };
    let pid = owner()?;
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let process = process.with_context(|| format!("the owner of machine {name} is no process"))?;
    let process = match pidfd_open(process, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(rustix::io::Errno::SRCH) => return await_release(store, name, PATIENCE),
        Err(error) => return Err(error).context(format!("process {pid} cannot be ended")),
    };
    // The lock is still held and the process the same, so it is not another one of that number.
    if store.is_owned(name) && owner()? == pid {
        pidfd_send_signal(&process, Signal::KILL).with_context(|| {
            format!("process {pid}, which owns machine {name}, cannot be killed")
        })?;
    }
    await_release(store, name, RELEASE)
}

/// How the machine ended, when it has.
fn wait_for(store: &Store, name: &Name) -> Result<Ending> {
    store.check_exists(name)?;
    loop {
        match store.standing(name)? {
            Standing::Ended(ending) => return Ok(ending),
            Standing::Killed => return Ok(Ending::exited(KILLED)),
            Standing::Owned => {}
        }
        let mut client = match Client::connect(store, name) {
            Ok(client) => client,
            Err(error) if store.is_owned(name) => return Err(error),
            Err(_) => continue,
        };
        match client.ask(Op::Wait) {
            Ok(Answer::Ended(ending)) => return Ok(ending),
            Ok(answer) => return Err(client.unexpected(&answer)),
            // Its owner was killed, which the lock tells.
            Err(error) => {
                await_release(store, name, PATIENCE).map_err(|_| error)?;
                store.check_exists(name)?;
            }
        }
    }
}
