//! Mounting, carrying data, and every way in which a mount ends.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use agent::protocol::{FromMount, MountStream, Open, ToMount};
use rustix::mount::{MountFlags, UnmountFlags};
use share::Options;

use super::{Asked, Folder, Place, ask, is_mounted, receive, shell};
use crate::tests::{connect, eventually};

/// A new folder, where it is and where it is mounted.
fn folder() -> Option<(Folder, Place, Place)> {
    let (source, at) = (Place::new(), Place::new());
    let folder = Folder::mount(source.path(), &Asked::at(at.path()), Options::default())?;
    Some((folder, source, at))
}

#[test]
fn data_of_any_size_goes_both_ways_through_several_queues() {
    let Some((_folder, source, at)) = folder() else {
        return;
    };
    let byte = |at: usize, seed: usize| (at * 31 + seed + at / 4096) as u8;
    thread::scope(|scope| {
        for seed in 0..6 {
            let (source, at) = (source.path(), at.path());
            scope.spawn(move || {
                let lengths = [0, 1, 4095, 65_537, 3 << 20];
                for (number, length) in lengths.into_iter().enumerate() {
                    let name = format!("{seed}.{number}");
                    let data: Vec<u8> = (0..length).map(|at| byte(at, seed)).collect();
                    fs::write(at.join(&name), &data).unwrap();
                    assert!(fs::read(source.join(&name)).unwrap() == data, "{name}");
                    let other = format!("{name}.host");
                    fs::write(source.join(&other), &data).unwrap();
                    assert!(fs::read(at.join(&other)).unwrap() == data, "{other}");
                }
            });
        }
    });
    assert_eq!(fs::read_dir(at.path()).unwrap().count(), 60);
}

#[test]
fn a_mount_shows_its_source_and_takes_devices_and_set_ids_from_nobody() {
    let Some((_folder, _source, at)) = folder() else {
        return;
    };
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let path = at.path().to_str().unwrap();
    let line = mounts.lines().find(|line| line.contains(path)).unwrap();
    assert!(line.contains("nosuid,nodev"), "{line}");
    assert!(
        line.contains("fuse.mvm /a/directory\\040of\\040the\\040host"),
        "{line}"
    );
}

#[test]
fn what_is_missing_of_a_mount_point_is_made() {
    let (source, place) = (Place::new(), Place::new());
    fs::write(source.path().join("file"), "content").unwrap();
    let at = place.path().join("several/levels/deep");
    let Some(_folder) = Folder::mount(source.path(), &Asked::at(&at), Options::default()) else {
        return;
    };
    assert_eq!(fs::read_to_string(at.join("file")).unwrap(), "content");
    let mode = fs::metadata(place.path().join("several")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o755);
}

#[test]
fn a_single_file_is_mounted_over_a_file_that_is_made() {
    let (source, place) = (Place::new(), Place::new());
    let file = source.path().join("file");
    fs::write(&file, "content").unwrap();
    let at = place.path().join("etc/file");
    let asked = Asked {
        mode: 0o100_644,
        ..Asked::at(&at)
    };
    let Some(folder) = Folder::mount(&file, &asked, Options::default()) else {
        return;
    };
    assert_eq!(fs::read_to_string(&at).unwrap(), "content");
    fs::write(&at, "from the guest").unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "from the guest");
    folder.unmount(false).unwrap();
    assert_eq!(fs::read_to_string(&at).unwrap(), "");
}

#[test]
fn a_symlink_leads_to_where_it_does_in_the_machine() {
    let (source, place) = (Place::new(), Place::new());
    fs::create_dir(place.path().join("real")).unwrap();
    std::os::unix::fs::symlink("real", place.path().join("link")).unwrap();
    fs::write(source.path().join("file"), "content").unwrap();
    let asked = Asked::at(place.path().join("link/new"));
    let Some(folder) = Folder::mount(source.path(), &asked, Options::default()) else {
        return;
    };
    let real = place.path().join("real/new");
    assert!(is_mounted(&real));
    folder.unmount(false).unwrap();
    assert!(!is_mounted(&real));
}

#[test]
fn a_mount_point_of_another_kind_is_refused_with_its_reason() {
    let (source, place) = (Place::new(), Place::new());
    fs::write(place.path().join("file"), "").unwrap();
    let Some(_probe) = folder() else {
        return;
    };
    let file = source.path().join("file");
    fs::write(&file, "").unwrap();
    let try_one = |source: &Path, asked: &Asked| {
        let refused = Folder::try_mount(source, asked, Options::default());
        refused.err().expect("it was mounted")
    };
    let refused = |asked: &Asked| try_one(source.path(), asked);
    let why = refused(&Asked::at(place.path().join("file")));
    assert!(why.contains("directory cannot be mounted"), "{why}");
    let asked = Asked {
        mode: 0o100_644,
        ..Asked::at(place.path())
    };
    let why = try_one(&file, &asked);
    assert!(why.contains("file cannot be mounted"), "{why}");
    let why = refused(&Asked::at("/"));
    assert!(why.contains("absolute path below /"), "{why}");
    let why = refused(&Asked {
        queues: 0,
        ..Asked::at(place.path())
    });
    assert!(why.contains("1 to 64 queues"), "{why}");
}

#[test]
fn read_only_is_read_only() {
    let (source, at) = (Place::new(), Place::new());
    fs::write(source.path().join("file"), "content").unwrap();
    let asked = Asked {
        read_only: true,
        ..Asked::at(at.path())
    };
    let Some(_folder) = Folder::mount(source.path(), &asked, Options::default()) else {
        return;
    };
    let file = at.path().join("file");
    assert_eq!(fs::read_to_string(&file).unwrap(), "content");
    let error = fs::write(&file, "other").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
}

