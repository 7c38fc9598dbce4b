//! A file that is shared by itself: what others do with it on the host is seen in the guest, and told to it.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use share::wire::ROOT_ID;
use share::{Cache, Change, Options};

use crate::mount::Mounted;

/// A directory of the host with a file in it that is shared by itself.
struct Single {
    dir: tempfile::TempDir,
    mounted: Mounted,
    _at: tempfile::NamedTempFile,
}

impl Single {
    fn new(options: Options) -> Option<Self> {
        Self::of(options, None)
    }

    /// One that is shared by `ids`, who owns it and has no privileges, or by the user who runs the tests.
    fn of(options: Options, ids: Option<(u32, u32)>) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "one\n").unwrap();
        if let Some((uid, gid)) = ids {
            for path in [dir.path(), &file] {
                chown(path, Some(uid), Some(gid)).unwrap();
            }
        }
        let at = tempfile::NamedTempFile::new().unwrap();
        let mounted = Mounted::of(&file, at.path(), options, ids)?;
        Some(Self {
            dir,
            mounted,
            _at: at,
        })
    }

    /// Runs a shell's commands in the directory, as somebody else on the host.
    fn on_host(&self, commands: &str) {
        let mut shell = Command::new("sh");
        let status = shell
            .args(["-ec", commands])
            .current_dir(self.dir.path())
            .status();
        assert!(status.unwrap().success(), "{commands}");
    }

    /// What the guest reads.
    fn content(&self) -> String {
        fs::read_to_string(&self.mounted.at).unwrap()
    }

    fn changes(&self, count: usize) -> Vec<Change> {
        let told = (0..count).map(|_| {
            let event = self.mounted.event();
            let about = (event.dir, event.path.len(), event.name.count_bytes());
            assert_eq!(about, (ROOT_ID, 0, 0), "{event:?}");
            event.change
        });
        told.collect()
    }
}

#[test]
fn what_nobody_changes_is_not_asked_for_again_and_what_is_changed_is_seen() {
    let Some(single) = Single::new(Options::default()) else {
        return;
    };
    let at = &single.mounted.at;
    let open = File::open(at).unwrap();
    assert_eq!(single.content(), "one\n");
    // Longer than what is believed only briefly is believed.
    std::thread::sleep(Duration::from_millis(1500));
    let _ = fs::metadata(at);
    let before = single.mounted.requests();
    let mut data = [0; 4];
    for _ in 0..10 {
        assert_eq!(fs::metadata(at).unwrap().len(), 4);
        open.read_exact_at(&mut data, 0).unwrap();
    }
    assert_eq!(single.mounted.requests(), before);

    single.on_host("echo two > file");
    single
        .mounted
        .until("same size, other data, in a file that is open", || {
            open.read_exact_at(&mut data, 0).is_ok() && &data == b"two\n"
        });
    assert_eq!(single.content(), "two\n");
    single.on_host("echo more >> file");
    single.mounted.until("more data", || {
        open.metadata().unwrap().len() == 9 && single.content() == "two\nmore\n"
    });
    single.on_host("chmod 604 file");
    single.mounted.until("permissions", || {
        fs::metadata(at).unwrap().mode() & 0o777 == 0o604
    });
    // Whatever its name is that is used, and however many it has.
    single.on_host("mkdir dir; ln file dir/other");
    single
        .mounted
        .until("one more name", || fs::metadata(at).unwrap().nlink() == 2);
    single.on_host("echo by another name > dir/other");
    single.mounted.until("data by another name", || {
        single.content() == "by another name\n"
    });
}

#[test]
fn what_the_host_does_is_told_and_what_the_guest_does_is_not() {
    for ids in [None, Some((1000, 1000))] {
        let Some(single) = Single::of(Options::default(), ids) else {
            return;
        };
        fs::write(&single.mounted.at, "guest\n").unwrap();
        fs::set_permissions(&single.mounted.at, Permissions::from_mode(0o640)).unwrap();
        assert!(single.mounted.is_quiet());
        single.on_host("echo more >> file");
        assert_eq!(single.changes(2), [Change::Modified, Change::CloseWrite]);
        single.on_host("chmod 600 file");
        assert_eq!(single.changes(1), [Change::Attrib]);
        // What happens beside it is nothing to it.
        single.on_host("echo other > other; chmod 600 other; rm other; chmod 700 .");
        assert!(single.mounted.is_quiet());
        assert_eq!(single.content(), "guest\nmore\n");
    }
}

