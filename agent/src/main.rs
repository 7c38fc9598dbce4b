//! The agent: PID 1 of every machine that `mvm` starts, or the companion of an image's own init.
//!
//! The host writes it into the initramfs as /init. It brings the machine up, says so over vsock,
//! and from then on runs what the host asks for. One duty a file; this one holds their order.

mod button;
mod clock;
mod command;
mod connection;
mod console;
mod copy;
mod directory;
mod entropy;
mod forward;
mod hello;
mod init;
mod loopback;
mod modules;
mod mount;
mod mounts;
mod power;
mod priority;
mod process;
mod reap;
mod rendezvous;
mod root;
mod serve;
mod session;
mod settings;
mod signals;
mod socket_option;
mod spawn;
mod stream;
mod terminal;
#[cfg(test)]
mod tests;
mod tree;
mod users;

use std::convert::Infallible;
use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use agent::guest::{GUEST_PATH, Guest};
use anyhow::{Context, Result};
use rustix::process::{Resource, Rlimit, getpid, setrlimit};

use crate::forward::Reactor;
use crate::hello::Listener;
use crate::reap::Reaper;
use crate::root::Missing;
use crate::serve::Machine;
use crate::tree::Tree;

/// Open files: soft for the agent, hard for its commands (the default of current distributions).
const OPEN_FILES: u64 = 524_288;

fn main() {
    let started = clock::since_boot();
    if !getpid().is_init() {
        eprintln!(
            "mvm-agent is the first program of a virtual machine; `mvm run` starts one with it"
        );
        std::process::exit(2);
    }
    console::power_off_on_panic();
    share_heap();
    let Err(error) = run(started);
    let reason = format!("{error:#}");
    eprintln!("mvm-agent: {reason}");
    if let Err(error) = hello::failed(reason) {
        eprintln!("mvm-agent: that could not be told to the host: {error:#}");
    }
    power::cut();
}

/// Brings the machine up and serves the host; comes back only with what made that impossible.
fn run(started: Duration) -> Result<Infallible> {
    mounts::mount_virtual()?;
    console::attach().context("there is neither a console nor /dev/null")?;
    let guest = read_guest()?;
    modules::load(&guest.modules)?;
    entropy::add(&guest.entropy)
        .context("the host's random bytes cannot be added to the entropy pool")?;
    clock::correct(Duration::from_nanos(guest.epoch_ns)).context("the clock cannot be set")?;
    rustix::system::sethostname(guest.hostname.as_bytes())
        .with_context(|| format!("{:?} cannot be the machine's host name", guest.hostname))?;
    loopback::bring_up().context("the loopback interface cannot be brought up")?;
    raise_open_files()?;
    settings::apply(&guest.settings);

    let reaper = Reaper::default();
    let mut root = root::prepare(&guest, &reaper)?;
    if let Some(program) = &guest.init {
        let successor = init::step_beside(program)?;
        match &mut root.missing {
            Missing::All(expected) => {
                if let Err(error) = init::carry_root() {
                    eprintln!("mvm-agent: systemd may end the agent before the machine: {error:#}");
                }
                expected.hand_over_to(successor);
            }
            _ => successor.take_over(&root.tree)?,
        }
    }
    let initramfs = Tree::own().context("the initramfs cannot be opened")?;
    let forwarder = forward::Handle::new().context("no event can be made")?;
    let machine = Machine::new(root, initramfs, reaper, forwarder, power::off);
    let machine = Arc::new(machine);
    serve(&machine, started)
}

fn serve(machine: &Arc<Machine>, started: Duration) -> Result<Infallible> {
    let is_init = getpid().is_init();
    let carries_root = matches!(machine.missing, Missing::All(_));
    if is_init || carries_root {
        signals::block();
    }
    let listener = Listener::new()?;
    hello::ready(started)?;

    let reaping = Arc::clone(machine);
    thread::Builder::new()
        .name("reaper".to_owned())
        .spawn(move || reaping.reaper.run())
        .context("the thread that reaps processes cannot be started")?;
    if is_init {
        signals::start(machine).context("the thread that waits for signals cannot be started")?;
        button::start(machine).context("the power button cannot be watched")?;
    } else if carries_root {
        signals::outlive(init::hold_in_memory)
            .context("the thread that waits for signals cannot be started")?;
    }
    priority::raise_this_thread();
    let serving = Arc::clone(machine);
    let hand_on = move |connection, open| serve::start(&serving, connection, open);
    let handle = machine.forwarder.clone();
    let root = Arc::clone(&machine.root);
    Reactor::new(Box::new(listener), handle, root, Box::new(hand_on))?.run()
}

/// Reads what the host wrote, and removes it: it holds the seed of the entropy pool.
fn read_guest() -> Result<Guest> {
    let encoded = fs::read(GUEST_PATH).with_context(|| format!("{GUEST_PATH} cannot be read"))?;
    fs::remove_file(GUEST_PATH).with_context(|| format!("{GUEST_PATH} cannot be removed"))?;
    postcard::from_bytes(&encoded)
        .with_context(|| format!("{GUEST_PATH} is not what this agent expects"))
}

/// Lets all threads use one heap: by default each new one would set up an arena of its own.
fn share_heap() {
    // SAFETY: there is one thread. A C library that refuses only goes on as it would have.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

fn raise_open_files() -> Result<()> {
    let limit = Rlimit {
        current: Some(OPEN_FILES),
        maximum: Some(OPEN_FILES),
    };
    setrlimit(Resource::Nofile, limit).context("the limit of open files cannot be raised")
}
