//! What a guest that means harm can send: it reaches nothing but the share, and breaks nothing.

use std::ffi::CStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::fs::{CWD, FileType, Mode, RenameFlags};
use rustix::io::Errno;
use share::wire::{self, InHeader, Opcode, OutHeader, ROOT_ID};
use share::{Answer, Limits, Options, Readers, Reply, Share, View, dispatch};
use tempfile::TempDir;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A guest that says what it likes.
struct Guest<'a> {
    share: &'a Share,
    reply: Reply,
}

impl<'a> Guest<'a> {
    fn new(share: &'a Share) -> Self {
        let reply = Reply::with_capacity(share::MAX_TRANSFER);
        Self { share, reply }
    }

    /// Sends a request; what comes back after the header, or the error.
    fn ask(&mut self, opcode: Opcode, node: u64, body: &[&[u8]]) -> Result<Vec<u8>, Errno> {
        let body = body.concat();
        let header = InHeader {
            len: u32::try_from(wire::IN_HEADER_LEN + body.len()).unwrap(),
            opcode: opcode as u32,
            unique: 7,
            nodeid: node,
            ..InHeader::default()
        };
        let message = [header.as_bytes(), &body].concat();
        let (answer, bytes) = dispatch(self.share, &message, &mut self.reply);
        if answer == Answer::Silence {
            return Ok(Vec::new());
        }
        let (header, rest) = OutHeader::read_from_prefix(bytes).unwrap();
        assert_eq!(usize::try_from(header.len).unwrap(), bytes.len());
        assert_eq!(header.unique, 7);
        match header.error {
            0 => Ok(rest.to_vec()),
            errno => Err(Errno::from_raw_os_error(-errno)),
        }
    }

    fn get<T: FromBytes + KnownLayout + Immutable>(
        &mut self,
        opcode: Opcode,
        node: u64,
        body: &[&[u8]],
    ) -> Result<T, Errno> {
        let bytes = self.ask(opcode, node, body)?;
        Ok(T::read_from_prefix(&bytes).unwrap().0)
    }

    fn lookup(&mut self, dir: u64, name: &CStr) -> Result<u64, Errno> {
        let name = name.to_bytes_with_nul();
        let entry: wire::EntryOut = self.get(Opcode::Lookup, dir, &[name])?;
        match entry.nodeid {
            0 => Err(Errno::NOENT),
            node => Ok(node),
        }
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, Errno> {
        let asked = wire::OpenIn {
            flags: flags.cast_unsigned(),
            open_flags: 0,
        };
        let open: wire::OpenOut = self.get(Opcode::Open, node, &[asked.as_bytes()])?;
        Ok(open.fh)
    }

    fn read(&mut self, node: u64, fh: u64) -> Result<Vec<u8>, Errno> {
        let asked = wire::ReadIn {
            fh,
            size: 4096,
            ..wire::ReadIn::default()
        };
        self.ask(Opcode::Read, node, &[asked.as_bytes()])
    }
}

fn share(dir: &TempDir, limits: Limits) -> Share {
    let options = Options {
        limits,
        ..Options::default()
    };
    Share::open(dir.path(), options).unwrap()
}

fn some_limits() -> Limits {
    Limits::of_files(1000)
}

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
fn what_is_swapped_for_a_link_during_a_step_leads_nowhere() {
    const ROUNDS: usize = 5000;
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "outside").unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("swap")).unwrap();
    fs::write(dir.path().join("swap/secret"), "inside").unwrap();
    symlink(outside.path(), dir.path().join("link")).unwrap();
    let share = share(&dir, some_limits());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let (one, other) = (dir.path().join("swap"), dir.path().join("link"));
            while !done.load(Ordering::Relaxed) {
                let flags = RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(CWD, &one, CWD, &other, flags).unwrap();
            }
        });
        let mut guest = Guest::new(&share);
        let mut inside = 0;
        for _ in 0..ROUNDS {
            if let Ok(content) = content(&mut guest) {
                assert_eq!(content, b"inside");
                inside += 1;
            }
        }
        done.store(true, Ordering::Relaxed);
        assert!(inside > 0, "nothing was ever read");
    });
}

