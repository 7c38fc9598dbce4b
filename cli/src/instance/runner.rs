//! The runner: an mvm in the outer Linux that owns one machine's VMM, and nothing else.
//!
//! It is started by an mvm on the host, which it serves by the messages of [`super::wire`], and ends
//! with the machine. A host that goes away ends its input, and with it the machine.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use agent::protocol::{self, AGENT_PORT};
use anyhow::{Context, Result};
use devices::virtio::vsock::VsockHandle;
use kernels::cache::Cache;
use rustix::process::setpriority_process;
use vmm::Machine;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

use super::asked::{Question, Waiting};
use super::wire::{FromRunner, Relay, ToRunner, Up};
use super::{Keyboard, build, watch_end};
use crate::args::RunArgs;
use crate::threads::spawn;
use crate::{descriptors, link};

/// `VMADDR_PORT_ANY` of linux/vm_sockets.h: the kernel chooses.
const ANY_PORT: u32 = u32::MAX;

/// Connections from the host that wait to be accepted: as many as may come at once, where the outer Linux allows
/// that many (`net.core.somaxconn`).
const BACKLOG: i32 = 16_384;

/// Half of the way to the highest priority (setpriority(2)).
const ACCEPT_PRIORITY: i32 = -10;

/// How long a connection from the host may take to say what it is for.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long to wait after a connection could not be accepted, so that a lasting failure does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The way to the host; messages of several threads go out one at a time.
#[derive(Debug, Clone, Default)]
struct Host(Arc<Mutex<()>>);

impl Host {
    fn say(&self, message: &FromRunner) -> io::Result<()> {
        let _turn = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        protocol::send(io::stdout().lock(), message)
    }

    /// For threads that have nobody to report to: the host has gone, which ends the machine.
    fn tell(&self, message: &FromRunner) {
        if let Err(error) = self.say(message) {
            tracing::debug!("the host does not listen any more: {error}");
        }
    }
}

/// The serial console's output, on its way to the host.
struct Console(Host);

