//! What a guest may not do to the host by way of files that are its own.

use std::ffi::CStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use rustix::io::Errno;
use share::wire::{self, Opcode, ROOT_ID};
use share::{Options, Share};
use zerocopy::IntoBytes;

use crate::guest::{Guest, share, some_limits};

/// Requests that change something, on a file, on one of its handles, and in a directory.
fn changes(file: u64, fh: u64) -> Vec<(Opcode, u64, Vec<u8>)> {
    let mode = wire::SetattrIn {
        valid: wire::fattr::MODE,
        mode: 0o6777,
        ..wire::SetattrIn::default()
    };
    let size = wire::SetattrIn {
        valid: wire::fattr::SIZE | wire::fattr::FH,
        fh,
        ..wire::SetattrIn::default()
    };
    let create = wire::CreateIn {
        flags: (libc::O_RDWR | libc::O_CREAT).cast_unsigned(),
        mode: libc::S_IFREG | 0o6777,
        ..wire::CreateIn::default()
    };
    let write = wire::WriteIn {
        fh,
        size: 4,
        ..wire::WriteIn::default()
    };
    let allocate = wire::FallocateIn {
        fh,
        length: 100,
        ..wire::FallocateIn::default()
    };
    let copy = wire::CopyFileRangeIn {
        fh_in: fh,
        nodeid_out: file,
        fh_out: fh,
        off_out: 100,
        len: 1,
        ..wire::CopyFileRangeIn::default()
    };
    let xattr = wire::SetxattrIn {
        size: 1,
        ..wire::SetxattrIn::default()
    };
    let mknod = |mode| wire::MknodIn {
        mode: mode | 0o6777,
        ..wire::MknodIn::default()
    };
    let mkdir = wire::MkdirIn {
        mode: 0o6777,
        ..wire::MkdirIn::default()
    };
    let link = wire::LinkIn { oldnodeid: file };
    let rename = wire::Rename2In {
        newdir: ROOT_ID,
        ..wire::Rename2In::default()
    };
    let request = |opcode, node, body: &[&[u8]]| (opcode, node, body.concat());
    vec![
        request(Opcode::Setattr, file, &[mode.as_bytes()]),
        request(Opcode::Setattr, file, &[size.as_bytes()]),
        request(Opcode::Write, file, &[write.as_bytes(), b"data"]),
        request(Opcode::Fallocate, file, &[allocate.as_bytes()]),
        request(Opcode::CopyFileRange, file, &[copy.as_bytes()]),
        request(
            Opcode::Setxattr,
            file,
            &[xattr.as_bytes(), b"user.x\0", b"x"],
        ),
        request(Opcode::Removexattr, file, &[b"user.mine\0"]),
        request(Opcode::Create, ROOT_ID, &[create.as_bytes(), b"created\0"]),
        request(Opcode::Tmpfile, ROOT_ID, &[create.as_bytes(), b"x\0"]),
        request(
            Opcode::Mknod,
            ROOT_ID,
            &[mknod(libc::S_IFREG).as_bytes(), b"made\0"],
        ),
        request(
            Opcode::Mknod,
            ROOT_ID,
            &[mknod(libc::S_IFSOCK).as_bytes(), b"socket\0"],
        ),
        request(
            Opcode::Mknod,
            ROOT_ID,
            &[mknod(libc::S_IFCHR).as_bytes(), b"device\0"],
        ),
        request(Opcode::Mkdir, ROOT_ID, &[mkdir.as_bytes(), b"directory\0"]),
        request(Opcode::Symlink, ROOT_ID, &[b"link\0target\0"]),
        request(Opcode::Link, ROOT_ID, &[link.as_bytes(), b"hard\0"]),
        request(
            Opcode::Rename,
            ROOT_ID,
            &[&ROOT_ID.to_ne_bytes(), b"file\0renamed\0"],
        ),
        request(
            Opcode::Rename2,
            ROOT_ID,
            &[rename.as_bytes(), b"renamed\0file\0"],
        ),
        request(Opcode::Unlink, ROOT_ID, &[b"file\0"]),
        request(Opcode::Rmdir, ROOT_ID, &[b"empty\0"]),
    ]
}

fn furnish(dir: &tempfile::TempDir) {
    let file = dir.path().join("file");
    fs::write(&file, "content").unwrap();
    // Other tests of this process change its umask.
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    rustix::fs::setxattr(&file, c"user.mine", b"x", rustix::fs::XattrFlags::empty()).unwrap();
    fs::create_dir(dir.path().join("empty")).unwrap();
}

