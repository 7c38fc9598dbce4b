//! What the host advises, and what the agent does of its own accord then.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use share::Options;

use super::{Asked, ExitStatus, Folder, Place, shell};
use crate::tests::{eventually, run_outside};

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const GETXATTR: u32 = 22;
const READDIR: u32 = 28;
const READDIRPLUS: u32 = 44;

/// How often the host was asked for that so far.
fn count(folder: &Folder, opcodes: &[u32]) -> usize {
    let seen = folder.seen.lock().unwrap();
    seen.iter().filter(|seen| opcodes.contains(seen)).count()
}

#[test]
fn a_directory_of_which_names_are_looked_up_one_by_one_is_listed() {
    let (source, at) = (Place::new(), Place::new());
    let names: Vec<_> = (0..200).map(|number| format!("file {number}")).collect();
    fs::create_dir(source.path().join("dir")).unwrap();
    for name in &names {
        fs::write(source.path().join("dir").join(name), name).unwrap();
    }
    let Some(folder) = Folder::mount(source.path(), &Asked::at(at.path()), Options::default())
    else {
        return;
    };
    let dir = at.path().join("dir");
    for name in ["what is not there", &names[0], "what is not there either"] {
        assert_eq!(fs::exists(dir.join(name)).unwrap(), name == names[0]);
    }
    assert_eq!(count(&folder, &[READDIR, READDIRPLUS]), 0);
    fs::metadata(dir.join(&names[1])).unwrap();
    eventually("the directory is listed", || {
        count(&folder, &[READDIRPLUS]) > 0
    });
    // The more are looked up, the more is listed, to the end.
    for name in &names {
        assert_eq!(fs::read_to_string(dir.join(name)).unwrap(), *name);
    }
    // A program that lists it has all of it, and the folder is not in use when all is done.
    assert_eq!(fs::read_dir(&dir).unwrap().count(), names.len());
    folder.unmount(false).unwrap();
}

#[test]
fn nobody_asks_for_the_capability_of_a_file_that_was_made_just_now() {
    let (source, at) = (Place::new(), Place::new());
    fs::write(source.path().join("old"), "").unwrap();
    let Some(folder) = Folder::mount(source.path(), &Asked::at(at.path()), Options::default())
    else {
        return;
    };
    let new = at.path().join("new");
    fs::write(&new, "content").unwrap();
    chown(&new, Some(0), Some(0)).unwrap();
    assert_eq!(count(&folder, &[GETXATTR]), 0);
    fs::write(at.path().join("old"), "content").unwrap();
    let asked = count(&folder, &[GETXATTR]);
    assert!(asked > 0);
    // What was given an attribute in the guest, or changed on the host, is no new file.
    let mut setfattr = Command::new("setfattr");
    setfattr.args(["-n", "user.name", "-v", "value"]).arg(&new);
    if run_outside(&mut setfattr).is_ok_and(|(status, _)| status == ExitStatus::Code(0)) {
        chown(&new, Some(0), Some(0)).unwrap();
        assert!(count(&folder, &[GETXATTR]) > asked);
    }
}

#[test]
fn listing_keeps_up_with_many_threads_that_look_names_up() {
    const DIRS: usize = 100;
    const FILES: usize = 100;
    let (source, at) = (Place::new(), Place::new());
    for dir in 0..DIRS {
        let dir = source.path().join(dir.to_string());
        fs::create_dir(&dir).unwrap();
        for file in 0..FILES {
            fs::write(dir.join(file.to_string()), "").unwrap();
        }
    }
    let Some(folder) = Folder::mount(source.path(), &Asked::at(at.path()), Options::default())
    else {
        return;
    };
    // As many as git has, each in directories of its own.
    thread::scope(|scope| {
        for part in 0..20 {
            let at = at.path();
            scope.spawn(move || {
                for dir in (part * DIRS / 20)..((part + 1) * DIRS / 20) {
                    for file in 0..FILES {
                        let name = at.join(dir.to_string()).join(file.to_string());
                        assert!(fs::symlink_metadata(name).unwrap().is_file());
                    }
                }
            });
        }
    });
    let asked = count(&folder, &[LOOKUP]);
    assert!(asked < DIRS * FILES / 2, "{asked} names were looked up");
}

#[test]
fn the_attributes_of_a_directory_that_is_worked_in_are_known_and_right() {
    let (source, at) = (Place::new(), Place::new());
    let Some(folder) = Folder::mount(source.path(), &Asked::at(at.path()), Options::default())
    else {
        return;
    };
    let same = |name: &str| {
        let times = [at.path(), source.path()].map(|dir| {
            let seen = fs::metadata(dir.join(name)).unwrap();
            (seen.mtime(), seen.mtime_nsec(), seen.nlink())
        });
        times[0] == times[1]
    };
    let dir = at.path().join("dir");
    fs::create_dir(&dir).unwrap();
    // The first requests may come before the directory is watched.
    eventually("the directory is watched", || {
        fs::write(dir.join("first"), "").unwrap();
        fs::remove_file(dir.join("first")).unwrap();
        let asked = count(&folder, &[GETATTR]);
        for _ in 0..10 {
            fs::write(dir.join("first"), "").unwrap();
            fs::remove_file(dir.join("first")).unwrap();
        }
        count(&folder, &[GETATTR]) == asked
    });
    assert!(same("dir"));
    // Through all queues at once, the last one has the last word.
    for round in 0..20 {
        thread::scope(|scope| {
            for worker in 0..4 {
                let dir = &dir;
                scope.spawn(move || {
                    for number in 0..5 {
                        let name = format!("{round}.{worker}.{number}");
                        fs::create_dir(dir.join(&name)).unwrap();
                        fs::rename(dir.join(&name), dir.join(name + "x")).unwrap();
                    }
                });
            }
        });
        assert!(same("dir"), "round {round}");
        // So does the host.
        shell(source.path(), &format!("mkdir dir/host.{round}"));
        eventually("the host's change is seen", || same("dir"));
    }
}