#[test]
fn who_replaces_the_file_leaves_the_old_one_to_the_guest() {
    let Some(single) = Single::new(Options::default()) else {
        return;
    };
    assert_eq!(single.content(), "one\n");
    single.on_host("cat file > moved; mv file elsewhere; echo moved >> elsewhere");
    assert_eq!(single.changes(2), [Change::Modified, Change::CloseWrite]);
    single.mounted.until("it is seen under another name", || {
        single.content() == "one\nmoved\n"
    });
    single.on_host("echo new > new; mv new elsewhere");
    assert_eq!(single.changes(1), [Change::Attrib]);
    single.mounted.until("it has lost its name", || {
        fs::metadata(&single.mounted.at).unwrap().nlink() == 0
    });
    single.on_host("echo newer > elsewhere");
    assert!(single.mounted.is_quiet());
    assert_eq!(single.content(), "one\nmoved\n");
    fs::write(&single.mounted.at, "the guest's\n").unwrap();
    assert_eq!(single.content(), "the guest's\n");
    let now = fs::read_to_string(single.dir.path().join("elsewhere")).unwrap();
    assert_eq!(now, "newer\n");
}

#[test]
fn what_one_share_changes_is_seen_in_another_of_the_same_process() {
    let Some(single) = Single::new(Options::default()) else {
        return;
    };
    let (dir, at) = (
        tempfile::tempdir().unwrap(),
        [(); 2].map(|()| tempfile::NamedTempFile::new().unwrap()),
    );
    let file = single.dir.path().join("file");
    let read_only = Options {
        read_only: true,
        ..Options::default()
    };
    let mount = |source: &Path, at: &Path, options| Mounted::of(source, at, options, None).unwrap();
    let around = mount(single.dir.path(), dir.path(), Options::default());
    let again = mount(&file, at[0].path(), Options::default());
    let frozen = mount(&file, at[1].path(), read_only);
    let ways = [
        around.at.join("file"),
        single.mounted.at.clone(),
        again.at.clone(),
        frozen.at.clone(),
    ];
    for (number, way) in ways[..3].iter().enumerate() {
        for other in &ways {
            assert!(fs::read_to_string(other).is_ok());
        }
        // Of one size, so that nothing but the data tells.
        fs::write(way, number.to_string()).unwrap();
        for other in &ways {
            single.mounted.until("a change by another share", || {
                fs::read_to_string(other).unwrap() == number.to_string()
            });
        }
    }
    for mounted in [&single.mounted, &around, &again, &frozen] {
        assert!(mounted.is_quiet(), "a guest's own doing was told to it");
    }
}

#[test]
fn what_a_share_that_watches_nothing_changes_is_seen_too() {
    let Some(single) = Single::new(Options::default()) else {
        return;
    };
    let (dir, at) = (
        tempfile::tempdir().unwrap(),
        tempfile::NamedTempFile::new().unwrap(),
    );
    let strict = Options {
        cache: Cache::Strict,
        ..Options::default()
    };
    let file = single.dir.path().join("file");
    let around = Mounted::of(single.dir.path(), dir.path(), strict, None).unwrap();
    let again = Mounted::of(&file, at.path(), strict, None).unwrap();
    for (way, text) in [(around.at.join("file"), "1"), (again.at.clone(), "2")] {
        assert!(!single.content().is_empty());
        fs::write(way, text).unwrap();
        single
            .mounted
            .until("a change by another share", || single.content() == text);
    }
    assert!(
        single.mounted.is_quiet(),
        "a guest's own doing was told to it"
    );
}

#[test]
fn what_cannot_be_watched_is_seen_after_a_while() {
    // No file of FUSE is watched.
    let Some(outer) = Mounted::new(Options::default()) else {
        return;
    };
    outer.on_host("echo one > file");
    let at = tempfile::NamedTempFile::new().unwrap();
    let inner = Mounted::of(&outer.at.join("file"), at.path(), Options::default(), None).unwrap();
    let open = File::open(&inner.at).unwrap();
    let mut data = [0; 4];
    open.read_exact_at(&mut data, 0).unwrap();
    assert_eq!(&data, b"one\n");
    outer.on_host("echo two > file");
    inner.until("data", || {
        fs::metadata(&inner.at).is_ok()
            && open.read_exact_at(&mut data, 0).is_ok()
            && &data == b"two\n"
    });
    assert!(inner.is_quiet());
}
