//! Folders that the host serves: the kernel's FUSE on one side, connections to the host on the other.
//!
//! Lifecycle: streams meet ([`Rendezvous`](crate::rendezvous)) → a FUSE filesystem is made, and `/dev/fuse` cloned
//! for each queue → pumps carry requests and replies → the first requests are answered → it is mounted →
//! this thread does what the host asks for on the control connection → the mount ends, by whomever → all
//! is freed. Nothing waits for the host without being woken by the end of its connections: that
//! has the kernel give up the mount, and whoever waits for it gets an error.

mod ahead;
mod alarm;
mod attach;
mod attributes;
mod call;
mod delivery;
mod device;
mod ending;
mod fresh;
mod handle;
mod known;
mod message;
mod order;
mod outbox;
mod overlay;
mod pinned;
mod point;
mod pump;
mod redo;
mod replay;
mod requests;
#[cfg(test)]
mod tests;
mod tune;
mod usage;
mod view;
mod watchers;
mod whole;
mod window;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use agent::protocol::{
    self, FromMount, HostMemory, MAX_MOUNT_QUEUES, Mount, MountPoint, MountStream, Mounted, ToMount,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use self::ahead::Ahead;
use self::alarm::Alarm;
use self::attach::{Attached, Filesystem, Place, Refusal};
use self::call::Calls;
use self::delivery::Delivery;
use self::ending::{Ending, Why};
use self::known::Known;
use self::order::Replies;
use self::outbox::Outbox;
use self::overlay::Overlay;
use self::point::Point;
use self::pump::Notices;
use self::replay::Replayer;
use self::view::Lookout;
use self::window::Lending;
use crate::connection::Connection;
use crate::rendezvous::PATIENCE;
use crate::root::Missing;
use crate::serve::Machine;

/// `S_IFMT` and `S_IFREG` of inode(7).
const KIND: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;

/// How often, and after what pause, an unmount is tried again: files are closed a moment after they were, and
/// a process that is just being started holds what the agent has open.
const BUSY_TRIES: u32 = 20;
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// How long the kernel may take to let go of what was unmounted.
const UNMOUNTED: Timespec = Timespec {
    tv_sec: 2,
    tv_nsec: 0,
};

/// Mounts what `request` asks for, and serves its control connection to the end of either.
pub fn run(machine: &Machine, control: &Connection, request: &Mount) -> io::Result<()> {
    let folder = match Folder::mount(machine, request) {
        Ok(folder) => folder,
        Err(Refused { why, carrying }) => {
            // First of all: a host whose other connections end takes this one for ended, too.
            let said = protocol::send(control, &FromMount::Mounted(Err(why)));
            if let Some(carrying) = carrying {
                carrying.end();
            }
            return said;
        }
    };
    let served = folder.serve(control);
    folder.end();
    served
}

/// A folder while it is mounted.
struct Folder {
    carrying: Carrying,
    attached: Arc<Attached>,
    replayer: Replayer,
}

/// What was not mounted.
struct Refused {
    /// One sentence.
    why: String,
    /// What is still to be ended.
    carrying: Option<Box<Carrying>>,
}

impl From<String> for Refused {
    fn from(why: String) -> Self {
        Self {
            why,
            carrying: None,
        }
    }
}

/// What carries a filesystem's messages.
struct Carrying {
    device: Arc<OwnedFd>,
    ending: Arc<Ending>,
    streams: Vec<Arc<Connection>>,
    replies: Arc<Replies>,
    queues: u32,
    /// What can be done where the host reaches the guest's memory.
    memory: Option<HostMemory>,
    outboxes: Vec<Arc<Outbox>>,
    /// Something is in an outbox.
    held_back: Arc<Alarm>,
    /// Names below an overlay have changed.
    changed: Arc<Alarm>,
    overlay: Arc<Overlay>,
    known: Arc<Known>,
    ahead: Arc<Ahead>,
    pumps: Vec<JoinHandle<()>>,
}

impl Folder {
    fn mount(machine: &Machine, request: &Mount) -> Result<Self, Refused> {
        if !(1..=MAX_MOUNT_QUEUES).contains(&request.queues) {
            let queues = request.queues;
            return Err(format!("a mount has 1 to {MAX_MOUNT_QUEUES} queues, not {queues}").into());
        }
        let device = Arc::new(device::open_new()?);
        let filesystem = Filesystem::new(&device, request)?;
        let mut carrying = Carrying::start(machine, request, device, &filesystem)?;
        match Self::attach(machine, request, filesystem, &mut carrying) {
            Ok((attached, replayer)) => Ok(Self {
                carrying,
                attached,
                replayer,
            }),
            Err(why) => Err(Refused {
                why,
                carrying: Some(Box::new(carrying)),
            }),
        }
    }