#[test]
fn nobody_asks_for_names_in_a_directory_that_was_made_just_now() {
    let (source, at) = (Place::new(), Place::new());
    let Some(folder) = Folder::mount(source.path(), &Asked::at(at.path()), Options::default())
    else {
        return;
    };
    let (dir, host) = (at.path().join("dir"), source.path().join("dir"));
    fs::create_dir(&dir).unwrap();
    let asked = count(&folder, &[LOOKUP]);
    for number in 0..20 {
        let name = dir.join(format!("file {number}"));
        assert!(!fs::exists(&name).unwrap());
        fs::write(&name, "content").unwrap();
        fs::create_dir(name.with_extension("dir")).unwrap();
        fs::write(name.with_extension("dir").join("file"), "").unwrap();
    }
    assert_eq!(count(&folder, &[LOOKUP]), asked);
    for number in 0..20 {
        let name = format!("file {number}");
        assert_eq!(fs::read_to_string(dir.join(&name)).unwrap(), "content");
        assert!(fs::exists(host.join(format!("{name}.dir/file"))).unwrap());
    }
    // What the host makes was not there a moment ago.
    for number in 0..20 {
        let name = format!("of the host {number}");
        assert!(!fs::exists(dir.join(&name)).unwrap());
        shell(&host, &format!("> '{name}'"));
        eventually("the host's file is seen", || {
            fs::exists(dir.join(&name)).unwrap()
        });
    }
    // All names are asked for again, of which none has been seen yet.
    let asked = count(&folder, &[LOOKUP]);
    assert!(!fs::exists(dir.join("neither")).unwrap());
    assert!(count(&folder, &[LOOKUP]) > asked);
}

#[test]
fn a_directory_that_the_host_fills_at_once_is_not_taken_for_empty() {
    let (source, at) = (Place::new(), Place::new());
    let Some(_folder) = Folder::mount(source.path(), &Asked::at(at.path()), Options::default())
    else {
        return;
    };
    // Makes a file in each directory as soon as it sees it, and gives up where the test has.
    const FILL: &str = "for n in $(seq 0 199); do \
        until > dir$n/file; do [ ! -e ended ] || exit 0; done; done 2>/dev/null";
    thread::scope(|scope| {
        scope.spawn(|| shell(source.path(), FILL));
        for number in 0..200 {
            let dir = at.path().join(format!("dir{number}"));
            fs::create_dir(&dir).unwrap();
            if !is_seen(&dir.join("file")) {
                fs::write(source.path().join("ended"), "").unwrap();
                panic!("the host's file in {} is not seen", dir.display());
            }
        }
    });
}

/// Whether a file is there within some seconds.
fn is_seen(file: &Path) -> bool {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        if fs::exists(file).unwrap() {
            return true;
        }
    }
    false
}

#[test]
fn a_directory_that_was_listed_has_its_own_attributes_when_it_is_renamed_and_removed() {
    let (source, at) = (Place::new(), Place::new());
    let Some(_folder) = Folder::mount(source.path(), &Asked::at(at.path()), Options::default())
    else {
        return;
    };
    // Not `fs::metadata`, which asks for the time of birth, too: that is another request.
    let changed = |dir: &Path| {
        let seen = rustix::fs::stat(dir).unwrap();
        (seen.st_ctime, seen.st_ctime_nsec, seen.st_nlink)
    };
    for number in 0..10 {
        let [old, new] = ["old", "new"].map(|name| format!("{name}{number}"));
        fs::create_dir(at.path().join(&old)).unwrap();
        assert_eq!(fs::read_dir(at.path().join(&old)).unwrap().count(), 0);
        // Later than all that was done to it, by the host's clock.
        thread::sleep(Duration::from_millis(10));
        fs::rename(at.path().join(&old), at.path().join(&new)).unwrap();
        let [here, host] = [&at, &source].map(|place| changed(&place.path().join(&new)));
        assert_eq!(here, host, "renamed");
        let dir = fs::File::open(at.path().join(&new)).unwrap();
        assert_eq!(fs::read_dir(at.path().join(&new)).unwrap().count(), 0);
        fs::remove_dir(at.path().join(&new)).unwrap();
        assert_eq!(rustix::fs::fstat(&dir).unwrap().st_nlink, 0, "removed");
    }
}
