//! The host fails, or takes away what was shared: the guest gets the errors that a filesystem of its own
//! would give, and nothing hangs.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags};
use share::Options;

use crate::mount::Mounted;
use crate::programs::every_cache;

fn errno<T>(outcome: io::Result<T>) -> Option<i32> {
    outcome.err().and_then(|error| error.raw_os_error())
}

/// A small filesystem of the host's own, for as long as this lives.
struct Small {
    dir: tempfile::TempDir,
}

impl Small {
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = rustix::mount::mount(
            "small",
            dir.path(),
            "tmpfs",
            MountFlags::empty(),
            c"size=1m,nr_inodes=64",
        );
        match mounted {
            Ok(()) => Some(Self { dir }),
            Err(error) => {
                eprintln!("skipped: tmpfs cannot be mounted: {error}");
                None
            }
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.dir.path(), UnmountFlags::DETACH);
    }
}

fn mounted(small: &Small, at: &Path) -> Option<Mounted> {
    Mounted::of(small.dir.path(), at, Options::default(), None)
}

#[test]
fn a_full_disk_is_a_full_disk_and_what_was_there_stays() {
    let (Some(small), at) = (Small::new(), tempfile::tempdir().unwrap()) else {
        return;
    };
    let Some(mounted) = mounted(&small, at.path()) else {
        return;
    };
    fs::write(mounted.at.join("kept"), "kept").unwrap();
    let mut file = File::create(mounted.at.join("large")).unwrap();
    let chunk = vec![7; 64 << 10];
    let mut written = 0;
    let full = loop {
        match file.write(&chunk) {
            Ok(length) => written += length,
            Err(error) => break error,
        }
        assert!(written < 2 << 20, "more than there is room for");
    };
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    file.sync_all().unwrap();
    let large = fs::read(mounted.source.join("large")).unwrap();
    assert_eq!(large.len(), written);
    assert!(large.iter().all(|byte| *byte == 7));
    assert_eq!(fs::read_to_string(mounted.at.join("kept")).unwrap(), "kept");
    let found = rustix::fs::statvfs(&mounted.at).unwrap();
    assert_eq!(
        (found.f_bavail, found.f_blocks * found.f_frsize),
        (0, 1 << 20)
    );
    let too_much = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 4 << 20);
    assert_eq!(too_much, Err(rustix::io::Errno::NOSPC));
    // With room again, it goes on.
    file.set_len(0).unwrap();
    fs::write(mounted.at.join("more"), &chunk).unwrap();
    assert_eq!(fs::read(mounted.source.join("more")).unwrap(), chunk);
    // No more names.
    let full = (0..100).find_map(|number| File::create(mounted.at.join(number.to_string())).err());
    assert_eq!(full.unwrap().raw_os_error(), Some(libc::ENOSPC));
}

#[test]
fn an_open_file_outlives_what_the_host_puts_in_its_place() {
    for mounted in every_cache() {
        let at = mounted.at.join("file");
        fs::write(&at, "old").unwrap();
        let open = File::options().read(true).write(true).open(&at).unwrap();
        mounted.on_host("rm file; mkdir file; echo inner > file/inner");
        let mut old = [0; 3];
        open.read_exact_at(&mut old, 0).unwrap();
        assert_eq!(&old, b"old");
        open.write_all_at(b"new", 0).unwrap();
        open.sync_all().unwrap();
        open.set_len(2).unwrap();
        assert_eq!(open.metadata().unwrap().len(), 2);
        if mounted.is_told() {
            mounted.until("a directory in its place", || at.join("inner").exists());
            assert_eq!(errno(fs::read(&at)), Some(libc::EISDIR));
        }
        drop(open);
        assert_eq!(
            fs::read_to_string(mounted.source.join("file/inner")).unwrap(),
            "inner\n"
        );
    }
}

#[test]
fn a_directory_that_the_host_has_deleted_is_empty_and_takes_nothing_new() {
    let (source, at) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let shared = source.path().join("shared");
    fs::create_dir_all(shared.join("sub")).unwrap();
    fs::write(shared.join("sub/file"), "data").unwrap();
    let Some(mounted) = Mounted::of(&shared, at.path(), Options::default(), None) else {
        return;
    };
    let open = File::options()
        .read(true)
        .write(true)
        .open(at.path().join("sub/file"))
        .unwrap();
    assert_eq!(fs::read_dir(at.path()).unwrap().count(), 1);
    mounted.on_host("rm -r ../shared");
    mounted.until("an empty directory", || {
        fs::read_dir(at.path()).is_ok_and(|mut listed| listed.next().is_none())
    });
    assert_eq!(
        errno(fs::write(at.path().join("new"), "")),
        Some(libc::ENOENT)
    );
    assert_eq!(
        errno(fs::create_dir(at.path().join("new"))),
        Some(libc::ENOENT)
    );
    assert_eq!(
        errno(fs::read(at.path().join("sub/file"))),
        Some(libc::ENOENT)
    );
    assert!(fs::metadata(at.path()).unwrap().is_dir());
    // What is open lives on, as on any filesystem.
    open.write_all_at(b"more", 4).unwrap();
    let mut content = String::new();
    (&open).read_to_string(&mut content).unwrap();
    assert_eq!(content, "datamore");
    // Another directory of that name is another directory.
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("later"), "").unwrap();
    assert!(!at.path().join("later").exists());
}

#[test]
fn a_filesystem_that_the_host_unmounts_stays_until_it_is_let_go_of() {
    let (Some(small), at) = (Small::new(), tempfile::tempdir().unwrap()) else {
        return;
    };
    let Some(mounted) = mounted(&small, at.path()) else {
        return;
    };
    fs::write(mounted.at.join("file"), "data").unwrap();
    let busy = rustix::mount::unmount(small.dir.path(), UnmountFlags::empty());
    assert_eq!(busy, Err(rustix::io::Errno::BUSY));
    rustix::mount::unmount(small.dir.path(), UnmountFlags::DETACH).unwrap();
    assert_eq!(fs::read_to_string(mounted.at.join("file")).unwrap(), "data");
    fs::write(mounted.at.join("more"), "more").unwrap();
    assert_eq!(fs::read_dir(small.dir.path()).unwrap().count(), 0);
}

#[test]
fn permission_that_is_taken_away_on_the_host_is_missing_in_the_guest() {
    const USER: u32 = 65534;
    let Some(mounted) = Mounted::rootless(Options::default(), (USER, USER)) else {
        return;
    };
    let dir = mounted.at.join("dir");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), "data").unwrap();
    let mut open = File::options().append(true).open(dir.join("file")).unwrap();
    // Somebody else's by now, and nobody's business.
    let on_host = mounted.source.join("dir");
    mounted.on_host("chown -R 0:0 dir; chmod 700 dir dir/file");
    mounted.until("no way in", || {
        errno(fs::read(dir.join("file"))) == Some(libc::EACCES)
    });
    assert_eq!(errno(fs::write(dir.join("new"), "")), Some(libc::EACCES));
    assert_eq!(errno(fs::remove_file(dir.join("file"))), Some(libc::EACCES));
    assert_eq!(errno(chown(&dir, Some(1), None)), Some(libc::EPERM));
    let mode = fs::Permissions::from_mode(0o777);
    assert_eq!(errno(fs::set_permissions(&dir, mode)), Some(libc::EPERM));
    // Who has it open keeps it, as anywhere.
    open.write_all(b" more").unwrap();
    assert_eq!(
        fs::read_to_string(on_host.join("file")).unwrap(),
        "data more"
    );
}