    fn attach(
        machine: &Machine,
        request: &Mount,
        filesystem: Filesystem,
        carrying: &mut Carrying,
    ) -> Result<(Arc<Attached>, Replayer), String> {
        filesystem
            .try_out()
            .map_err(|sentence| match carrying.ending.why() {
                Some(Why::Failed(why)) => format!("{sentence} ({why})"),
                _ => sentence,
            })?;
        let attached = match (&request.at, &machine.missing) {
            (MountPoint::Path(path), _) => {
                machine.wait_for_root()?;
                let is_directory = request.mode & KIND != REGULAR;
                let Point {
                    target,
                    parent,
                    name,
                } = Point::make(&machine.root, path, is_directory)?;
                filesystem.attach(&target, Place::Below(parent, name))?
            }
            (MountPoint::Root, Missing::All(expected)) => {
                let attach = |target| filesystem.attach(&target, Place::Root);
                expected.complete(&machine.root, attach)?
            }
            (MountPoint::Root, _) => {
                return Err("the machine has a root of its own already".to_owned());
            }
        };
        let attached = Arc::new(attached);
        tune::read_ahead(attached.device);
        let (tree, device) = (Arc::clone(&machine.root), Arc::clone(&carrying.device));
        let lookout = Lookout::new(Arc::clone(&attached), Arc::clone(&tree));
        let started = pump::start_ahead(Arc::clone(&carrying.ahead), lookout).and_then(|listing| {
            carrying.pumps.push(listing);
            Replayer::start(Arc::clone(&attached), tree, device)
        });
        let replayer = started.map_err(|error| {
            // What is mounted is seen by nobody yet who could use it.
            let _ = attached.unmount(UnmountFlags::DETACH);
            format!("no thread can be started for the shared folder: {error}")
        })?;
        Ok((attached, replayer))
    }

    /// Does what the host asks for, until the mount or the connection ends.
    fn serve(&self, control: &Connection) -> io::Result<()> {
        let replayer = self.replayer.thread;
        protocol::send(control, &FromMount::Mounted(Ok(Mounted { replayer })))?;
        loop {
            match self.wait(control)? {
                Happened::Ended => {
                    if let Some(Why::Failed(why)) = self.carrying.ending.why() {
                        eprintln!("mvm-agent: a shared folder is given up: {why}");
                    }
                    return protocol::send(control, &FromMount::Unmounted(Ok(())));
                }
                Happened::Replayed => protocol::send(control, &FromMount::Replayed)?,
                Happened::Spoken => match protocol::receive(control)? {
                    None => return Ok(()),
                    Some(ToMount::Replay(changes)) => self.replayer.replay(changes),
                    Some(ToMount::Unmount { force: true }) => self.take_away(),
                    Some(ToMount::Unmount { force: false }) => {
                        if let Err(why) = self.unmount() {
                            protocol::send(control, &FromMount::Unmounted(Err(why)))?;
                        }
                    }
                },
            }
        }
    }