#[test]
fn each_request_that_changes_something_is_refused_where_nothing_may_be() {
    let dir = tempfile::tempdir().unwrap();
    furnish(&dir);
    let options = Options {
        read_only: true,
        limits: some_limits(),
        ..Options::default()
    };
    let share = Share::open(dir.path(), options).unwrap();
    let mut guest = Guest::new(&share);
    let file = guest.lookup(ROOT_ID, c"file").unwrap();
    for flags in [
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_RDONLY | libc::O_TRUNC,
        // An access mode that there is not.
        libc::O_ACCMODE,
    ] {
        assert_eq!(guest.open(file, flags), Err(Errno::ROFS), "{flags:o}");
    }
    let fh = guest.open(file, libc::O_RDONLY).unwrap();
    for (opcode, node, body) in changes(file, fh) {
        assert_eq!(
            guest.ask(opcode, node, &[&body]),
            Err(Errno::ROFS),
            "{opcode:?}"
        );
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    let about = fs::metadata(dir.path().join("file")).unwrap();
    assert_eq!(
        (about.len(), about.mode() & 0o7777, about.nlink()),
        (7, 0o644, 1)
    );
}

#[test]
fn nothing_that_the_guest_makes_or_changes_is_setuid_on_the_host() {
    let dir = tempfile::tempdir().unwrap();
    furnish(&dir);
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    let file = guest.lookup(ROOT_ID, c"file").unwrap();
    let fh = guest.open(file, libc::O_RDWR).unwrap();
    let mut done = 0;
    for (opcode, node, body) in changes(file, fh) {
        done += usize::from(guest.ask(opcode, node, &[&body]).is_ok());
        for entry in fs::read_dir(dir.path()).unwrap() {
            let about = entry.unwrap().metadata().unwrap();
            let mode = about.mode();
            assert!(about.is_dir() || mode & 0o6000 == 0, "{opcode:?}: {mode:o}");
            assert!(!matches!(
                mode & libc::S_IFMT,
                libc::S_IFCHR | libc::S_IFBLK
            ));
        }
    }
    assert_eq!(done, changes(file, fh).len());
}

#[test]
fn attributes_that_mean_something_to_the_host_are_out_of_reach() {
    let dir = tempfile::tempdir().unwrap();
    furnish(&dir);
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    let file = guest.lookup(ROOT_ID, c"file").unwrap();
    for name in [
        c"security.capability",
        c"security.selinux",
        c"security.ima",
        c"trusted.overlay.opaque",
        c"system.nothing",
        c"user.mvm.stat",
        c"user.mvm.anything",
        c"",
        c"nothing",
    ] {
        let set = wire::SetxattrIn {
            size: 1,
            ..wire::SetxattrIn::default()
        };
        let name = name.to_bytes_with_nul();
        for node in [file, ROOT_ID] {
            let changed = guest.ask(Opcode::Setxattr, node, &[set.as_bytes(), name, b"x"]);
            assert!(
                matches!(changed, Err(Errno::OPNOTSUPP | Errno::PERM)),
                "{name:?}: {changed:?}"
            );
            let removed = guest.ask(Opcode::Removexattr, node, &[name]);
            assert!(
                matches!(removed, Err(Errno::OPNOTSUPP | Errno::PERM)),
                "{name:?}: {removed:?}"
            );
        }
    }
    let mut names = [0_u8; 256];
    let length = rustix::fs::listxattr(dir.path().join("file"), &mut names[..]).unwrap();
    assert_eq!(&names[..length], b"user.mine\0");
}

#[test]
fn a_rename_leaves_no_device_behind() {
    let dir = tempfile::tempdir().unwrap();
    furnish(&dir);
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    // RENAME_WHITEOUT, alone and with others, and what nobody knows.
    for flags in [4, 5, 6, 8, u32::MAX] {
        let rename = wire::Rename2In {
            newdir: ROOT_ID,
            flags,
            padding: 0,
        };
        let renamed = guest.ask(
            Opcode::Rename2,
            ROOT_ID,
            &[rename.as_bytes(), b"file\0new\0"],
        );
        assert_eq!(renamed, Err(Errno::INVAL));
    }
    assert!(dir.path().join("file").exists());
}

/// Goes down a path of `names`; the inode at its end.
fn walk(guest: &mut Guest<'_>, names: &[&CStr]) -> Result<u64, Errno> {
    names
        .iter()
        .try_fold(ROOT_ID, |at, name| guest.lookup(at, name))
}

#[test]
fn magic_links_are_no_more_than_text() {
    // Who shares such a directory has only himself to blame, and yet: what its links lead to is no part of it.
    let options = Options {
        limits: some_limits(),
        ..Options::default()
    };
    let share = Share::open("/proc/self".as_ref(), options).unwrap();
    let mut guest = Guest::new(&share);
    let beside = tempfile::tempfile().unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&beside).to_string();
    let number = std::ffi::CString::new(number).unwrap();
    for path in [&[c"root"][..], &[c"cwd"], &[c"exe"], &[c"fd", &number]] {
        let link = walk(&mut guest, path).unwrap();
        for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_PATH] {
            assert_eq!(guest.open(link, flags), Err(Errno::LOOP), "{path:?}");
        }
        assert_eq!(guest.lookup(link, c"etc"), Err(Errno::NOTDIR), "{path:?}");
        let open = wire::OpenIn::default();
        let opened = guest.ask(Opcode::Opendir, link, &[open.as_bytes()]);
        assert_eq!(opened, Err(Errno::NOTDIR), "{path:?}");
        let text = guest.ask(Opcode::Readlink, link, &[]).unwrap();
        assert!(text.starts_with(b"/"), "{path:?}");
    }
}

#[test]
fn a_link_to_a_link_is_one_to_the_link() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::NamedTempFile::new().unwrap();
    symlink(outside.path(), dir.path().join("link")).unwrap();
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    let link = guest.lookup(ROOT_ID, c"link").unwrap();
    let asked = wire::LinkIn { oldnodeid: link };
    guest
        .ask(Opcode::Link, ROOT_ID, &[asked.as_bytes(), b"hard\0"])
        .unwrap();
    assert!(
        fs::symlink_metadata(dir.path().join("hard"))
            .unwrap()
            .is_symlink()
    );
    assert_eq!(fs::metadata(outside.path()).unwrap().nlink(), 1);
}
