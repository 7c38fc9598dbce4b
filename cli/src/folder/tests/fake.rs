//! A guest that is this machine itself: an agent that mounts folders natively, below a directory that stands
//! for the guest's root.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use agent::protocol::{
    self, AFTER_REPLIES, ChangeKind, FromMount, HostChange, Identified, Mount, MountPoint,
    MountStream, Mounted, Open, ToMount, UserIds,
};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::thread::gettid;
use tempfile::TempDir;

use crate::link::Link;

/// Longer than anything takes that works.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The guest; it ends with its mounts when this is dropped.
pub struct FakeGuest {
    dir: TempDir,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    root: PathBuf,
    /// Streams that no mount has taken yet.
    streams: Mutex<HashMap<(u64, MountStream), UnixStream>>,
    came: Condvar,
    mounted: Mutex<Vec<PathBuf>>,
    /// All that it was told that the host did.
    told: Mutex<Vec<HostChange>>,
    /// Does nothing more when asked to do changes again.
    stuck: AtomicBool,
}

impl FakeGuest {
    /// A new one; None where this machine does not let us mount.
    pub fn new() -> Option<Self> {
        if let Err(error) = File::options().read(true).write(true).open("/dev/fuse") {
            eprintln!("skipped: /dev/fuse cannot be opened: {error}");
            return None;
        }
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root mounts natively");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let state = Arc::new(State {
            root: dir.path().join("root"),
            ..State::default()
        });
        fs::create_dir(&state.root).unwrap();
        let listener = UnixListener::bind(dir.path().join("vsock")).unwrap();
        let shared = state.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, shared) = (stream.unwrap(), shared.clone());
                thread::spawn(move || shared.serve(stream));
            }
        });
        Some(Self { dir, state })
    }

    pub fn link(&self) -> Link {
        Link::Socket(self.dir.path().join("vsock"))
    }

    /// Where this machine has a path of the guest.
    pub fn path(&self, guest: &str) -> PathBuf {
        self.state.path(guest.as_bytes())
    }

    /// All that it was told that the host did, so far.
    pub fn told(&self) -> Vec<HostChange> {
        self.state.told.lock().unwrap().clone()
    }

    /// Does not answer any more when asked to do changes again.
    pub fn stop_replaying(&self) {
        self.state.stuck.store(true, Ordering::Relaxed);
    }
}

impl Drop for FakeGuest {
    fn drop(&mut self) {
        for path in self.state.mounted.lock().unwrap().iter().rev() {
            take_away(path);
        }
    }
}

impl State {
    fn path(&self, guest: &[u8]) -> PathBuf {
        let guest = Path::new(OsStr::from_bytes(guest));
        self.root.join(guest.strip_prefix("/").unwrap_or(guest))
    }

    fn serve(&self, mut stream: UnixStream) {
        let mut line = String::new();
        let mut unbuffered = BufReader::with_capacity(1, &stream);
        unbuffered.read_line(&mut line).unwrap();
        assert_eq!(line, "CONNECT 1024\n");
        stream.write_all(b"OK 1024\n").unwrap();
        match protocol::receive(&stream).unwrap() {
            Some(Open::Identify { user }) => {
                let found = match user.as_str() {
                    "somebody" => Ok(UserIds {
                        uid: 1234,
                        gid: 5678,
                    }),
                    _ => Err(format!("there is no user {user:?} in the machine")),
                };
                protocol::send(&stream, &Identified(found)).unwrap();
            }
            Some(Open::MountStream { mount, kind }) => {
                self.streams.lock().unwrap().insert((mount, kind), stream);
                self.came.notify_all();
            }
            Some(Open::Mount(mount)) => {
                let queues = mount.queues;
                let streams: Vec<_> = (0..queues)
                    .map(|queue| self.stream(mount.mount, MountStream::Requests { queue }))
                    .collect();
                let notices = self.stream(mount.mount, MountStream::Notifications);
                self.attend(&stream, &mount, &streams, notices);
            }
            other => panic!("{other:?}"),
        }
    }