    /// Waits for whatever comes first.
    fn wait(&self, control: &Connection) -> io::Result<Happened> {
        loop {
            let mut fds = [
                PollFd::new(&*self.carrying.ending, PollFlags::IN),
                PollFd::new(&self.replayer, PollFlags::IN),
                PollFd::new(control, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [ended, replayed, spoken] = fds.map(|fd| !fd.revents().is_empty());
            if ended {
                return Ok(Happened::Ended);
            }
            if replayed && self.replayer.take_replayed() {
                return Ok(Happened::Replayed);
            }
            if spoken {
                return Ok(Happened::Spoken);
            }
        }
    }

    /// Unmounts what nobody uses. Fails with a sentence; where it succeeds the mount's end follows.
    fn unmount(&self) -> Result<(), String> {
        self.replayer.let_go();
        let mut unmounted = self.attached.unmount(UnmountFlags::empty());
        for _ in 0..BUSY_TRIES {
            if unmounted != Err(Refusal::Busy) {
                break;
            }
            thread::sleep(BUSY_PAUSE);
            unmounted = self.attached.unmount(UnmountFlags::empty());
        }
        unmounted.map_err(|refusal| match refusal {
            Refusal::Root => "it is the machine's root".to_owned(),
            Refusal::Busy => usage::sentence(self.attached.device),
            Refusal::Elsewhere => "something else is mounted over it, or it was moved".to_owned(),
            Refusal::Other(errno) => format!("it cannot be unmounted: {errno}"),
        })?;
        let ended = &mut [PollFd::new(&*self.carrying.ending, PollFlags::IN)];
        match poll(ended, Some(&UNMOUNTED)) {
            Ok(0) => Err(
                "it is not at its place any more, but still mounted elsewhere, in a container for example"
                    .to_owned(),
            ),
            // An interrupted wait only means that the end is waited for elsewhere.
            _ => Ok(()),
        }
    }

    /// Ends the mount whoever uses it.
    fn take_away(&self) {
        self.carrying.ending.abort();
        // A mount that is not at its place is of no use from now on either.
        let _ = self.attached.unmount(UnmountFlags::DETACH);
    }

    /// Ends the mount, in whatever state it is, and frees everything.
    fn end(self) {
        self.take_away();
        self.carrying.end();
        self.replayer.end();
    }
}

/// What a mount's thread is to deal with.
enum Happened {
    /// The mount has ended.
    Ended,
    /// The host's changes were done again.
    Replayed,
    /// The host has something to say.
    Spoken,
}

impl Carrying {
    /// Collects the mount's streams and starts the threads that serve `filesystem` with them; fails with a sentence.
    fn start(
        machine: &Machine,
        request: &Mount,
        device: Arc<OwnedFd>,
        filesystem: &Filesystem,
    ) -> Result<Self, String> {
        let queues = (0..request.queues).map(|queue| MountStream::Requests { queue });
        let kinds: Vec<_> = queues.chain([MountStream::Notifications]).collect();
        let collected = machine.mounts.collect(request.mount, &kinds, PATIENCE);
        let streams = collected.map_err(|missing| {
            let patience = PATIENCE.as_secs();
            let missing = missing.len();
            format!(
                "the host did not open {missing} of the folder's connections within {patience} seconds"
            )
        })?;
        let ending = Ending::new(filesystem.abort_file()?).map(Arc::new);
        // A root that the guest cannot change has an overlay over it.
        let is_below_overlay = matches!(request.at, MountPoint::Root) && request.read_only;
        let changed: Arc<Alarm> = Arc::default();
        let mut carrying = Self {
            ending: ending.map_err(|error| format!("no event can be made: {error}"))?,
            streams: streams.values().cloned().collect(),
            device,
            replies: Arc::new(Replies::new(2 * request.queues)),
            queues: request.queues,
            memory: request.memory.clone(),
            outboxes: Vec::new(),
            held_back: Arc::default(),
            overlay: Arc::new(match is_below_overlay {
                true => Overlay::with(Arc::clone(&changed)),
                false => Overlay::none(),
            }),
            changed,
            known: Arc::default(),
            ahead: Arc::default(),
            pumps: Vec::new(),
        };
        match carrying.start_all(streams, is_below_overlay) {
            Ok(()) => Ok(carrying),
            Err(error) => {
                carrying.end();
                Err(format!(
                    "no thread can be started for the shared folder: {error}"
                ))
            }
        }
    }

    fn start_all(
        &mut self,
        streams: impl IntoIterator<Item = (MountStream, Arc<Connection>)>,
        is_below_overlay: bool,
    ) -> io::Result<()> {
        for (kind, stream) in streams {
            self.start_pumps(kind, stream)?;
        }
        let (alarm, outboxes) = (Arc::clone(&self.held_back), self.outboxes.clone());
        self.pumps.push(pump::start_releases(alarm, outboxes)?);
        if is_below_overlay {
            let alarm = Arc::clone(&self.changed);
            self.pumps.push(pump::start_forgetting(alarm)?);
        }
        Ok(())
    }

    fn start_pumps(&mut self, kind: MountStream, stream: Arc<Connection>) -> io::Result<()> {
        let device = &self.device;
        let ending = || Arc::clone(&self.ending);
        let given = Arc::clone(&self.replies);
        let MountStream::Requests { queue } = kind else {
            let notices = Notices {
                device: Arc::clone(device),
                after: given,
                known: Arc::clone(&self.known),
                overlay: Arc::clone(&self.overlay),
            };
            let pump = pump::start_notifications(stream, notices, ending())?;
            self.pumps.push(pump);
            return Ok(());
        };
        tune::widen(&stream);
        let own = match queue {
            0 => Arc::clone(device),
            _ => Arc::new(device::clone(device)?),
        };
        let by_stream = Delivery {
            device: own,
            lending: Arc::new(Lending::new(self.memory.is_some())),
            known: Arc::clone(&self.known),
            ahead: Arc::clone(&self.ahead),
            replies: given,
            way: queue,
        };
        let by_calls = Delivery {
            way: self.queues + queue,
            ..by_stream.clone()
        };
        let replies = pump::start_replies(Arc::clone(&stream), by_stream, ending())?;
        self.pumps.push(replies);
        let outbox = Arc::new(Outbox::new(stream, Arc::clone(&self.held_back)));
        let calls = self.memory.as_ref().and_then(|memory| {
            let number = memory.calls.get(usize::try_from(queue).ok()?)?;
            Some(Calls {
                port: memory.call_port,
                number: *number,
            })
        });
        let requests = pump::start_requests(Arc::clone(&outbox), calls, by_calls, ending())?;
        self.pumps.push(requests);
        self.outboxes.push(outbox);
        Ok(())
    }

    /// Has the kernel give up the filesystem, wakes the pumps, and waits for them.
    fn end(self) {
        self.ending.abort();
        self.replies.end();
        self.held_back.end();
        self.changed.end();
        self.ahead.end();
        for stream in &self.streams {
            stream.hang_up();
        }
        for pump in self.pumps {
            // A pump that panicked has taken the agent down with it (panic = "abort").
            let _ = pump.join();
        }
    }
}
