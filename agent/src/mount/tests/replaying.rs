//! What the host changes is heard by those who watch in the machine.

use std::ffi::CString;
use std::fs::{self, File};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use agent::protocol::{self, ChangeKind, FromMount, HostChange, ToMount};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::mount::UnmountFlags;
use share::{Change, HostEvent, Kind, Options};

use super::{Asked, Folder, Place, receive, shell};
use crate::tests::eventually;

/// Long enough for a loaded machine; a test that gets here has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long the host has to do nothing to be done.
const MOMENT: Duration = Duration::from_millis(200);

/// What a program of the machine watches.
struct Watching(OwnedFd);

impl Watching {
    fn of(paths: &[&Path]) -> Self {
        let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
        let wanted = WatchFlags::CREATE
            | WatchFlags::MODIFY
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::ATTRIB
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE;
        for path in paths {
            inotify::add_watch(&fd, *path, wanted).unwrap();
        }
        Self(fd)
    }

    /// What it has heard since it was asked last.
    fn heard(&self) -> Vec<String> {
        let mut buffer = [MaybeUninit::uninit(); 65536];
        let mut reader = inotify::Reader::new(&self.0, &mut buffer);
        let mut heard = Vec::new();
        while let Ok(event) = reader.next() {
            let name = event.file_name().unwrap_or_default().to_str().unwrap();
            let what = event.events() - ReadFlags::ISDIR;
            let what: Vec<_> = what.iter_names().map(|(name, _)| name).collect();
            heard.push(format!("{} {name}", what.join("|")).trim_end().to_owned());
        }
        heard
    }
}

impl Folder {
    /// Waits until the host has done something and then nothing for a moment; has all of it done again.
    fn replay(&self) {
        let first = self.events.recv_timeout(PATIENCE);
        let mut events = first.expect("the host did nothing");
        while let Ok(more) = self.events.recv_timeout(MOMENT) {
            events.extend(more);
        }
        self.replay_these(events);
    }

    fn replay_these(&self, events: Vec<HostEvent>) {
        let changes = events.iter().map(change).collect();
        self.share.replay(self.replayer, events);
        self.say(&ToMount::Replay(changes));
        assert_eq!(receive(&self.control), FromMount::Replayed);
        self.share.replayed();
    }
}

fn change(event: &HostEvent) -> HostChange {
    let bytes = |name: &CString| name.to_bytes().to_vec();
    HostChange {
        dir: event.path.as_bytes().to_vec(),
        name: bytes(&event.name),
        what: match &event.change {
            Change::Created { kind: Kind::File } => ChangeKind::CreatedFile,
            Change::Created {
                kind: Kind::Directory,
            } => ChangeKind::CreatedDirectory,
            Change::Created {
                kind: Kind::Symlink,
            } => ChangeKind::CreatedSymlink,
            Change::Created {
                kind: Kind::Special,
            } => ChangeKind::CreatedSpecial,
            Change::Modified => ChangeKind::Modified,
            Change::CloseWrite => ChangeKind::CloseWrite,
            Change::Attrib => ChangeKind::Attributes,
            Change::Deleted { is_dir } => ChangeKind::Deleted { is_dir: *is_dir },
            Change::Moved { path, name, .. } => ChangeKind::Moved {
                dir: path.as_bytes().to_vec(),
                name: bytes(name),
            },
            Change::Overflow => ChangeKind::Overflow,
        },
    }
}

/// A folder with `commands` done on the host beforehand, all of which the machine has seen.
fn folder(commands: &str, read_only: bool) -> Option<(Folder, Place, Place)> {
    let (source, at) = (Place::new(), Place::new());
    shell(source.path(), commands);
    let asked = Asked {
        read_only,
        ..Asked::at(at.path())
    };
    let folder = Folder::mount(source.path(), &asked, Options::default())?;
    see(at.path());
    Some((folder, source, at))
}

/// Looks at everything.
fn see(dir: &Path) {
    assert!(!dir.join("absent").exists());
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        if entry.metadata().unwrap().is_dir() {
            see(&entry.path());
        }
    }
}