#[test]
fn what_the_host_changes_is_seen() {
    let Some((_folder, source, at)) = folder() else {
        return;
    };
    let file = at.path().join("file");
    fs::write(&file, "old").unwrap();
    shell(source.path(), "echo new > file");
    eventually("the change is seen", || {
        fs::read_to_string(&file).unwrap() == "new\n"
    });
}

#[test]
fn the_machine_unmounts_and_the_host_hears_of_it() {
    let Some((folder, _source, at)) = folder() else {
        return;
    };
    rustix::mount::unmount(at.path(), UnmountFlags::empty()).unwrap();
    assert_eq!(receive(&folder.control), FromMount::Unmounted(Ok(())));
    folder.assert_over();
}

#[test]
fn the_host_unmounts_what_nobody_uses() {
    let Some((folder, _source, at)) = folder() else {
        return;
    };
    let open = File::create(at.path().join("file")).unwrap();
    let why = folder.unmount(false).unwrap_err();
    let expected = format!("(pid {}, an open file)", std::process::id());
    assert!(why.contains(&expected), "{why}");
    assert!(is_mounted(at.path()));
    (&open).write_all(b"still works").unwrap();
    drop(open);
    // Closing a file goes on for a moment after the call.
    let mut outcome = folder.unmount(false);
    for _ in 0..100 {
        if outcome.is_ok() {
            break;
        }
        thread::sleep(std::time::Duration::from_millis(50));
        outcome = folder.unmount(false);
    }
    outcome.unwrap();
    assert!(!is_mounted(at.path()));
    folder.assert_over();
}

#[test]
fn the_host_takes_the_mount_from_those_who_use_it() {
    let Some((folder, _source, at)) = folder() else {
        return;
    };
    let file = File::create(at.path().join("file")).unwrap();
    file.write_all_at(b"data", 0).unwrap();
    folder.unmount(true).unwrap();
    assert!(!is_mounted(at.path()));
    assert!(file.metadata().is_err() || file.read_at(&mut [0; 4], 0).is_err());
    folder.assert_over();
}

#[test]
fn the_end_of_the_control_connection_ends_the_mount_though_somebody_waits_for_the_host() {
    let Some((folder, _source, at)) = folder() else {
        return;
    };
    let open = File::create(at.path().join("file")).unwrap();
    folder.control.shutdown(Shutdown::Both).unwrap();
    eventually("it is unmounted", || !is_mounted(at.path()));
    eventually("what is open gives errors", || open.sync_all().is_err());
}

#[test]
fn the_end_of_any_stream_ends_the_mount() {
    for number in 0..=super::QUEUES as usize {
        let Some((folder, _source, at)) = folder() else {
            return;
        };
        folder.streams[number].shutdown(Shutdown::Both).unwrap();
        assert_eq!(receive(&folder.control), FromMount::Unmounted(Ok(())));
        folder.assert_over();
        assert!(!is_mounted(at.path()), "stream {number}");
    }
}

#[test]
fn a_host_that_answers_nothing_and_goes_leaves_nobody_waiting() {
    let Some(_probe) = folder() else {
        return;
    };
    let at = Place::new();
    let (mount, control) = ask(&Asked {
        queues: 1,
        ..Asked::at(at.path())
    });
    let stream = |kind| connect(&Open::MountStream { mount, kind });
    let mut requests = stream(MountStream::Requests { queue: 0 });
    let notices = stream(MountStream::Notifications);
    // The kernel's first request is there, and nothing is said to it.
    requests.read_exact(&mut [0; 40]).unwrap();
    drop(requests);
    let FromMount::Mounted(Err(why)) = receive(&control) else {
        panic!("it was mounted");
    };
    assert!(why.contains("cannot be looked at"), "{why}");
    assert_eq!((&notices).read(&mut [0]).unwrap(), 0);
}

#[test]
fn garbage_from_the_host_ends_the_mount() {
    let Some(_probe) = folder() else {
        return;
    };
    for garbage in [[0; 16], [0xff; 16], [16; 16]] {
        let at = Place::new();
        let (mount, control) = ask(&Asked {
            queues: 1,
            ..Asked::at(at.path())
        });
        let stream = |kind| connect(&Open::MountStream { mount, kind });
        let mut requests: UnixStream = stream(MountStream::Requests { queue: 0 });
        let _notices = stream(MountStream::Notifications);
        requests.write_all(&garbage).unwrap();
        let FromMount::Mounted(Err(_)) = receive(&control) else {
            panic!("it was mounted");
        };
    }
}

#[test]
fn a_mount_over_another_is_not_taken_for_it() {
    let Some((folder, _source, at)) = folder() else {
        return;
    };
    rustix::mount::mount("none", at.path(), "tmpfs", MountFlags::empty(), c"").unwrap();
    let why = folder.unmount(false).unwrap_err();
    assert!(why.contains("mounted over it"), "{why}");
    folder.say(&ToMount::Unmount { force: true });
    assert_eq!(receive(&folder.control), FromMount::Unmounted(Ok(())));
    assert!(is_mounted(at.path()), "the other mount is gone");
}

#[test]
fn mounting_again_and_again_leaves_nothing_behind() {
    let (source, at) = (Place::new(), Place::new());
    for _ in 0..50 {
        let asked = Asked::at(at.path());
        let Some(folder) = Folder::mount(source.path(), &asked, Options::default()) else {
            return;
        };
        fs::set_permissions(at.path(), PermissionsExt::from_mode(0o700)).unwrap();
        folder.unmount(false).unwrap();
        folder.assert_over();
    }
    eventually("pumps end", || {
        let names = fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = names.flat_map(|task| fs::read_to_string(task.path().join("comm")));
        // Other tests run meanwhile.
        names.filter(|name| name.starts_with("fuse-")).count() < 150
    });
}
