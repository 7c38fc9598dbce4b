//! What the host does raises events for programs on the mount that watch with inotify, once an agent
//! does it again there.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use share::{Change, HostEvent, Kind, Options};

use crate::mount::Mounted;

/// What a program of the guest watches.
struct Watching(OwnedFd);

impl Watching {
    fn of(dirs: &[PathBuf]) -> Self {
        let fd = inotify::init(CreateFlags::NONBLOCK).unwrap();
        let wanted = WatchFlags::CREATE
            | WatchFlags::MODIFY
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::ATTRIB
            | WatchFlags::DELETE
            | WatchFlags::MOVE;
        for dir in dirs {
            inotify::add_watch(&fd, dir, wanted).unwrap();
        }
        Self(fd)
    }

    /// What it has heard, with cookies of renames by their order.
    fn heard(&self) -> Vec<String> {
        let mut buffer = [MaybeUninit::uninit(); 65536];
        let mut reader = inotify::Reader::new(&self.0, &mut buffer);
        let mut cookies = Vec::new();
        let mut heard = Vec::new();
        while let Ok(event) = reader.next() {
            let name = event.file_name().unwrap_or_default().to_str().unwrap();
            let what = event.events() - ReadFlags::ISDIR;
            let cookie = match event.cookie() {
                0 => String::new(),
                cookie => {
                    if !cookies.contains(&cookie) {
                        cookies.push(cookie);
                    }
                    format!(" {}", cookies.iter().position(|c| *c == cookie).unwrap())
                }
            };
            let what: Vec<_> = what.iter_names().map(|(name, _)| name).collect();
            heard.push(format!("{} {name}{cookie}", what.join("|")));
        }
        heard
    }
}

