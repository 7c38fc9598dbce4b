//! A machine that runs, wherever its VMM is: in this process, or in the outer Linux.
//!
//! All else of mvm (sessions, forwards, logs) is on the host in both cases and reaches the guest through
//! the instance's [`Link`].

mod asked;
mod build;
mod outer;
pub mod runner;
mod wire;

use std::io::{self, Write};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use kernels::cache::Cache;
use serde::{Deserialize, Serialize};
use vmm::{Machine, Outcome, Stats};

use self::outer::Outer;
pub use self::wire::Relay;
use crate::accel::tap::HostTap;
use crate::args::RunArgs;
use crate::event::Event;
use crate::link::{self, Link};

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// It was stopped from here.
    Stopped,
    /// It could not go on; one sentence.
    Failed(String),
}

impl From<Outcome> for Ended {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::PowerOff => Self::PowerOff,
            Outcome::Reset => Self::Reset,
            Outcome::Stopped => Self::Stopped,
            Outcome::Failed(error) => Self::Failed(format!("{:#}", anyhow::Error::new(error))),
        }
    }
}

/// Where the time before the first instruction of the guest went.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct SetUp {
    /// Kernel and images were found, the guest's files packed.
    pub preparation: Duration,
    /// Guest memory and the VM.
    pub vm: Duration,
    /// Devices.
    pub devices: Duration,
    /// Kernel and files in guest memory.
    pub kernel: Duration,
    /// vCPUs.
    pub vcpus: Duration,
}

/// What a machine is made of.
pub struct Plan<'a> {
    /// What was typed.
    pub args: &'a RunArgs,
    /// The same, word by word, without `mvm run`.
    pub words: &'a [std::ffi::OsString],
    /// The kernels.
    pub cache: &'a Cache,
    /// Takes what the serial console prints. It must not wait for long: the guest waits too.
    pub console: Box<dyn Write + Send>,
}

/// A machine. Dropping it ends the guest at once.
#[derive(Debug)]
pub struct Instance {
    place: Place,
    set_up: SetUp,
    writes: bool,
}

#[derive(Debug)]
enum Place {
    Here(Arc<Machine>),
    Outer(Box<Outer>),
}

impl Instance {
    /// Makes the machine in this process and lets it run. What becomes of it arrives at `events`.
    pub fn here(plan: Plan<'_>, events: &Sender<Event>) -> Result<Self> {
        let built = build::build(plan.args, plan.cache, plan.console)?;
        let machine = Arc::new(built.machine);
        let vsock = machine.vsock().context("the machine has no vsock device")?;
        let said = events.clone();
        link::listen_for_hello(vsock, move |hello| drop(said.send(Event::Hello(hello))))?;
        let ended = events.clone();
        watch_end(&machine, move |end| drop(ended.send(Event::Machine(end))))?;
        machine.resume();
        Ok(Self {
            place: Place::Here(machine),
            set_up: built.set_up,
            writes: built.writes,
        })
    }

    /// Makes the machine in the outer Linux, which is started where need be; `reason` says why it is not
    /// here.
    pub fn in_outer_linux(
        plan: Plan<'_>,
        reason: &str,
        tap: Option<HostTap>,
        events: &Sender<Event>,
    ) -> Result<Self> {
        let (outer, up) = Outer::start(plan, reason, tap, events)?;
        Ok(Self {
            place: Place::Outer(Box::new(outer)),
            set_up: up.set_up,
            writes: up.writes,
        })
    }

    /// The way to the guest's ports.
    pub fn link(&self) -> Result<Link> {
        match &self.place {
            Place::Here(machine) => {
                let vsock = machine.vsock().context("the machine has no vsock device")?;
                Ok(Link::Machine(vsock.clone(), Some(machine.reach())))
            }
            Place::Outer(outer) => Ok(outer.link()),
        }
    }

    /// Where the time of its making went.
    pub fn set_up(&self) -> SetUp {
        self.set_up
    }

    /// Whether it has a disk that its guest may have written to.
    pub fn writes(&self) -> bool {
        self.writes
    }

    /// Ends it now, whatever its guest does.
    pub fn stop(&self) {
        match &self.place {
            Place::Here(machine) => machine.stop(),
            Place::Outer(outer) => outer.stop(),
        }
    }

    /// What it has used.
    pub fn stats(&self) -> Result<Stats> {
        match &self.place {
            Place::Here(machine) => machine
                .stats()
                .context("what the machine has used cannot be read"),
            Place::Outer(outer) => outer.stats(),
        }
    }

    /// Takes all vCPUs out of the guest; returns when they have left it.
    pub fn pause(&self) -> Result<()> {
        match &self.place {
            Place::Here(machine) => machine.pause(),
            Place::Outer(outer) => outer.pause()?,
        }
        Ok(())
    }

    /// Lets the vCPUs run on.
    pub fn resume(&self) -> Result<()> {
        match &self.place {
            Place::Here(machine) => machine.resume(),
            Place::Outer(outer) => outer.resume()?,
        }
        Ok(())
    }

    /// What takes input for the serial console.
    pub fn keyboard(&self) -> Result<Keyboard> {
        Ok(match &self.place {
            Place::Here(machine) => Keyboard::Here(Arc::downgrade(machine)),
            Place::Outer(outer) => Keyboard::Outer(outer.console_input()?),
        })
    }
}

/// Calls `told` when `machine` has ended.
fn watch_end(machine: &Arc<Machine>, told: impl FnOnce(Ended) + Send + 'static) -> io::Result<()> {
    // Weak: whoever owns the machine must be the one to drop it.
    let watched = Arc::downgrade(machine);
    let watcher = thread::Builder::new().name("machine".into());
    watcher.spawn(move || {
        while let Some(machine) = watched.upgrade() {
            if let Some(outcome) = machine.wait_timeout(Duration::from_secs(1)) {
                return told(outcome.into());
            }
        }
    })?;
    Ok(())
}

/// The input side of a machine's serial console.
#[derive(Debug)]
pub enum Keyboard {
    /// Of a machine in this process.
    Here(Weak<Machine>),
    /// Of one in the outer Linux: bytes for it.
    Outer(std::os::unix::net::UnixStream),
}

impl Keyboard {
    /// Gives all of `input` to the serial port, waiting while its FIFO is full.
    pub fn give(&mut self, mut input: &[u8]) -> io::Result<()> {
        let machine = match self {
            Self::Here(machine) => machine,
            Self::Outer(stream) => return stream.write_all(input),
        };
        while !input.is_empty() {
            let Some(machine) = machine.upgrade() else {
                return Ok(());
            };
            let taken = machine.console_input(input);
            input = &input[taken..];
            if input.is_empty() {
                break;
            }
            let Some(room) = machine.console_room() else {
                return Ok(());
            };
            let room = room.try_clone()?;
            // Not held while waiting: the guest may never read, and the machine has to be droppable.
            drop(machine);
            room.read()?;
        }
        Ok(())
    }
}
