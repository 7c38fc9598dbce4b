//! What the host advises, and what the agent does of its own accord then.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::process::Command;

use share::Options;

use super::{Asked, Folder, Place, shell};
use crate::tests::eventually;

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
    if setfattr.status().is_ok_and(|status| status.success()) {
        chown(&new, Some(0), Some(0)).unwrap();
        assert!(count(&folder, &[GETXATTR]) > asked);
    }
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
        std::thread::scope(|scope| {
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