    fn stream(&self, mount: u64, kind: MountStream) -> UnixStream {
        let streams = self.streams.lock().unwrap();
        let missing = |streams: &mut HashMap<_, _>| !streams.contains_key(&(mount, kind));
        let waited = self.came.wait_timeout_while(streams, PATIENCE, missing);
        let found = waited.unwrap().0.remove(&(mount, kind));
        found.expect("the stream did not come")
    }

    fn attend(
        &self,
        control: &UnixStream,
        mount: &Mount,
        streams: &[UnixStream],
        notices: UnixStream,
    ) {
        let MountPoint::Path(at) = &mount.at else {
            panic!("{mount:?}")
        };
        let at = self.path(at);
        let device = match self.mount(mount, &at) {
            Ok(device) => device,
            Err(error) => {
                let refused = Err(format!("it cannot be mounted: {error}"));
                return protocol::send(control, &FromMount::Mounted(refused)).unwrap();
            }
        };
        let replies: Arc<[AtomicU64]> = streams.iter().map(|_| AtomicU64::new(0)).collect();
        for (queue, stream) in streams.iter().enumerate() {
            let (near, far) = (device.try_clone().unwrap(), stream.try_clone().unwrap());
            thread::spawn(move || requests(near, far));
            let (near, far) = (stream.try_clone().unwrap(), device.try_clone().unwrap());
            let (replies, at) = (replies.clone(), at.clone());
            thread::spawn(move || {
                messages(near, far, |_| {
                    replies[queue].fetch_add(1, Ordering::SeqCst);
                });
                take_away(&at);
            });
        }
        thread::spawn(move || {
            messages(notices, device, |message| {
                wait_for_replies(&replies, message)
            })
        });
        let replayer = gettid().as_raw_nonzero().get().cast_unsigned();
        let mounted = FromMount::Mounted(Ok(Mounted { replayer }));
        protocol::send(control, &mounted).unwrap();
        while let Ok(Some(asked)) = protocol::receive(control) {
            let answer = match asked {
                ToMount::Replay(changes) => {
                    self.told.lock().unwrap().extend(changes.iter().cloned());
                    if self.stuck.load(Ordering::Relaxed) {
                        continue;
                    }
                    changes.iter().for_each(|change| act(&at, change));
                    FromMount::Replayed
                }
                ToMount::Unmount { force } => {
                    let flags = match force {
                        true => UnmountFlags::FORCE | UnmountFlags::DETACH,
                        false => UnmountFlags::empty(),
                    };
                    let unmounted = rustix::mount::unmount(&at, flags);
                    FromMount::Unmounted(
                        unmounted.map_err(|errno| format!("it is in use: {errno}")),
                    )
                }
            };
            protocol::send(control, &answer).unwrap();
        }
        take_away(&at);
        for stream in streams {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    fn mount(&self, mount: &Mount, at: &Path) -> io::Result<File> {
        let is_dir = FileType::from_raw_mode(mount.mode) == FileType::Directory;
        match is_dir {
            true => fs::create_dir_all(at)?,
            false => {
                fs::create_dir_all(at.parent().unwrap())?;
                File::create(at)?;
            }
        }
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let mode = mount.mode & 0o170_000;
        let data = format!(
            "fd={},rootmode={mode:o},user_id=0,group_id=0,allow_other,default_permissions",
            device.as_raw_fd()
        );
        let data = CString::new(data).unwrap();
        let flags = match mount.read_only {
            true => MountFlags::RDONLY,
            false => MountFlags::empty(),
        };
        let flags = flags | MountFlags::NOSUID | MountFlags::NODEV;
        rustix::mount::mount("folder", at, "fuse.mvm", flags, &*data)?;
        self.mounted.lock().unwrap().push(at.to_owned());
        Ok(device)
    }
}

/// Unmounts it, and first has the kernel give up what is asked for there: nobody answers any more, and a thread that waits
/// would keep its process, which has the other end, from ending.
fn take_away(at: &Path) {
    // It may be gone.
    let _ = rustix::mount::unmount(at, UnmountFlags::FORCE | UnmountFlags::DETACH);
}

/// Passes requests on to the host.
fn requests(mut device: File, mut stream: UnixStream) {
    let mut buffer = vec![0; (1 << 20) + 4096];
    loop {
        match device.read(&mut buffer) {
            Ok(length) => {
                if stream.write_all(&buffer[..length]).is_err() {
                    // Nobody serves it any more: whoever waits is let go.
                    let mut reply = 16_u32.to_ne_bytes().to_vec();
                    reply.extend((-103_i32).to_ne_bytes());
                    reply.extend(&buffer[8..16]);
                    let _ = device.write(&reply);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(_) => {
                let _ = stream.shutdown(std::net::Shutdown::Both);
                return;
            }
        }
    }
}

/// Passes the host's messages on to the kernel, but those that `seen` is the only one to understand.
fn messages(mut stream: UnixStream, mut device: File, seen: impl Fn(&[u8])) {
    loop {
        let mut length = [0; 4];
        if stream.read_exact(&mut length).is_err() {
            return;
        }
        let mut message = vec![0; u32::from_ne_bytes(length) as usize];
        message[..4].copy_from_slice(&length);
        stream.read_exact(&mut message[4..]).unwrap();
        if message[4..8] != AFTER_REPLIES.to_ne_bytes() {
            // Nobody waits for it any more, or the kernel does not know what it is about.
            let _ = device.write(&message);
        }
        seen(&message);
    }
}

fn wait_for_replies(replies: &[AtomicU64], message: &[u8]) {
    if message[4..8] != AFTER_REPLIES.to_ne_bytes() {
        return;
    }
    let (counts, []) = message[16..].as_chunks::<8>() else {
        panic!("{message:?}")
    };
    // This guest makes no calls.
    let (counts, of_calls) = counts.split_at(replies.len());
    assert_eq!(of_calls, vec![[0; 8]; replies.len()]);
    for (count, replies) in counts.iter().zip(replies) {
        while replies.load(Ordering::SeqCst) < u64::from_le_bytes(*count) {
            thread::yield_now();
        }
    }
}

/// Does on the mount at `root` what the host has done; what fails has been undone since.
fn act(root: &Path, change: &HostChange) {
    let path = |dir: &[u8], name: &[u8]| {
        root.join(OsStr::from_bytes(dir))
            .join(OsStr::from_bytes(name))
    };
    let here = path(&change.dir, &change.name);
    let times = |access, modification| {
        let time = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
        let times = Timestamps {
            last_access: time(access),
            last_modification: time(modification),
        };
        rustix::fs::utimensat(CWD, &here, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(Into::into)
    };
    let outcome: io::Result<()> = match &change.what {
        ChangeKind::CreatedFile => File::create_new(&here).map(drop),
        ChangeKind::CreatedDirectory => fs::create_dir(&here),
        ChangeKind::CreatedSymlink => std::os::unix::fs::symlink("x", &here),
        ChangeKind::CreatedSpecial => {
            rustix::fs::mknodat(CWD, &here, FileType::Fifo, Mode::RUSR, 0).map_err(Into::into)
        }
        ChangeKind::Modified => times(UTIME_OMIT, UTIME_NOW),
        ChangeKind::Attributes => times(UTIME_NOW, UTIME_NOW),
        ChangeKind::CloseWrite => File::options().write(true).open(&here).map(drop),
        ChangeKind::Deleted { is_dir: true } => fs::remove_dir(&here),
        ChangeKind::Deleted { is_dir: false } => fs::remove_file(&here),
        ChangeKind::Moved { dir, name } => fs::rename(&here, path(dir, name)),
        ChangeKind::Overflow => Ok(()),
    };
    if let Err(error) = outcome {
        eprintln!("{change:?}: {error}");
    }
}
