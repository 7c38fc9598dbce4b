//! The process that owns a machine, attached to a terminal or in the background: it makes the machine,
//! forwards its ports, answers at its control socket, and writes down how it ended.
//!
//! One loop (`attend`) decides; [`Owned`] is what threads of the control socket share with it.

mod attend;
mod clock;
mod control;
mod declare;
mod mount;

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Context, Result};
use kernels::cache::Cache;

use self::attend::Attendant;
use crate::accel::tap::HostTap;
use crate::accel::{self, Choice};
use crate::args::{Net, RunArgs};
use crate::console::{Console, Tail};
use crate::control::{Latch, Server, protocol::State};
use crate::descriptors;
use crate::event::{self, Event};
use crate::folder::Folders;
use crate::forward::{Forwarder, proxy::Proxy};
use crate::host_root::HostRoot;
use crate::instance::{Instance, Plan};
use crate::record::{self, Stream};
use crate::session::Output;
use crate::store::{Claim, Ending, Name, Timestamp};
use crate::timing::Timing;

/// Who is there while the machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The caller of `mvm run`: the command has its standard streams, and the machine is gone after it.
    Attached,
    /// Nobody: the command's output is recorded, and the machine can be started again.
    Background,
}

/// A machine that this process owns.
#[derive(Debug)]
pub struct Owned {
    args: RunArgs,
    /// The name it was started with.
    name: Name,
    accel: &'static str,
    started: Timestamp,
    instance: Instance,
    forwarder: Forwarder,
    folders: Arc<Folders>,
    /// What it has of the host's root, where that is its own.
    host_root: Option<HostRoot>,
    proxy: Option<Proxy>,
    events: Sender<Event>,
    /// None once the machine is nobody's any more.
    claim: Mutex<Option<Claim>>,
    state: Mutex<State>,
    kernel: OnceLock<String>,
    ended: Latch,
}

impl Owned {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn claim(&self) -> MutexGuard<'_, Option<Claim>> {
        self.claim.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the guest's clock to the host's, where the guest is up.
    fn set_clock(&self) {
        if self.kernel.get().is_none() || *self.state() == State::Paused {
            return;
        }
        let set = self.instance.link().and_then(|link| clock::set(&link));
        if let Err(error) = set {
            tracing::warn!("the guest's clock is not set: {error:#}");
        }
    }
}

/// Makes the machine that `args` describe, `words` being the same as typed, and owns it until it has ended.
pub fn own(
    args: RunArgs,
    words: &[OsString],
    claim: Claim,
    mode: Mode,
    timing: Timing,
) -> Result<ExitCode> {
    descriptors::raise_limit();
    let (events, inbox) = mpsc::channel();
    // From here on a signal ends the machine in an orderly way.
    event::watch_signals(events.clone()).context("signals cannot be watched")?;
    let dir = claim.dir();
    let tail = Tail::default();
    let output = output(mode, &dir)?;
    let console = Console::new(tail.clone(), console_watcher(&args, mode, &dir)?);
    let machine = match make(args, words, claim, console, &events) {
        Ok(machine) => machine,
        Err((claim, error)) => {
            match mode {
                Mode::Attached => claim.remove()?,
                Mode::Background => claim.ended(&Ending::failed(format!("{error:#}")))?,
            }
            return Err(error);
        }
    };
    let mut attendant = Attendant::new(machine.clone(), mode, tail, inbox, timing, output);
    let attended = serve(&machine).and_then(|server| {
        let result = attendant.attend();
        finish(&machine, mode, &result);
        drop(server);
        result
    });
    machine.forwarder.end();
    machine.folders.end();
    attendant.report();
    let code = attended?;
    Ok(ExitCode::from(u8::try_from(code & 0xff).unwrap_or(u8::MAX)))
}

