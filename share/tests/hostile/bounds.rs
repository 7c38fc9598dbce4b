//! Nothing grows without bound, and no request is too odd.

use std::fs;
use std::path::Path;

use rustix::io::Errno;
use share::wire::{self, Opcode, ROOT_ID};
use share::{Limits, Locking, Options, Share};
use zerocopy::IntoBytes;

use crate::guest::{Guest, share, some_limits};

#[test]
fn a_guest_that_forgets_nothing_and_closes_nothing_is_told_that_it_is_enough() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..300 {
        fs::write(dir.path().join(number.to_string()), "").unwrap();
    }
    let limits = Limits {
        inodes: 200,
        descriptors: 50,
        handles: 30,
    };
    let share = share(&dir, limits);
    let mut guest = Guest::new(&share);
    let mut nodes = Vec::new();
    let mut refused = 0;
    for number in 0..300 {
        let name = std::ffi::CString::new(number.to_string()).unwrap();
        match guest.lookup(ROOT_ID, &name) {
            Ok(node) => nodes.push(node),
            Err(errno) => {
                assert_eq!(errno, Errno::NFILE);
                refused += 1;
            }
        }
    }
    assert_eq!((nodes.len(), refused), (199, 101));
    let opened = nodes
        .iter()
        .filter(|node| guest.open(**node, libc::O_RDONLY).is_ok());
    assert_eq!(opened.count(), 30);
    let (inodes, descriptors, handles) = share.usage();
    assert_eq!((inodes, handles), (200, 30));
    assert!(descriptors <= 50 + 50 / 8 + 64, "{descriptors}");
}

#[test]
fn requests_that_end_too_soon_are_refused_and_nothing_more() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "data").unwrap();
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    let file = guest.lookup(ROOT_ID, c"file").unwrap();
    let filled = [0xff_u8; 96];
    for opcode in Opcode::ALL {
        for length in 0..filled.len() {
            for node in [ROOT_ID, file] {
                for byte in [0_u8, 1, 0x7f, 0xff] {
                    let body = vec![byte; length];
                    let _ = guest.ask(*opcode, node, &[&body]);
                }
            }
        }
        // A name without an end.
        let _ = guest.ask(*opcode, ROOT_ID, &[&filled, b"name"]);
    }
    // The guest has ended the session in the meantime, and may go on all the same.
    let file = guest.lookup(ROOT_ID, c"file").unwrap();
    let fh = guest.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(file, fh).unwrap(), b"data");
    assert!(Path::new(dir.path()).join("file").exists());
}

#[test]
fn a_listing_is_as_short_as_it_has_to_be() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..50 {
        fs::write(dir.path().join(format!("{number}-{}", "x".repeat(100))), "").unwrap();
    }
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    let open = wire::OpenIn::default();
    let open: wire::OpenOut = guest
        .get(Opcode::Opendir, ROOT_ID, &[open.as_bytes()])
        .unwrap();
    for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
        for size in [0, 1, 23, 24, 100, 300, 1000, 4096, u32::MAX] {
            for offset in [0, 1, u64::MAX, 1 << 63] {
                let asked = wire::ReadIn {
                    fh: open.fh,
                    offset,
                    size,
                    ..wire::ReadIn::default()
                };
                if let Ok(listed) = guest.ask(opcode, ROOT_ID, &[asked.as_bytes()]) {
                    assert!(listed.len() <= usize::try_from(size).unwrap());
                }
            }
        }
    }
}

