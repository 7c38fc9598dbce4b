//! A share mounted by this machine's own kernel: the server's side of `/dev/fuse`.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Gid, Uid};
use rustix::mount::{MountFlags, UnmountFlags};
use share::{Cache, Channel, HostEvent, Options, Share, View, serve, watch};

/// How many threads serve a mount, each at a queue of its own.
const THREADS: usize = 4;

/// One queue of a FUSE connection.
pub struct Device {
    file: File,
    /// How many requests have come.
    requests: Arc<AtomicUsize>,
}

impl Channel for Device {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match (&self.file).read(buffer) {
                // The request was interrupted before it was read.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => {}
                // The filesystem is not mounted any more.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(0),
                outcome => {
                    self.requests.fetch_add(1, Ordering::Relaxed);
                    return outcome;
                }
            }
        }
    }

    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        (&self.file).write_vectored(parts).map(drop)
    }
}

/// A share that is mounted until this is dropped.
pub struct Mounted {
    pub source: PathBuf,
    pub at: PathBuf,
    pub share: Arc<Share>,
    /// What the host has done, as it was told.
    events: mpsc::Receiver<HostEvent>,
    requests: Arc<AtomicUsize>,
    cache: Cache,
    _dirs: Vec<tempfile::TempDir>,
}

impl Mounted {
    /// A new directory, shared by the user who runs the tests.
    pub fn new(options: Options) -> Option<Self> {
        Self::of_new(options, None)
    }

    /// A new directory, shared by `ids`, who owns it and has no privileges.
    pub fn rootless(options: Options, ids: (u32, u32)) -> Option<Self> {
        Self::of_new(options, Some(ids))
    }

    fn of_new(options: Options, ids: Option<(u32, u32)>) -> Option<Self> {
        let source = tempfile::tempdir().unwrap();
        if let Some((uid, gid)) = ids {
            std::os::unix::fs::chown(source.path(), Some(uid), Some(gid)).unwrap();
        }
        let at = tempfile::tempdir().unwrap();
        let mut mounted = Self::of(source.path(), at.path(), options, ids)?;
        mounted._dirs = vec![source, at];
        Some(mounted)
    }

    /// Mounts what `source` is at `at`; nothing where this machine does not let us.
    pub fn of(source: &Path, at: &Path, options: Options, ids: Option<(u32, u32)>) -> Option<Self> {
        let mut mounted = Self::shared(source, at, ids, move |path| {
            Share::open(path, options).unwrap()
        })?;
        mounted.cache = options.cache;
        Some(mounted)
    }

    /// Mounts what `view` shows of a directory.
    pub fn of_view(source: tempfile::TempDir, view: View, ids: Option<(u32, u32)>) -> Option<Self> {
        let at = tempfile::tempdir().unwrap();
        let mut mounted = Self::shared(source.path(), at.path(), ids, move |path| {
            Share::open_view(path, Options::default(), view).unwrap()
        })?;
        mounted._dirs = vec![source, at];
        Some(mounted)
    }

    fn shared(
        source: &Path,
        at: &Path,
        ids: Option<(u32, u32)>,
        open: impl FnOnce(&Path) -> Share + Send + 'static,
    ) -> Option<Self> {
        let device = open_device()?;
        let (shared, opened) = mpsc::channel();
        let (mounted, queues) = mpsc::channel::<File>();
        let path = source.to_owned();
        let requests = Arc::new(AtomicUsize::new(0));
        let counted = requests.clone();
        thread::spawn(move || {
            if let Some((uid, gid)) = ids {
                become_user(uid, gid);
            }
            let share = Arc::new(open(&path));
            shared.send(share.clone()).unwrap();
            for queue in queues {
                let share = share.clone();
                let requests = counted.clone();
                let device = Device {
                    file: queue,
                    requests,
                };
                thread::spawn(move || serve(&share, &device).unwrap());
            }
        });
        let share = opened.recv().unwrap();
        let mode = share.root_mode().unwrap() & 0o170_000;
        let fd = device.as_raw_fd();
        let data = format!(
            "fd={fd},rootmode={mode:o},user_id=0,group_id=0,allow_other,default_permissions"
        );
        let data = CString::new(data).unwrap();
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        if let Err(error) = rustix::mount::mount("share", at, "fuse.mvm", flags, &*data) {
            skip(&format!("FUSE cannot be mounted: {error}"));
            return None;
        }
        for _ in 1..THREADS {
            mounted.send(clone(&device)).unwrap();
        }
        let notices = Device {
            file: clone(&device),
            requests: requests.clone(),
        };
        mounted.send(device).unwrap();
        let (teller, events) = mpsc::channel();
        let watched = share.clone();
        thread::spawn(move || {
            let mut tell = |events: &[HostEvent]| {
                for event in events {
                    // The test may have ended.
                    let _ = teller.send(event.clone());
                }
            };
            watch(&watched, &notices, &mut tell)
        });
        Some(Self {
            source: source.to_owned(),
            at: at.to_owned(),
            share,
            events,
            requests,
            cache: Cache::default(),
            _dirs: Vec::new(),
        })
    }
}

impl Mounted {
    /// Runs a shell's commands in the shared directory, as somebody else on the host.
    pub fn on_host(&self, commands: &str) {
        let mut shell = Command::new("sh");
        let status = shell
            .args(["-ec", commands])
            .current_dir(&self.source)
            .status();
        assert!(status.unwrap().success(), "{commands}");
    }

    /// Whether the guest sees what the host changes, sooner or later.
    pub fn is_told(&self) -> bool {
        self.cache != Cache::Private
    }

    /// Waits until what the guest sees is what it should.
    pub fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < PATIENCE, "{what}");
            thread::yield_now();
        }
    }

    /// How many requests the guest has sent.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    /// The next thing that the host has done.
    pub fn event(&self) -> HostEvent {
        self.events
            .recv_timeout(PATIENCE)
            .expect("the host did nothing")
    }

    /// What the host has done before a moment in which it did nothing.
    pub fn events_until_quiet(&self) -> Vec<HostEvent> {
        std::iter::from_fn(|| self.events.recv_timeout(MOMENT).ok()).collect()
    }

    /// Nothing more was told of what the host has done.
    pub fn is_quiet(&self) -> bool {
        self.events.recv_timeout(MOMENT).is_err()
    }
}

/// How long nothing has to happen until nothing is expected to happen any more.
const MOMENT: Duration = Duration::from_millis(200);

/// How long is waited for what has to come.
pub const PATIENCE: Duration = Duration::from_secs(20);

impl Drop for Mounted {
    fn drop(&mut self) {
        self.share.stop();
        let _ = rustix::mount::unmount(&self.at, UnmountFlags::DETACH);
    }
}

fn skip(why: &str) {
    eprintln!("skipped: {why}");
}

fn open_device() -> Option<File> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open("/dev/fuse");
    opened
        .inspect_err(|error| skip(&format!("/dev/fuse cannot be opened: {error}")))
        .ok()
}

/// One more queue of the connection that `device` is.
fn clone(device: &File) -> File {
    const FUSE_DEV_IOC_CLONE: libc::c_ulong = 0x8004_e500;
    let queue = open_device().unwrap();
    let fd = device.as_raw_fd();
    // SAFETY: the ioctl reads one number, which outlives the call.
    let outcome = unsafe { libc::ioctl(queue.as_raw_fd(), FUSE_DEV_IOC_CLONE, &raw const fd) };
    assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
    queue
}

/// Makes this thread, and those it starts, ones of a user without privileges.
fn become_user(uid: u32, gid: u32) {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_groups(&[]).unwrap();
    rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
    rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
}
