//! The host fails, or takes away what a guest uses: the guest gets the errors that a disk of its own would give.

use std::fs;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;
use tests::Guest;
use tests::host::{self, run_in};
use tests::process::Input;
use tests::python::{converse, has_python, python};

const FAILING: &str = include_str!("programs/failing.py");

/// A small filesystem of the host's own, for as long as this lives.
struct Small {
    dir: TempDir,
}

impl Small {
    fn new(test: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let options = c"size=1m,nr_inodes=64";
        match mount("small", dir.path(), "tmpfs", MountFlags::empty(), options) {
            Ok(()) => Some(Self { dir }),
            Err(error) => {
                host::skipped(test, &format!("a tmpfs cannot be mounted: {error}"));
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // It may be unmounted already.
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn what_the_host_takes_away_gives_the_errors_of_a_disk() {
    let test = "what_the_host_takes_away_gives_the_errors_of_a_disk";
    if !has_python(test) {
        return;
    }
    let (Some(full), Some(unmounted)) = (Small::new(test), Small::new(test)) else {
        return;
    };
    let swapped = tempfile::tempdir().unwrap();
    let program = python(FAILING, &["/full", "/swapped", "/unmounted"]);
    let words: Vec<_> = program.iter().map(String::as_str).collect();
    let folder = |path: &Path, at: &str| format!("{}:{at}", path.display());
    let running = Guest::of_host(swapped.path())
        .option("--no-host-path", ".")
        .option("-u", "root")
        .option("-v", folder(full.path(), "/full"))
        .option("-v", folder(swapped.path(), "/swapped"))
        .option("-v", folder(unmounted.path(), "/unmounted"))
        .flag("-i")
        .input(Input::Open)
        .start(&words);
    let mut left = Vec::new();
    converse(running, |what| match what {
        "replace file by a directory" => {
            run_in(
                swapped.path(),
                "rm file; mkdir file; echo inner > file/inner",
            );
        }
        "replace dir by a file" => run_in(swapped.path(), "rm -r dir; echo file > dir"),
        "unmount" => {
            let busy = unmount(unmounted.path(), UnmountFlags::empty());
            assert_eq!(busy, Err(Errno::BUSY), "a folder that a machine has");
            unmount(unmounted.path(), UnmountFlags::DETACH).unwrap();
            left.extend(fs::read_dir(unmounted.path()).unwrap());
        }
        _ => {
            let written = what.strip_prefix("full ").map(str::parse::<usize>);
            let Some(Ok(written)) = written else {
                panic!("{what:?}?");
            };
            let large = fs::read(full.path().join("large")).unwrap();
            assert_eq!(large.len(), written, "what the guest could write");
            assert!(large.iter().all(|byte| *byte == 7), "other bytes");
        }
    });
    let kept = fs::read_to_string(full.path().join("kept")).unwrap();
    assert_eq!(kept, "kept", "what was there when the disk became full");
    let inner = fs::read_to_string(swapped.path().join("file/inner")).unwrap();
    assert_eq!(inner, "inner\n", "what took the place of an open file");
    assert!(left.is_empty(), "below what was unmounted: {left:?}");
    let now = fs::read_dir(unmounted.path()).unwrap().count();
    assert_eq!(
        now, 0,
        "files where the guest's filesystem is not mounted any more"
    );
}