#[test]
fn programs_hear_what_the_host_does_where_they_watch() {
    let Some((folder, source, at)) =
        folder("mkdir -p a/b c; echo old > a/b/known; mkdir a/b/dir", false)
    else {
        return;
    };
    let [a, b] = ["a", "a/b"].map(|path| at.path().join(path));
    let watching = Watching::of(&[&a, &b]);
    let expect = |commands: &str, heard: &[&str]| {
        shell(source.path(), commands);
        folder.replay();
        assert_eq!(watching.heard(), heard, "{commands}");
    };
    expect(
        "echo new > a/new",
        &["CREATE new", "MODIFY new", "CLOSE_WRITE new"],
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
        &["MOVED_FROM known", "MOVED_TO renamed"],
    );
    expect("mv a/b/dir c/dir", &["MOVED_FROM dir"]);
    expect("mv c/dir a/dir", &["MOVED_TO dir"]);
    expect("rm a/renamed", &["DELETE renamed"]);
    expect("rmdir a/dir a/sub", &["DELETE dir", "DELETE sub"]);
    expect("rm a/link a/fifo", &["DELETE link", "DELETE fifo"]);
    shell(source.path(), "rmdir a/b");
    folder.replay();
    let mut heard = Vec::new();
    eventually("the directory's end is heard of", || {
        heard.extend(watching.heard());
        heard == ["DELETE b", "DELETE_SELF", "IGNORED"]
    });
    assert_eq!(
        fs::read_to_string(at.path().join("a/new")).unwrap(),
        "new\n"
    );
}

#[test]
fn a_watched_file_is_heard_of_in_a_directory_that_nobody_watches() {
    let Some((folder, source, at)) = folder(
        "mkdir -p dir; echo old > dir/file; echo old > dir/other",
        false,
    ) else {
        return;
    };
    let watching = Watching::of(&[&at.path().join("dir/file")]);
    shell(source.path(), "echo new > dir/file; echo new > dir/other");
    folder.replay();
    assert_eq!(watching.heard(), ["MODIFY", "CLOSE_WRITE"]);
    // What takes its name takes its place.
    shell(
        source.path(),
        "echo newer > dir/third; mv dir/third dir/file",
    );
    folder.replay();
    // A process that another test starts meanwhile holds the file for a moment.
    let mut heard = Vec::new();
    eventually("the file's end is heard of", || {
        heard.extend(watching.heard());
        heard.contains(&"DELETE_SELF".to_owned())
    });
}

#[test]
fn a_file_that_is_shared_by_itself_is_heard_of() {
    for read_only in [false, true] {
        let (source, place) = (Place::new(), Place::new());
        shell(source.path(), "echo old > file");
        let at = place.path().join("file");
        let asked = Asked {
            read_only,
            mode: 0o100_644,
            ..Asked::at(&at)
        };
        let file = source.path().join("file");
        let Some(folder) = Folder::mount(&file, &asked, Options::default()) else {
            return;
        };
        let watching = Watching::of(&[&at]);
        let expect = |commands: &str, heard: &[&str]| {
            shell(source.path(), commands);
            folder.replay();
            assert_eq!(watching.heard(), heard, "{commands}");
        };
        expect("echo new > file", &["MODIFY", "CLOSE_WRITE"]);
        assert_eq!(fs::read_to_string(&at).unwrap(), "new\n");
        expect("chmod 600 file", &["ATTRIB"]);
        expect("echo other > new; mv new file", &["ATTRIB"]);
        assert_eq!(fs::read_to_string(&at).unwrap(), "new\n");
        folder.unmount(false).unwrap();
    }
}

#[test]
fn a_folder_that_can_only_be_read_is_heard_of_too() {
    let Some((folder, source, at)) = folder("mkdir dir; echo old > dir/file", true) else {
        return;
    };
    let watching = Watching::of(&[&at.path().join("dir")]);
    shell(source.path(), "echo new > dir/file; : > dir/new");
    folder.replay();
    let heard = watching.heard();
    for expected in ["MODIFY file", "CREATE new"] {
        assert!(heard.contains(&expected.to_owned()), "{heard:?}");
    }
    assert!(File::create(at.path().join("dir/mine")).is_err());
}

