//! Folders mounted by this machine's own kernel, and served by the host's server over Unix sockets.
//!
//! They need root and FUSE, and say where they are skipped.

mod advising;
mod mounting;
mod posix;
mod replaying;

use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use agent::protocol::{
    self, AFTER_REPLIES, ATTRIBUTES, EMPTY, ExitStatus, FromMount, LIST, Mount, MountPoint,
    MountStream, Mounted, NEW, Open, ToMount, for_agent,
};
use rustix::mount::UnmountFlags;
use share::{Advice, Channel, HostEvent, Options, Share};

use crate::tests::{connect, run_outside};

/// Connections of requests.
const QUEUES: u32 = 3;

/// Messages follow each other on a stream.
struct Queue {
    from: Mutex<UnixStream>,
    to: Mutex<UnixStream>,
    /// The opcodes of all requests.
    seen: Arc<Mutex<Vec<u32>>>,
    /// How many replies there were.
    replies: AtomicU64,
}

impl Queue {
    fn new(stream: &UnixStream, seen: &Arc<Mutex<Vec<u32>>>) -> Self {
        Self {
            from: Mutex::new(stream.try_clone().unwrap()),
            to: Mutex::new(stream.try_clone().unwrap()),
            seen: Arc::clone(seen),
            replies: AtomicU64::new(0),
        }
    }
}

impl Channel for Queue {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut from = self.from.lock().unwrap();
        match from.read_exact(&mut buffer[..4]) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
            read => read?,
        }
        let length = u32::from_le_bytes(buffer[..4].try_into().unwrap()) as usize;
        from.read_exact(&mut buffer[4..length])?;
        let opcode = u32::from_le_bytes(buffer[4..8].try_into().unwrap());
        self.seen.lock().unwrap().push(opcode);
        Ok(length)
    }

    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        self.replies.fetch_add(1, Ordering::Relaxed);
        send(&self.to, parts)
    }

    fn takes_advice(&self) -> bool {
        true
    }

    fn send_with_advice(&self, parts: &[IoSlice<'_>], advice: &[Advice]) -> io::Result<()> {
        let told = |advice: &Advice| match advice {
            Advice::List { dir, entries } => for_agent(LIST, &[*dir, (*entries).into()], &[]),
            Advice::New { node } => for_agent(NEW, &[*node], &[]),
            Advice::Empty { node, validity } => for_agent(EMPTY, &[*node, *validity], &[]),
            Advice::Attributes {
                node,
                number,
                attributes,
            } => for_agent(ATTRIBUTES, &[*node, *number], attributes),
        };
        let messages: Vec<u8> = advice.iter().flat_map(told).collect();
        let mut both = vec![IoSlice::new(&messages)];
        both.extend(parts);
        self.send(&both)
    }

    fn answers_releases(&self) -> bool {
        true
    }
}

/// The way of notifications, which come after all replies that were sent before them.
struct Notices {
    to: Mutex<UnixStream>,
    queues: Vec<Arc<Queue>>,
}

impl Channel for Notices {
    fn receive(&self, _: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }

    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let replies = self.queues.iter();
        let mut counts: Vec<_> = replies
            .map(|queue| queue.replies.load(Ordering::Relaxed))
            .collect();
        // Nothing is called here.
        counts.resize(2 * counts.len(), 0);
        let after = for_agent(AFTER_REPLIES, &counts, &[]);
        let mut both = vec![IoSlice::new(&after)];
        both.extend(parts);
        send(&self.to, &both)
    }
}