/// Does on the mount at `root` what the host has done; what fails has been undone since.
fn act(root: &Path, event: &HostEvent) {
    let path = |dir: &OsStr, name: &CString| {
        let steps = [dir, OsStr::from_bytes(name.to_bytes())].into_iter();
        // An empty step would be a slash at the end of what may be a file.
        steps
            .filter(|step| !step.is_empty())
            .fold(root.to_owned(), |path, step| path.join(step))
    };
    let here = path(&event.path, &event.name);
    let times = |access, modification| {
        let time = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
        let times = Timestamps {
            last_access: time(access),
            last_modification: time(modification),
        };
        rustix::fs::utimensat(CWD, &here, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(Into::into)
    };
    let outcome: std::io::Result<()> = match &event.change {
        Change::Created { kind: Kind::File } => File::create_new(&here).map(drop),
        Change::Created {
            kind: Kind::Directory,
        } => fs::create_dir(&here),
        Change::Created {
            kind: Kind::Symlink,
        } => std::os::unix::fs::symlink("x", &here),
        Change::Created {
            kind: Kind::Special,
        } => rustix::fs::mknodat(CWD, &here, FileType::Fifo, Mode::RUSR, 0).map_err(Into::into),
        Change::Modified => times(UTIME_OMIT, UTIME_NOW),
        Change::Attrib => times(UTIME_NOW, UTIME_NOW),
        Change::CloseWrite => File::options().write(true).open(&here).map(drop),
        Change::Deleted { is_dir: true } => fs::remove_dir(&here),
        Change::Deleted { is_dir: false } => fs::remove_file(&here),
        Change::Moved {
            path: dir, name, ..
        } => fs::rename(&here, path(dir, name)),
        Change::Overflow => panic!("too much at once"),
    };
    outcome.unwrap_or_else(|error| panic!("{event:?}: {error}"));
}

/// Does again all that the host has done.
fn replay(mounted: &Mounted) {
    let mut events = vec![mounted.event()];
    events.extend(mounted.events_until_quiet());
    replay_all(mounted, &events);
}

fn replay_all(mounted: &Mounted, events: &[HostEvent]) {
    let pid = rustix::thread::gettid().as_raw_nonzero().get();
    mounted.share.replay(pid.cast_unsigned(), events.to_vec());
    for event in events {
        act(&mounted.at, event);
    }
    mounted.share.replayed();
}

#[test]
fn programs_that_watch_hear_what_the_host_does_and_the_host_is_left_alone() {
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    mounted.on_host("mkdir -p a/b; echo old > a/b/known; mkdir a/b/dir");
    let dirs = [mounted.at.join("a"), mounted.at.join("a/b")];
    assert_eq!(fs::read_dir(&dirs[1]).unwrap().count(), 2);
    assert!(!dirs[0].join("new").exists());
    assert_eq!(fs::read_to_string(dirs[1].join("known")).unwrap(), "old\n");
    // The root may have been watched before there was anything in it.
    mounted.events_until_quiet();
    let watching = Watching::of(&dirs);
    watching.heard();

    let expect = |commands: &str, heard: &[&str]| {
        mounted.on_host(commands);
        let before = listing(&mounted.source);
        replay(&mounted);
        assert_eq!(watching.heard(), heard, "{commands}");
        assert_eq!(listing(&mounted.source), before, "{commands}");
        assert_eq!(listing(&mounted.at), before, "{commands}");
    };
    expect(
        "echo new > a/new",
        &[
            "CREATE new",
            "CLOSE_WRITE new",
            "MODIFY new",
            "CLOSE_WRITE new",
        ],
    );
    expect(
        "echo newer > a/b/known",
        &["MODIFY known", "CLOSE_WRITE known"],
    );
    expect("chmod 700 a/b/known", &["ATTRIB known"]);
    expect("mkdir a/sub", &["CREATE sub"]);
    expect("ln -s nowhere a/link", &["CREATE link"]);
    expect("mkfifo a/fifo", &["CREATE fifo"]);
    expect(
        "mv a/b/known a/renamed",
        &["MOVED_FROM known 0", "MOVED_TO renamed 0"],
    );
    expect(
        "mv a/new a/renamed",
        &["MOVED_FROM new 0", "MOVED_TO renamed 0"],
    );
    expect("mv a/b/dir a/dir", &["MOVED_FROM dir 0", "MOVED_TO dir 0"]);
    expect("rm a/renamed", &["DELETE renamed"]);
    expect("rmdir a/dir a/sub", &["DELETE dir", "DELETE sub"]);
    expect("rm a/link a/fifo", &["DELETE link", "DELETE fifo"]);
    assert!(mounted.is_quiet());
    // The guest is its own master again.
    fs::write(mounted.at.join("a/guests"), "data").unwrap();
    assert_eq!(
        fs::read_to_string(mounted.source.join("a/guests")).unwrap(),
        "data"
    );
}

#[test]
fn programs_hear_what_the_host_does_with_a_file_that_is_shared_by_itself() {
    let source = tempfile::NamedTempFile::new().unwrap();
    fs::write(source.path(), "old\n").unwrap();
    let at = tempfile::NamedTempFile::new().unwrap();
    let mounted = Mounted::of(source.path(), at.path(), Options::default(), None);
    let Some(mounted) = mounted else {
        return;
    };
    let watching = Watching::of(std::slice::from_ref(&mounted.at));
    let expect = |commands: &str, heard: &[&str]| {
        let mut shell = Command::new("sh");
        shell.args(["-ec", commands, "sh"]).arg(source.path());
        assert!(shell.status().unwrap().success(), "{commands}");
        let before = (
            fs::read(source.path()).unwrap(),
            fs::metadata(source.path()).unwrap().modified().unwrap(),
        );
        replay(&mounted);
        assert_eq!(watching.heard(), heard, "{commands}");
        let after = (
            fs::read(source.path()).unwrap(),
            fs::metadata(source.path()).unwrap().modified().unwrap(),
        );
        assert_eq!(after, before, "{commands}");
        assert_eq!(fs::read(&mounted.at).unwrap(), before.0, "{commands}");
    };
    expect("echo new > $1", &["MODIFY ", "CLOSE_WRITE "]);
    expect("chmod 600 $1", &["ATTRIB "]);
    expect("echo more >> $1", &["MODIFY ", "CLOSE_WRITE "]);
    assert!(mounted.is_quiet());
}

#[test]
fn what_came_and_went_before_it_could_be_done_again_is_heard_too() {
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    fs::create_dir(mounted.at.join("dir")).unwrap();
    assert!(!mounted.at.join("dir/file").exists());
    let watching = Watching::of(&[mounted.at.join("dir")]);
    mounted.on_host(": > dir/file; mv dir/file dir/other; rm dir/other");
    let mut events = vec![mounted.event()];
    while !matches!(events.last().unwrap().change, Change::Deleted { .. }) {
        events.push(mounted.event());
    }
    replay_all(&mounted, &events);
    let heard = watching.heard();
    assert_eq!(heard.last().unwrap(), "DELETE other", "{heard:?}");
    assert_eq!(fs::read_dir(mounted.at.join("dir")).unwrap().count(), 0);
    fs::write(mounted.at.join("dir/file"), "again").unwrap();
    assert_eq!(
        fs::read_to_string(mounted.source.join("dir/file")).unwrap(),
        "again"
    );
}

fn listing(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![root.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            found.push(entry.path().strip_prefix(root).unwrap().to_owned());
            if entry.file_type().unwrap().is_dir() {
                left.push(entry.path());
            }
        }
    }
    found.sort();
    found
}
