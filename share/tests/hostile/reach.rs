//! Nothing but the share is reached.

use std::ffi::CStr;
use std::fs;
use std::os::unix::fs::symlink;

use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;
use share::wire::{self, Opcode, ROOT_ID};
use zerocopy::IntoBytes;

use crate::guest::{Guest, share, some_limits};

#[test]
fn there_is_no_way_upwards() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    let sub = guest.lookup(ROOT_ID, c"sub").unwrap();
    for name in [
        c"..",
        c".",
        c"",
        c"sub/..",
        c"../..",
        c"/",
        c"/etc",
        c"sub/../../etc",
    ] {
        for node in [ROOT_ID, sub] {
            assert_eq!(guest.lookup(node, name), Err(Errno::INVAL), "{name:?}");
            let name = name.to_bytes_with_nul();
            for opcode in [Opcode::Unlink, Opcode::Rmdir] {
                assert_eq!(guest.ask(opcode, node, &[name]), Err(Errno::INVAL));
            }
            let mkdir = wire::MkdirIn::default();
            let made = guest.ask(Opcode::Mkdir, node, &[mkdir.as_bytes(), name]);
            assert_eq!(made, Err(Errno::INVAL));
            let to = wire::RenameIn { newdir: ROOT_ID };
            for names in [[name, b"x\0"], [b"sub\0", name]] {
                let renamed = guest.ask(Opcode::Rename, node, &[to.as_bytes(), names[0], names[1]]);
                assert_eq!(renamed, Err(Errno::INVAL));
            }
            let link = wire::LinkIn { oldnodeid: sub };
            let linked = guest.ask(Opcode::Link, node, &[link.as_bytes(), name]);
            assert_eq!(linked, Err(Errno::INVAL));
        }
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn symbolic_links_are_never_followed_on_the_host() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "outside").unwrap();
    let dir = tempfile::tempdir().unwrap();
    symlink(outside.path(), dir.path().join("out")).unwrap();
    symlink(outside.path().join("secret"), dir.path().join("file")).unwrap();
    symlink("/proc/self/root", dir.path().join("magic")).unwrap();
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    for (link, name) in [
        (c"out", c"secret"),
        (c"magic", c"etc"),
        (c"file", c"secret"),
    ] {
        let node = guest.lookup(ROOT_ID, link).unwrap();
        assert_eq!(guest.lookup(node, name), Err(Errno::NOTDIR));
        assert_eq!(guest.open(node, libc::O_RDONLY), Err(Errno::LOOP));
        assert_eq!(
            guest.open(node, libc::O_RDWR | libc::O_TRUNC),
            Err(Errno::LOOP)
        );
        let open = guest.ask(Opcode::Opendir, node, &[wire::OpenIn::default().as_bytes()]);
        assert_eq!(open, Err(Errno::NOTDIR));
        let shorter = wire::SetattrIn {
            valid: wire::fattr::SIZE,
            ..wire::SetattrIn::default()
        };
        assert!(
            guest
                .ask(Opcode::Setattr, node, &[shorter.as_bytes()])
                .is_err()
        );
        let mode = wire::SetattrIn {
            valid: wire::fattr::MODE,
            mode: 0o777,
            ..wire::SetattrIn::default()
        };
        assert!(
            guest
                .ask(Opcode::Setattr, node, &[mode.as_bytes()])
                .is_err()
        );
    }
    let create = wire::CreateIn {
        flags: (libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC).cast_unsigned(),
        mode: libc::S_IFREG | 0o600,
        ..wire::CreateIn::default()
    };
    let through = guest.ask(Opcode::Create, ROOT_ID, &[create.as_bytes(), b"file\0"]);
    assert_eq!(through, Err(Errno::LOOP));
    let secret = fs::read_to_string(outside.path().join("secret")).unwrap();
    assert_eq!(secret, "outside");
}

#[test]
fn no_device_is_made_on_the_host_and_neither_its_devices_nor_its_fifos_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name, kind, device| {
        rustix::fs::mknodat(
            CWD,
            dir.path().join(name),
            kind,
            Mode::RUSR | Mode::WUSR,
            device,
        )
    };
    make("fifo", FileType::Fifo, 0).unwrap();
    make("socket", FileType::Socket, 0).unwrap();
    let null = rustix::fs::makedev(1, 3);
    let has_device = make("null", FileType::CharacterDevice, null).is_ok();
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    let mut names = vec![c"fifo", c"socket"];
    names.extend(has_device.then_some(c"null"));
    for name in names {
        let node = guest.lookup(ROOT_ID, name).unwrap();
        for flags in [
            libc::O_RDONLY,
            libc::O_RDWR,
            libc::O_WRONLY | libc::O_NONBLOCK,
        ] {
            assert_eq!(guest.open(node, flags), Err(Errno::NXIO), "{name:?}");
        }
    }
    for (kind, name) in [(libc::S_IFCHR, b"chr\0"), (libc::S_IFBLK, b"blk\0")] {
        let asked = wire::MknodIn {
            mode: kind | 0o666,
            rdev: 0x103,
            ..wire::MknodIn::default()
        };
        let made: wire::EntryOut = guest
            .get(Opcode::Mknod, ROOT_ID, &[asked.as_bytes(), name])
            .unwrap();
        assert_eq!(made.attr.mode & libc::S_IFMT, kind);
        // Whoever opens it all the same opens an empty file.
        let fh = guest.open(made.nodeid, libc::O_RDWR).unwrap();
        assert_eq!(guest.read(made.nodeid, fh).unwrap(), b"");
        let name = CStr::from_bytes_with_nul(name).unwrap().to_str().unwrap();
        let on_host = fs::symlink_metadata(dir.path().join(name)).unwrap();
        assert!(on_host.is_file() && on_host.len() == 0);
    }
}

#[test]
fn numbers_that_were_never_given_stand_for_nothing() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("one"), "1").unwrap();
    fs::write(dir.path().join("two"), "2").unwrap();
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    let one = guest.lookup(ROOT_ID, c"one").unwrap();
    let two = guest.lookup(ROOT_ID, c"two").unwrap();
    let fh = guest.open(one, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(one, fh).unwrap(), b"1");
    assert_eq!(
        guest.read(two, fh),
        Err(Errno::BADF),
        "another file's handle"
    );
    for forged in [0, fh + 1, u64::MAX, 1 << 32] {
        assert_eq!(guest.read(one, forged), Err(Errno::BADF));
    }
    for forged in [0, two + 1, u64::MAX, u64::MAX / 2] {
        assert_eq!(guest.lookup(forged, c"one"), Err(Errno::STALE));
        assert_eq!(guest.open(forged, libc::O_RDONLY), Err(Errno::STALE));
        let asked = wire::GetattrIn::default();
        let found = guest.ask(Opcode::Getattr, forged, &[asked.as_bytes()]);
        assert_eq!(found, Err(Errno::STALE));
    }
    // Forgotten more often than named, and then used; the root is not forgotten.
    for node in [two, two, ROOT_ID] {
        let forget = wire::ForgetIn { nlookup: u64::MAX };
        assert_eq!(
            guest.ask(Opcode::Forget, node, &[forget.as_bytes()]),
            Ok(vec![])
        );
    }
    assert_eq!(guest.open(two, libc::O_RDONLY), Err(Errno::STALE));
    assert!(
        guest.lookup(ROOT_ID, c"two").unwrap() != two,
        "a number is used again"
    );
}