#[test]
fn lengths_beyond_all_measure_are_refused_or_cut() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "data").unwrap();
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT_ID, c"file").unwrap();
    let fh = guest.open(node, libc::O_RDWR).unwrap();
    for size in [u32::MAX, 1 << 31, 1 << 20] {
        let read = wire::ReadIn {
            fh,
            size,
            ..wire::ReadIn::default()
        };
        let found = guest.ask(Opcode::Read, node, &[read.as_bytes()]).unwrap();
        assert_eq!(found, b"data");
        let write = wire::WriteIn {
            fh,
            size,
            ..wire::WriteIn::default()
        };
        let written = guest.ask(Opcode::Write, node, &[write.as_bytes(), b"short"]);
        assert_eq!(written, Err(Errno::INVAL), "more than was sent");
        let set = wire::SetxattrIn {
            size,
            ..wire::SetxattrIn::default()
        };
        let set = guest.ask(Opcode::Setxattr, node, &[set.as_bytes(), b"user.x\0", b"x"]);
        assert_eq!(set, Err(Errno::INVAL));
        let get = wire::GetxattrIn { size, padding: 0 };
        for (opcode, name) in [
            (Opcode::Getxattr, &b"user.x\0"[..]),
            (Opcode::Listxattr, b""),
        ] {
            let found = guest.ask(opcode, node, &[get.as_bytes(), name]);
            assert!(found.is_err() || found == Ok(vec![]));
        }
        let forget = wire::BatchForgetIn {
            count: size,
            dummy: 0,
        };
        assert_eq!(
            guest.ask(Opcode::BatchForget, 0, &[forget.as_bytes()]),
            Ok(vec![])
        );
    }
    for offset in [u64::MAX, 1 << 63, i64::MAX.cast_unsigned()] {
        let read = wire::ReadIn {
            fh,
            offset,
            size: 4096,
            ..wire::ReadIn::default()
        };
        let found = guest.ask(Opcode::Read, node, &[read.as_bytes()]);
        assert!(found.is_err() || found == Ok(vec![]));
        let write = wire::WriteIn {
            fh,
            offset,
            size: 1,
            ..wire::WriteIn::default()
        };
        assert!(
            guest
                .ask(Opcode::Write, node, &[write.as_bytes(), b"x"])
                .is_err()
        );
        let allocate = wire::FallocateIn {
            fh,
            offset,
            length: offset,
            ..wire::FallocateIn::default()
        };
        assert!(
            guest
                .ask(Opcode::Fallocate, node, &[allocate.as_bytes()])
                .is_err()
        );
        for whence in [libc::SEEK_DATA, libc::SEEK_HOLE, libc::SEEK_SET, -1] {
            let seek = wire::LseekIn {
                fh,
                offset,
                whence: whence.cast_unsigned(),
                padding: 0,
            };
            assert!(guest.ask(Opcode::Lseek, node, &[seek.as_bytes()]).is_err());
        }
        let copy = wire::CopyFileRangeIn {
            fh_in: fh,
            off_in: offset,
            nodeid_out: node,
            fh_out: fh,
            off_out: offset,
            len: u64::MAX,
            ..wire::CopyFileRangeIn::default()
        };
        assert!(
            guest
                .ask(Opcode::CopyFileRange, node, &[copy.as_bytes()])
                .is_err()
        );
        // A file may be as long as a signed number tells on some filesystems.
        let longer = wire::SetattrIn {
            valid: wire::fattr::SIZE,
            size: offset,
            ..wire::SetattrIn::default()
        };
        let longer = guest.ask(Opcode::Setattr, node, &[longer.as_bytes()]);
        assert!(longer.is_err() || i64::try_from(offset).is_ok());
        fs::write(dir.path().join("file"), "data").unwrap();
    }
    let long = [&[b'n'; 256][..], b"\0"].concat();
    assert_eq!(
        guest.ask(Opcode::Lookup, ROOT_ID, &[&long]),
        Err(Errno::NAMETOOLONG)
    );
    let target = [&[b't'; 1 << 16][..], b"\0"].concat();
    let linked = guest.ask(Opcode::Symlink, ROOT_ID, &[b"link\0", &target]);
    assert_eq!(linked, Err(Errno::NAMETOOLONG));
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"data");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn listings_that_are_left_in_the_middle_hold_little() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..200 {
        let sub = dir.path().join(number.to_string());
        fs::create_dir(&sub).unwrap();
        fs::write(sub.join("one"), "").unwrap();
        fs::write(sub.join("two"), "").unwrap();
    }
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    // Other tests of this process come and go, and have no such directory open.
    let listings = || {
        let open = fs::read_dir("/proc/self/fd").unwrap();
        let targets = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        targets
            .filter(|target| target.starts_with(dir.path()))
            .count()
    };
    for number in 0..200 {
        let name = std::ffi::CString::new(number.to_string()).unwrap();
        let node = guest.lookup(ROOT_ID, &name).unwrap();
        let asked = wire::ReadIn {
            size: 40,
            ..wire::ReadIn::default()
        };
        let listed = guest
            .ask(Opcode::Readdir, node, &[asked.as_bytes()])
            .unwrap();
        assert!(!listed.is_empty());
    }
    let (inodes, descriptors, handles) = share.usage();
    assert_eq!((inodes, handles), (201, 0));
    // 32 listings go on; the other descriptors only hold on to inodes.
    assert!(listings() <= descriptors + 32, "{descriptors} descriptors");
}