fn content(guest: &mut Guest<'_>) -> Result<Vec<u8>, Errno> {
    let dir = guest.lookup(ROOT_ID, c"swap")?;
    let file = guest.lookup(dir, c"secret")?;
    let fh = guest.open(file, libc::O_RDONLY)?;
    let content = guest.read(file, fh);
    let release = wire::ReleaseIn {
        fh,
        ..wire::ReleaseIn::default()
    };
    guest.ask(Opcode::Release, file, &[release.as_bytes()])?;
    content
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

/// All that a guest can learn of an inode, whether it was told of it or not.
fn learn(guest: &mut Guest<'_>, node: u64) -> Vec<u8> {
    let open = wire::OpenIn::default();
    let read = wire::ReadIn {
        size: 1 << 16,
        ..wire::ReadIn::default()
    };
    let xattr = wire::GetxattrIn {
        size: 1 << 10,
        padding: 0,
    };
    let link = wire::LinkIn { oldnodeid: node };
    let mut learned = Vec::new();
    for (opcode, body) in [
        (Opcode::Getattr, [&[0; 16][..], b""]),
        (Opcode::Readlink, [b"", b""]),
        (Opcode::Readdir, [read.as_bytes(), b""]),
        (Opcode::Readdirplus, [read.as_bytes(), b""]),
        (Opcode::Listxattr, [xattr.as_bytes(), b""]),
        (Opcode::Getxattr, [xattr.as_bytes(), b"user.secret\0"]),
        (Opcode::Link, [link.as_bytes(), b"link\0"]),
        (Opcode::Lookup, [b"secret\0", b""]),
        (Opcode::Lookup, [b"below\0", b""]),
    ] {
        learned.extend(guest.ask(opcode, node, &body).unwrap_or_default());
    }
    for opcode in [Opcode::Open, Opcode::Opendir] {
        let opened = guest.get::<wire::OpenOut>(opcode, node, &[open.as_bytes()]);
        let Ok(wire::OpenOut { fh, .. }) = opened else {
            continue;
        };
        let read = wire::ReadIn { fh, ..read };
        for opcode in [Opcode::Read, Opcode::Readdir, Opcode::Readdirplus] {
            learned.extend(
                guest
                    .ask(opcode, node, &[read.as_bytes()])
                    .unwrap_or_default(),
            );
        }
    }
    learned
}

#[test]
fn nothing_that_a_view_hides_is_in_any_reply() {
    const CONTENT: &[u8] = b"hidden content";
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str| dir.path().join(path);
    for directory in ["shown", "shown/passed", "secret", "secret/below"] {
        fs::create_dir(at(directory)).unwrap();
    }
    for file in ["secret/below/hidden name", "shown/secret", "shown/open"] {
        fs::write(at(file), CONTENT).unwrap();
    }
    fs::write(at("shown/open"), "shown content").unwrap();
    let mut closed = fs::metadata(at("shown/secret")).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut closed, 0o640);
    fs::set_permissions(at("shown/secret"), closed).unwrap();
    fs::hard_link(at("secret/below/hidden name"), at("shown/hidden name")).unwrap();
    let mut view = View::default();
    view.show(Path::new("/shown"), Readers::Everybody);
    view.hide(Path::new("/secret/below/hidden name"));
    let options = Options {
        limits: some_limits(),
        ..Options::default()
    };
    let share = Share::open_view(dir.path(), options, view).unwrap();
    let mut guest = Guest::new(&share);
    let mut learned = Vec::new();
    for _ in 0..3 {
        for node in (0..50).chain([u64::MAX, 1 << 63]) {
            learned.extend(learn(&mut guest, node));
        }
    }
    let contains = |bytes: &[u8]| learned.windows(bytes.len()).any(|window| window == bytes);
    assert!(contains(b"shown content") && contains(b"passed"));
    for hidden in [CONTENT, b"hidden name", b"secret"] {
        assert!(!contains(hidden), "{}", String::from_utf8_lossy(hidden));
    }
    assert!(guest.lookup(ROOT_ID, c"secret").is_err());
    assert!(guest.lookup(ROOT_ID, c"shown").is_ok());
}