#[test]
fn who_looked_before_it_was_done_again_hears_of_it_all_the_same() {
    let Some((folder, source, at)) = folder("mkdir dir; : > dir/old", false) else {
        return;
    };
    let dir = at.path().join("dir");
    let watching = Watching::of(&[&dir]);
    shell(source.path(), "mkdir dir/sub; : > dir/new; rm dir/old");
    eventually("the changes are seen", || {
        let names = fs::read_dir(&dir).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names == ["new", "sub"] && dir.join("new").is_file() && !dir.join("old").exists()
    });
    folder.replay();
    let heard = watching.heard();
    for expected in ["CREATE sub", "CREATE new", "DELETE old"] {
        assert!(heard.contains(&expected.to_owned()), "{heard:?}");
    }
    assert!(dir.join("sub").is_dir() && dir.join("new").is_file() && !dir.join("old").exists());
}

#[test]
fn nobody_is_told_where_nobody_watches() {
    let Some((folder, source, at)) = folder("mkdir -p seen unseen; : > unseen/file", false) else {
        return;
    };
    let watching = Watching::of(&[&at.path().join("seen")]);
    let before = fs::metadata(at.path().join("unseen/file")).unwrap();
    shell(
        source.path(),
        "echo data > unseen/file; mkdir unseen/dir; rm unseen/file",
    );
    folder.replay();
    assert_eq!(watching.heard(), [""; 0]);
    assert_eq!(before.len(), 0);
    // Who begins to watch after that is told of what comes after that.
    let late = Watching::of(&[&at.path().join("unseen")]);
    shell(source.path(), ": > unseen/late");
    folder.replay();
    assert_eq!(late.heard()[0], "CREATE late");
}

#[test]
fn an_overflow_is_heard_of_everywhere() {
    let Some((folder, source, at)) = folder("mkdir -p a b; echo old > a/changed", false) else {
        return;
    };
    let [a, b] = ["a", "b"].map(|path| at.path().join(path));
    let watching = Watching::of(&[&a, &b]);
    shell(source.path(), "echo new > a/changed");
    let told = folder.events.recv_timeout(PATIENCE).unwrap();
    let overflow = HostEvent {
        dir: 1,
        path: "".into(),
        name: CString::default(),
        change: Change::Overflow,
    };
    drop(told);
    folder.replay_these(vec![overflow]);
    let heard = watching.heard();
    assert_eq!(
        heard.iter().filter(|heard| *heard == "ATTRIB").count(),
        2,
        "{heard:?}"
    );
    assert!(heard.contains(&"MODIFY changed".to_owned()), "{heard:?}");
}

#[test]
fn a_mount_with_watchers_is_unmounted_without_them_noticing_who_replays() {
    let Some((folder, source, at)) = folder("mkdir dir", false) else {
        return;
    };
    let watching = Watching::of(&[&at.path().join("dir")]);
    for number in 0..20 {
        shell(source.path(), &format!(": > dir/{number}"));
        folder.replay();
    }
    assert!(!watching.heard().is_empty());
    // Nothing that replays keeps it mounted.
    let deadline = Instant::now() + PATIENCE;
    while let Err(why) = folder.unmount(false) {
        assert!(Instant::now() < deadline, "{why}");
        std::thread::sleep(Duration::from_millis(20));
    }
    folder.assert_over();
}

#[test]
fn a_folder_that_the_machine_unmounts_ends_though_the_host_goes_on() {
    let Some((folder, source, at)) = folder("mkdir dir", false) else {
        return;
    };
    let watching = Watching::of(&[&at.path().join("dir")]);
    shell(source.path(), ": > dir/new");
    folder.replay();
    assert!(!watching.heard().is_empty());
    rustix::mount::unmount(at.path(), UnmountFlags::DETACH).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        // The folder may have ended by now.
        let _ = protocol::send(&folder.control, &ToMount::Replay(Vec::new()));
        match receive(&folder.control) {
            FromMount::Replayed => std::thread::sleep(MOMENT),
            FromMount::Unmounted(outcome) => break outcome.unwrap(),
            other => panic!("{other:?}"),
        }
        assert!(Instant::now() < deadline, "the folder is still mounted");
    }
}