#[test]
fn locks_are_as_many_as_they_may_be_and_so_are_those_who_wait() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let limits = Limits {
        handles: 30,
        ..some_limits()
    };
    let options = Options {
        limits,
        locking: Locking::Host,
        ..Options::default()
    };
    let share = Share::open(dir.path(), options).unwrap();
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT_ID, c"file").unwrap();
    let fh = guest.open(node, libc::O_RDWR).unwrap();
    let asked = |owner, kind: libc::c_int, start, end| wire::LkIn {
        fh,
        owner,
        lk: wire::FileLock {
            start,
            end,
            kind: kind.cast_unsigned(),
            pid: 1,
        },
        ..wire::LkIn::default()
    };
    let set = |guest: &mut Guest<'_>, lock: wire::LkIn| {
        guest.ask(Opcode::Setlk, node, &[lock.as_bytes()])
    };
    let held = (0..100)
        .filter(|owner| set(&mut guest, asked(*owner, libc::F_RDLCK, *owner, *owner)).is_ok());
    assert_eq!(held.count(), 30);
    assert_eq!(
        set(&mut guest, asked(99, libc::F_WRLCK, 0, 9)),
        Err(Errno::NOLCK)
    );
    assert_eq!(
        set(&mut guest, asked(1, libc::F_WRLCK, 0, 9)),
        Err(Errno::AGAIN)
    );
    // Who has none has nothing to give up.
    assert_eq!(
        set(&mut guest, asked(99, libc::F_UNLCK, 0, u64::MAX)),
        Ok(vec![])
    );
    for (kind, start, end) in [
        (3, 0, 0),
        (-1, 0, 0),
        (libc::F_WRLCK, 5, 4),
        (libc::F_WRLCK, u64::MAX, u64::MAX),
        (libc::F_WRLCK, 1 << 63, u64::MAX),
    ] {
        assert_eq!(
            set(&mut guest, asked(1, kind, start, end)),
            Err(Errno::INVAL)
        );
        let flock = wire::LkIn {
            lk_flags: wire::LK_FLOCK,
            ..asked(1, 7, start, end)
        };
        assert_eq!(set(&mut guest, flock), Err(Errno::INVAL));
        let test = asked(1, kind, start, end);
        assert_eq!(
            guest.ask(Opcode::Getlk, node, &[test.as_bytes()]),
            Err(Errno::INVAL)
        );
    }
    let wait = asked(1, libc::F_WRLCK, 0, 9);
    let waiting = (0..200_u64).filter(|number| guest.waits(1000 + number, node, wait.as_bytes()));
    assert_eq!(waiting.count(), 64);
    // Twice under one number.
    assert!(!guest.waits(1000, node, wait.as_bytes()));
    let flush = wire::FlushIn {
        fh,
        lock_owner: 0,
        ..wire::FlushIn::default()
    };
    assert_eq!(
        guest.ask(Opcode::Flush, node, &[flush.as_bytes()]),
        Ok(vec![])
    );
    assert!(
        set(&mut guest, asked(99, libc::F_RDLCK, 50, 50)).is_ok(),
        "room for one more"
    );
    // The last handle goes, and with it all locks.
    guest.release(node, fh);
    let file = fs::File::options()
        .write(true)
        .open(dir.path().join("file"))
        .unwrap();
    rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
}