/// Makes the machine and lets it run; gives the claim back where that fails.
fn make(
    args: RunArgs,
    words: &[OsString],
    claim: Claim,
    console: Console,
    events: &Sender<Event>,
) -> Result<Arc<Owned>, (Box<Claim>, anyhow::Error)> {
    let made = || -> Result<Made> {
        // What is in the way of a port or a folder shows before anything is booted.
        let definition = claim.definition()?;
        let volumes = declare::volumes(&args, &definition)?;
        let host_root = HostRoot::of(&args, &volumes)?;
        if let Some(note) = host_root.as_ref().and_then(HostRoot::unshared) {
            eprintln!("mvm: {note}");
        }
        let folders = declare::folders(&args, volumes, host_root.as_ref())?;
        let declared = declare::declarations(&args, &definition)?;
        let chosen = declare::without_host_port(&declared);
        let forwarder = Forwarder::new(declared, |announcement| {
            eprintln!("mvm: {announcement}");
        })?;
        for forward in forwarder.list()? {
            if chosen.contains(&forward.guest) {
                eprintln!("mvm: {} → guest port {}", forward.host, forward.guest);
            }
        }
        let proxy = declare::proxy(&args, &forwarder)?;
        let cache = Cache::open()?;
        let plan = Plan {
            args: &args,
            words,
            cache: &cache,
            console: Box::new(console),
        };
        let (accel, instance) = launch(plan, events)?;
        Ok(Made {
            accel,
            instance,
            forwarder,
            folders,
            host_root,
            proxy,
            ended: Latch::new()?,
        })
    };
    match made() {
        Err(error) => Err((Box::new(claim), error)),
        Ok(made) => Ok(Arc::new(Owned {
            args,
            name: claim.name().clone(),
            accel: made.accel,
            started: Timestamp::now(),
            instance: made.instance,
            forwarder: made.forwarder,
            folders: Arc::new(made.folders),
            host_root: made.host_root,
            proxy: made.proxy,
            events: events.clone(),
            claim: Mutex::new(Some(claim)),
            state: Mutex::new(State::Starting),
            kernel: OnceLock::new(),
            ended: made.ended,
        })),
    }
}

/// What can fail of an [`Owned`].
struct Made {
    accel: &'static str,
    instance: Instance,
    forwarder: Forwarder,
    folders: Folders,
    host_root: Option<HostRoot>,
    proxy: Option<Proxy>,
    ended: Latch,
}

/// Makes the machine on this host's KVM, or in the outer Linux.
fn launch(plan: Plan<'_>, events: &Sender<Event>) -> Result<(&'static str, Instance)> {
    match accel::choose(plan.args.host.accel)? {
        Choice::Kvm => Ok(("kvm", Instance::here(plan, events)?)),
        Choice::Tcg { reason } => {
            let tap = match &plan.args.net {
                Net::None => None,
                Net::Tap(name) => Some(HostTap::open(name)?),
            };
            let instance = Instance::in_outer_linux(plan, &reason, tap, events)?;
            Ok(("tcg", instance))
        }
    }
}

/// Answers at the machine's control socket from now on.
fn serve(machine: &Arc<Owned>) -> Result<Server> {
    let listener = {
        let claim = machine.claim();
        let claim = claim.as_ref().context("the machine is nobody's")?;
        claim.started()?;
        claim.bind()?
    };
    clock::follow(Arc::downgrade(machine))?;
    Server::start(listener, machine.clone()).context("the control socket cannot be served")
}

/// Writes down how the machine ended, and tells whoever waits for it.
fn finish(machine: &Owned, mode: Mode, result: &Result<i32>) {
    machine.instance.stop();
    let ending = match result {
        Ok(code) => Ending::exited(u8::try_from(code & 0xff).unwrap_or(u8::MAX)),
        Err(error) => Ending::failed(format!("{error:#}")),
    };
    let Some(claim) = machine.claim().take() else {
        return;
    };
    let kept = mode == Mode::Background && !machine.args.rm;
    let written = claim.ended(&ending);
    machine.ended.announce(ending);
    let done = if kept { written } else { claim.remove() };
    if let Err(error) = done {
        eprintln!("mvm: {error:#}");
    }
}

/// Where the command's output goes.
fn output(mode: Mode, dir: &std::path::Path) -> Result<Output> {
    Ok(match mode {
        Mode::Attached => Output::Stdio,
        Mode::Background => Output::Record(Arc::new(record::Writer::open(dir, record::LOG)?)),
    })
}

/// Who watches the serial console: standard output where it is the interface, standard error beside a command.
fn console_watcher(
    args: &RunArgs,
    mode: Mode,
    dir: &std::path::Path,
) -> Result<Option<Box<dyn std::io::Write + Send>>> {
    Ok(match mode {
        Mode::Background => {
            let writer = record::Writer::open(dir, record::CONSOLE)?;
            Some(Box::new(Recorded(writer)))
        }
        Mode::Attached if args.console || args.initrd.is_some() => {
            Some(Box::new(std::io::stdout()))
        }
        Mode::Attached if args.verbose => Some(Box::new(std::io::stderr())),
        Mode::Attached => None,
    })
}

/// The serial console's output, on its way into the machine's log.
struct Recorded(record::Writer);

impl std::io::Write for Recorded {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.write(Stream::Console, data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