impl Write for Console {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.say(&FromRunner::Console(data.to_vec()))?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Makes the machine and serves the host until one of them ends.
pub fn run(args: &RunArgs) -> Result<ExitCode> {
    descriptors::raise_limit();
    let host = Host::default();
    match start(args, &host) {
        Ok(machine) => {
            obey(&machine, &host);
            // What the console printed last is out when this returns.
            drop(machine);
        }
        Err(error) => host.say(&FromRunner::Failed(format!("{error:#}")))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn start(args: &RunArgs, host: &Host) -> Result<Arc<Machine>> {
    let (relays, port) = listen()?;
    let (agents, agent_port) = listen()?;
    let cache = Cache::open()?;
    // The host serves the guest's ports: a socket made here could not be connected to there.
    let offers_ports = args.vsock_uds.is_some();
    let args = RunArgs {
        vsock_uds: None,
        ..args.clone()
    };
    let built = build::build(&args, &cache, Box::new(Console(host.clone())))?;
    let machine = Arc::new(built.machine);
    let vsock = machine.vsock().context("the machine has no vsock device")?;
    let greeted = host.clone();
    link::listen_for_hello(vsock, move |hello| {
        greeted.tell(&FromRunner::Hello(hello));
        vmm::release_program();
    })?;
    let (handle, alive) = (vsock.clone(), Arc::downgrade(&machine));
    spawn("agent", move || {
        // Thousands may come at once, and are to be taken before there is no room for more.
        if let Err(error) = setpriority_process(None, ACCEPT_PRIORITY) {
            tracing::debug!("connections to the agent are not taken first: {error}");
        }
        accept(&agents, &alive, |stream| {
            if let Err(error) = handle.join(AGENT_PORT, Vec::new(), stream) {
                tracing::debug!("a connection to the agent ended early: {error}");
            }
        });
    })?;
    let waiting = Waiting::default();
    if offers_ports {
        let (questions, asking) = (waiting.listen(vsock)?, host.clone());
        spawn("asked", move || {
            for Question { port, number } in questions {
                asking.tell(&FromRunner::Asked { port, number });
            }
        })?;
    }
    let (handle, alive) = (vsock.clone(), Arc::downgrade(&machine));
    spawn("relay", move || {
        accept(&relays, &alive, |stream| {
            let (vsock, keyboard) = (handle.clone(), Keyboard::Here(alive.clone()));
            let waiting = waiting.clone();
            let relay = move || {
                if let Err(error) = relay(stream, &vsock, &waiting, keyboard) {
                    tracing::debug!("a connection from the host ended early: {error}");
                }
            };
            if let Err(error) = spawn("relay", relay) {
                tracing::warn!("no thread for a connection from the host: {error}");
            }
        });
    })?;
    host.say(&FromRunner::Up(Up {
        port,
        agent_port,
        set_up: built.set_up,
        writes: built.writes,
    }))?;
    let ended = host.clone();
    watch_end(&machine, move |end| ended.tell(&FromRunner::Ended(end)))?;
    Ok(machine)
}

/// Does what the host asks for, until it asks no more.
fn obey(machine: &Machine, host: &Host) {
    let mut requests = io::stdin().lock();
    loop {
        match protocol::receive(&mut requests) {
            Ok(Some(ToRunner::Resume)) => machine.resume(),
            Ok(Some(ToRunner::Pause)) => machine.pause(),
            Ok(Some(ToRunner::Stats)) => {
                host.tell(&match machine.stats() {
                    Ok(stats) => FromRunner::Stats(stats),
                    Err(error) => FromRunner::Done(Err(error.to_string())),
                });
                continue;
            }
            Ok(Some(ToRunner::Stop)) => {
                machine.stop();
                continue;
            }
            Ok(None) => return,
            Err(error) => {
                tracing::warn!("the host makes no sense: {error}");
                return;
            }
        }
        host.tell(&FromRunner::Done(Ok(())));
    }
}

/// A port of the outer Linux at which the host can connect.
fn listen() -> Result<(VsockListener, u32)> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, ANY_PORT)
        .context("no vsock port for the host in the outer Linux")?;
    // The library asks for room for 128 that wait.
    rustix::net::listen(&listener, BACKLOG)
        .context("the vsock port for the host is not to be had")?;
    let port = listener
        .local_addr()
        .context("the vsock port for the host has no number")?
        .port();
    Ok((listener, port))
}

/// Gives connections from the host to `take`, and those of nobody else of the outer Linux.
fn accept(listener: &VsockListener, machine: &Weak<Machine>, take: impl Fn(VsockStream)) {
    while machine.strong_count() > 0 {
        match listener.accept() {
            Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => take(stream),
            Ok(_) => {}
            Err(error) => {
                tracing::warn!("a connection from the host cannot be accepted: {error}");
                thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

fn relay(
    stream: VsockStream,
    vsock: &VsockHandle,
    waiting: &Waiting,
    mut keyboard: Keyboard,
) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    match protocol::receive(&stream)? {
        None => Ok(()),
        Some(Relay::Dial(port)) => {
            stream.set_read_timeout(None)?;
            vsock.join(port, Vec::new(), stream)
        }
        Some(Relay::DialWithLine(port)) => {
            stream.set_read_timeout(None)?;
            let mut client = stream.try_clone()?;
            vsock.connect_with(port, stream, move |answer| {
                // A socket that nothing was written to yet takes a line at once.
                if let Ok(port) = answer
                    && let Err(error) = client.write_all(format!("OK {port}\n").as_bytes())
                {
                    tracing::debug!("a client has gone: {error}");
                }
            })
        }
        Some(Relay::Accept(number)) => {
            stream.set_read_timeout(None)?;
            if let Some(asked) = waiting.take(number) {
                asked.accept(stream);
            }
            Ok(())
        }
        Some(Relay::Refuse(number)) => {
            drop(waiting.take(number));
            Ok(())
        }
        Some(Relay::ConsoleInput) => {
            stream.set_read_timeout(None)?;
            let mut buffer = [0; 4096];
            loop {
                match io::Read::read(&mut &stream, &mut buffer)? {
                    0 => return Ok(()),
                    len => keyboard.give(buffer.get(..len).unwrap_or_default())?,
                }
            }
        }
    }
}