fn send(to: &Mutex<UnixStream>, parts: &[IoSlice<'_>]) -> io::Result<()> {
    let parts: Vec<&[u8]> = parts.iter().map(|part| &**part).collect();
    to.lock().unwrap().write_all(&parts.concat())
}

/// What a host asks for.
pub struct Asked {
    pub at: PathBuf,
    pub read_only: bool,
    pub queues: u32,
    pub mode: u32,
}

impl Asked {
    pub fn at(at: impl Into<PathBuf>) -> Self {
        Self {
            at: at.into(),
            read_only: false,
            queues: QUEUES,
            mode: 0o040_755,
        }
    }
}

/// The host's side of a mount, which ends with this.
pub struct Folder {
    pub control: UnixStream,
    pub share: Arc<Share>,
    pub streams: Vec<UnixStream>,
    /// The opcodes of all requests so far.
    pub seen: Arc<Mutex<Vec<u32>>>,
    /// The thread that does the host's changes again.
    pub replayer: u32,
    /// What was done on the host.
    pub events: mpsc::Receiver<Vec<HostEvent>>,
}

/// The host's side of a mount that is not mounted yet.
pub fn ask(asked: &Asked) -> (u64, UnixStream) {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mount = NEXT.fetch_add(1, Ordering::Relaxed);
    let control = connect(&Open::Mount(Mount {
        mount,
        at: MountPoint::Path(asked.at.as_os_str().as_bytes().to_vec()),
        source: b"/a/directory of the host".to_vec(),
        mode: asked.mode,
        read_only: asked.read_only,
        queues: asked.queues,
        memory: None,
    }));
    (mount, control)
}

pub fn receive(control: &UnixStream) -> FromMount {
    let message = protocol::receive(control).expect("the control connection broke");
    message.expect("the control connection ended early")
}

impl Folder {
    /// Shares `source`; nothing where this machine does not let us mount.
    pub fn mount(source: &Path, asked: &Asked, options: Options) -> Option<Self> {
        match Self::try_mount(source, asked, options) {
            Ok(folder) => Some(folder),
            Err(why) if why.contains("may not") || why.contains("no FUSE") => {
                eprintln!("skipped: {why}");
                None
            }
            Err(why) => panic!("{why}"),
        }
    }

    pub fn try_mount(source: &Path, asked: &Asked, options: Options) -> Result<Self, String> {
        let share = Arc::new(Share::open(source, options).unwrap());
        let (mount, control) = ask(asked);
        let mut streams = Vec::new();
        let seen = Arc::default();
        let mut queues = Vec::new();
        for queue in 0..asked.queues {
            let kind = MountStream::Requests { queue };
            let stream = connect(&Open::MountStream { mount, kind });
            stream.set_read_timeout(None).unwrap();
            let queue = Arc::new(Queue::new(&stream, &seen));
            queues.push(queue.clone());
            let served = share.clone();
            thread::spawn(move || {
                // A queue may break off in the middle of a message when the test ends it.
                let _ = share::serve(&served, &*queue);
            });
            streams.push(stream);
        }
        let kind = MountStream::Notifications;
        let stream = connect(&Open::MountStream { mount, kind });
        let notices = Notices {
            to: Mutex::new(stream.try_clone().unwrap()),
            queues,
        };
        let watched = share.clone();
        let (tell, events) = mpsc::channel();
        thread::spawn(move || {
            let mut tell = |events: &[HostEvent]| {
                // The test may have ended.
                let _ = tell.send(events.to_vec());
            };
            let _ = share::watch(&watched, &notices, &mut tell);
        });
        streams.push(stream);
        match receive(&control) {
            FromMount::Mounted(Ok(Mounted { replayer })) => Ok(Self {
                replayer,
                events,
                control,
                share,
                streams,
                seen,
            }),
            FromMount::Mounted(Err(why)) => Err(why),
            other => panic!("{other:?}"),
        }
    }

    pub fn say(&self, message: &ToMount) {
        protocol::send(&self.control, message).unwrap();
    }

    /// Asks for the mount's end, and hears of it.
    pub fn unmount(&self, force: bool) -> Result<(), String> {
        self.say(&ToMount::Unmount { force });
        match receive(&self.control) {
            FromMount::Unmounted(outcome) => outcome,
            other => panic!("{other:?}"),
        }
    }

    /// The agent closes the control connection.
    pub fn assert_over(&self) {
        assert_eq!(protocol::receive::<FromMount>(&self.control).unwrap(), None);
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.share.stop();
        let _ = self.control.shutdown(Shutdown::Both);
        for stream in &self.streams {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Whether something is mounted at a path.
pub fn is_mounted(at: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let at = at.to_str().unwrap();
    mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(at))
}

/// A directory to mount at, cleared of what a failed test leaves.
pub struct Place(pub tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut below: Vec<PathBuf> = Vec::new();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for line in mounts.lines() {
            let at = Path::new(line.split(' ').nth(1).unwrap_or_default());
            if at.starts_with(self.path()) {
                below.push(at.to_owned());
            }
        }
        for at in below.iter().rev() {
            let _ = rustix::mount::unmount(at, UnmountFlags::DETACH);
        }
    }
}

/// Runs a shell's commands in a directory, as another process.
pub fn shell(dir: &Path, commands: &str) {
    let mut shell = Command::new("sh");
    let (status, _) = run_outside(shell.args(["-ec", commands]).current_dir(dir)).unwrap();
    assert_eq!(status, ExitStatus::Code(0), "{commands}");
}
