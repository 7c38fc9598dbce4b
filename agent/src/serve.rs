//! Connections from the host that are served by a thread of their own: commands, and single requests.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use agent::protocol::{
    self, Clock, Exec, FromMount, FromSession, Identified, MountStream, Open, Refusal, ShiftClock,
    StreamKind, UserIds,
};

use crate::clock;
use crate::connection::Connection;
use crate::copy;
use crate::directory;
use crate::forward;
use crate::mount;
use crate::reap::Reaper;
use crate::rendezvous::{PATIENCE, Rendezvous};
use crate::root::{Missing, Prepared};
use crate::session;
use crate::tree::Tree;

/// Sessions at a time. Each has up to four connections and four threads.
const MAX_SESSIONS: usize = 256;

/// Shared folders at a time. Each has a thread for every direction of every connection.
const MAX_MOUNTS: usize = 256;

/// Connections at a time: those of all sessions, and as many that wait for theirs.
const MAX_CONNECTIONS: usize = 8 * MAX_SESSIONS;

/// Room for decoding a message and starting a command; large data is on the heap.
const STACK: usize = 128 << 10;

/// How long the other side may take over one message.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// What all connections share.
#[derive(Debug)]
pub struct Machine {
    /// The tree in which commands run.
    pub root: Arc<Tree>,
    /// The tree that the agent was started in.
    pub initramfs: Tree,
    /// All children.
    pub reaper: Reaper,
    /// What the root is waiting for, and commands with it.
    pub missing: Missing,
    /// Streams and the sessions they belong to.
    pub rendezvous: Rendezvous<StreamKind>,
    /// Streams and the mounts they belong to.
    pub mounts: Rendezvous<MountStream>,
    /// Serves connections between the host and what is in the guest.
    pub forwarder: forward::Handle,
    /// Powers the machine off, with so long between SIGTERM and SIGKILL.
    pub power_off: fn(&Machine, Duration),
    sessions: Count,
    folders: Count,
    connections: Count,
}

impl Machine {
    /// A machine without any session.
    pub fn new(
        root: Prepared,
        initramfs: Tree,
        reaper: Reaper,
        forwarder: forward::Handle,
        power_off: fn(&Machine, Duration),
    ) -> Self {
        Self {
            root: Arc::new(root.tree),
            missing: root.missing,
            initramfs,
            reaper,
            rendezvous: Rendezvous::default(),
            mounts: Rendezvous::default(),
            forwarder,
            power_off,
            sessions: Count::default(),
            folders: Count::default(),
            connections: Count::default(),
        }
    }

    /// Waits until the root is complete; fails with a sentence.
    pub fn wait_for_root(&self) -> Result<(), String> {
        let furnishing = match &self.missing {
            Missing::Nothing => return Ok(()),
            Missing::All(expected) => return expected.wait(),
            Missing::Furnishing(child) => child,
        };
        let finished = furnishing.exit.wait(PATIENCE);
        finished.map_err(|error| format!("the machine's root is not complete: {error}"))?;
        Ok(())
    }
}

/// Serves a connection, whose first message was `open`, on a thread of its own.
pub fn start(machine: &Arc<Machine>, connection: Connection, open: Open) {
    let shared = Arc::clone(machine);
    let serve = move || {
        let Some(_place) = shared.connections.enter(MAX_CONNECTIONS) else {
            eprintln!(
                "mvm-agent: more than {MAX_CONNECTIONS} connections at a time: one is refused"
            );
            return;
        };
        if let Err(error) = serve(&shared, connection, open) {
            eprintln!("mvm-agent: a connection from the host ended early: {error}");
        }
    };
    let started = thread::Builder::new().stack_size(STACK).spawn(serve);
    if let Err(error) = started {
        eprintln!("mvm-agent: no thread for a connection from the host, which is closed: {error}");
    }
}

fn serve(machine: &Machine, connection: Connection, open: Open) -> io::Result<()> {
    connection.set_timeouts(Some(MESSAGE_TIMEOUT))?;
    match open {
        Open::Exec(exec) => execute(machine, &connection, &exec),
        Open::Stream { session, kind } => {
            connection.set_timeouts(None)?;
            machine
                .rendezvous
                .offer(session, kind, connection, PATIENCE);
            Ok(())
        }
        Open::PowerOff { grace_ms } => {
            (machine.power_off)(machine, Duration::from_millis(grace_ms.into()));
            Ok(())
        }
        Open::Clock => {
            while let Some(ShiftClock { by_ns }) = protocol::receive(&connection)? {
                let time = clock::shift(by_ns)
                    .map_err(|error| format!("the machine's clock cannot be set: {error}"));
                protocol::send(&connection, &Clock(time))?;
            }
            Ok(())
        }
        Open::MakeDirectories(directories) => {
            protocol::send(&connection, &directory::make_all(machine, &directories))
        }
        Open::Identify { user } => protocol::send(&connection, &identify(machine, &user)),
        // The reactor's own, which it hands to nobody.
        Open::Dial(_) | Open::Attach { .. } | Open::Forward | Open::Datagrams => Ok(()),
        Open::Pack(request) => copy::pack(machine, &connection, request),
        Open::Unpack(request) => copy::unpack(machine, &connection, &request),
        Open::Mount(request) => match machine.folders.enter(MAX_MOUNTS) {
            Some(_place) => mount::run(machine, &connection, &request),
            None => {
                let message = format!("the machine has {MAX_MOUNTS} shared folders already");
                protocol::send(&connection, &FromMount::Mounted(Err(message)))
            }
        },
        Open::MountStream { mount, kind } => {
            connection.set_timeouts(None)?;
            machine.mounts.offer(mount, kind, connection, PATIENCE);
            Ok(())
        }
    }
}

fn execute(machine: &Machine, control: &Connection, exec: &Exec) -> io::Result<()> {
    match machine.sessions.enter(MAX_SESSIONS) {
        Some(_place) => session::run(machine, control, exec),
        None => {
            let message = format!("the machine runs {MAX_SESSIONS} commands at a time already");
            let reason = Refusal::Other;
            protocol::send(control, &FromSession::Refused { reason, message })
        }
    }
}

fn identify(machine: &Machine, user: &str) -> Identified {
    let found = machine.wait_for_root().and_then(|()| {
        let found = session::find_user(&machine.root, Some(user));
        found.map_err(|refused| refused.message)
    });
    Identified(found.map(|user| UserIds {
        uid: user.uid,
        gid: user.gid,
    }))
}

/// How many are inside, bounded.
#[derive(Debug, Default)]
struct Count(AtomicUsize);

impl Count {
    fn enter(&self, limit: usize) -> Option<Place<'_>> {
        let place = Place(&self.0);
        // The place counts itself out again where there was no room.
        (self.0.fetch_add(1, Ordering::Relaxed) < limit).then_some(place)
    }
}

/// One of those inside, until dropped.
struct Place<'a>(&'a AtomicUsize);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
