//! Directories of many files, and trees of many: listed, unpacked and removed in a guest.
//!
//! Sizes are such that an emulated guest, which makes some hundred files a second, is done in half a minute;
//! MVM_TEST_STRESS=1 makes them those that folders are meant for.

use std::env;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tests::host::{must_succeed, run_in};
use tests::python::{has_python, python};
use tests::{Guest, Machines};

const MANY: &str = include_str!("programs/many.py");

/// The longest that a step may take, of the full size in an emulated guest.
const PATIENCE: Duration = Duration::from_secs(60 * 60);

struct Sizes {
    /// Files in one directory, which the guest lists.
    listed: usize,
    /// Files that the guest makes in one directory.
    made: usize,
    /// Directories of a tree that the guest unpacks and removes, of a hundred files each.
    unpacked: usize,
}

const BOUNDED: Sizes = Sizes {
    listed: 20_000,
    made: 500,
    unpacked: 5,
};

const FULL: Sizes = Sizes {
    listed: 100_000,
    made: 20_000,
    unpacked: 400,
};

#[test]
fn many_files_are_listed_made_unpacked_and_removed() {
    if !has_python("many_files_are_listed_made_unpacked_and_removed") {
        return;
    }
    let sizes = match env::var_os("MVM_TEST_STRESS") {
        Some(_) => FULL,
        None => BOUNDED,
    };
    let (packed, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::create_dir(dir.path().join("host")).unwrap();
    for number in 0..sizes.listed {
        File::create(dir.path().join(format!("host/file-{number}"))).unwrap();
    }
    pack(packed.path(), sizes.unpacked);
    let guest = Guest::of_host(dir.path())
        .option("--no-host-path", ".")
        .option("-u", "root")
        .option("-v", format!("{}:/project", dir.path().display()))
        .option("-v", format!("{}:/packed:ro", packed.path().display()));
    let machines = Machines::new();
    let machine = machines.idle(guest);
    let numbers = [sizes.listed.to_string(), sizes.made.to_string()];
    let program = python(MANY, &["/project", &numbers[0], &numbers[1]]);
    let words: Vec<_> = program.iter().map(String::as_str).collect();
    let output = machine.start(&words).wait_at_most(PATIENCE);
    assert!(!output.text().contains("WRONG "), "{output}");
    output.expect_code(0);
    let made = fs::read_dir(dir.path().join("guest")).unwrap().count();
    assert_eq!(made, sizes.made, "what the guest has made");

    // As it was packed, for the guest and for the host.
    let script = "cd /project; tar xf /packed/tree.tar && tar df /packed/tree.tar && find tree -type f | wc -l";
    let output = machine.start(&["sh", "-c", script]).wait_at_most(PATIENCE);
    output
        .expect_code(0)
        .expect_stdout(&format!("{}\n", sizes.unpacked * FILES));
    let mut diff = Command::new("diff");
    diff.arg("-r")
        .args([packed.path().join("tree"), dir.path().join("tree")]);
    must_succeed(diff);
    let script = "cd /project; rm -rf guest tree && ls -A";
    let output = machine.start(&["sh", "-c", script]).wait_at_most(PATIENCE);
    output.expect_code(0).expect_stdout("host\n");
    let left = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 1, "directories that the guest has left");
}

/// How many files a directory of the tree has.
const FILES: usize = 100;

/// A tree of so many directories, and the archive of it.
fn pack(at: &Path, directories: usize) {
    for number in 0..directories {
        let dir = at.join(format!("tree/{}/{number}", number % 20));
        fs::create_dir_all(&dir).unwrap();
        for file in 0..FILES {
            fs::write(dir.join(file.to_string()), format!("{number} {file}\n")).unwrap();
        }
    }
    run_in(at, "tar cf tree.tar tree");
}
