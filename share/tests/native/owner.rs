//! Owners and permissions: what the guest sees, and what there is on the host.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown};

use share::{Ids, Options, Owner, XATTR};

use crate::mount::Mounted;

/// Somebody on the host without privileges.
const USER: (u32, u32) = (65534, 65534);

fn rootless() -> Option<Mounted> {
    Mounted::rootless(Options::default(), USER)
}

fn mode(path: impl AsRef<std::path::Path>) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn ids(path: impl AsRef<std::path::Path>) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

#[test]
fn what_the_guest_makes_belongs_to_the_user_on_the_host() {
    let Some(mounted) = rootless() else {
        return;
    };
    fs::write(mounted.at.join("file"), "").unwrap();
    fs::create_dir(mounted.at.join("dir")).unwrap();
    std::os::unix::fs::symlink("x", mounted.at.join("link")).unwrap();
    for name in ["file", "dir", "link"] {
        assert_eq!(ids(mounted.at.join(name)), (0, 0), "{name}");
        assert_eq!(ids(mounted.source.join(name)), USER, "{name}");
    }
    assert_eq!(
        rustix::fs::listxattr(mounted.source.join("file"), &mut [0_u8; 64][..]),
        Ok(0)
    );
}

#[test]
fn an_owner_that_the_host_cannot_have_is_remembered() {
    let Some(mounted) = rootless() else {
        return;
    };
    let (at, on_host) = (mounted.at.join("file"), mounted.source.join("file"));
    fs::write(&at, "").unwrap();
    chown(&at, Some(1000), Some(100)).unwrap();
    assert_eq!(ids(&at), (1000, 100));
    assert_eq!(ids(&on_host), USER);
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(&on_host, XATTR, &mut value[..]).unwrap();
    assert_eq!(&value[..length], b"1000:100:0:0");
    // The guest has nothing to do with how.
    let hidden = rustix::fs::getxattr(&at, XATTR, &mut value[..]);
    assert_eq!(hidden, Err(rustix::io::Errno::NODATA));
    let refused = rustix::fs::setxattr(&at, XATTR, b"0:0:4000:0", rustix::fs::XattrFlags::empty());
    assert_eq!(refused, Err(rustix::io::Errno::PERM));
    assert_eq!(rustix::fs::listxattr(&at, &mut value[..]), Ok(0));
    chown(&at, Some(0), Some(0)).unwrap();
    assert_eq!(ids(&at), (0, 0));
    assert_eq!(rustix::fs::listxattr(&on_host, &mut value[..]), Ok(0));
    // A link cannot carry it, but nobody is told that it failed.
    let link = mounted.at.join("link");
    std::os::unix::fs::symlink("x", &link).unwrap();
    lchown(&link, Some(7), Some(7)).unwrap();
    assert_eq!(ids(&link), (7, 7));
}

#[test]
fn modes_are_kept_but_nothing_is_setuid_on_the_host() {
    for mounted in [rootless(), Mounted::new(Options::default())]
        .into_iter()
        .flatten()
    {
        let (at, on_host) = (mounted.at.join("file"), mounted.source.join("file"));
        fs::write(&at, "").unwrap();
        for wanted in [0o644, 0o600, 0o755, 0o444, 0o555, 0o4755, 0o6711, 0o7777] {
            fs::set_permissions(&at, fs::Permissions::from_mode(wanted)).unwrap();
            assert_eq!(mode(&at), wanted, "{wanted:o}");
            assert_eq!(mode(&on_host), wanted & 0o1777, "{wanted:o}");
        }
        // Whoever writes it makes it an ordinary program.
        fs::set_permissions(&at, fs::Permissions::from_mode(0o6755)).unwrap();
        chown(&at, Some(5), None).unwrap();
        assert_eq!(mode(&at), 0o755);
        let capability = rustix::fs::setxattr(
            &at,
            c"security.capability",
            &[&[0, 0, 0, 2][..], &[0; 16]].concat(),
            rustix::fs::XattrFlags::empty(),
        );
        assert_eq!(capability, Err(rustix::io::Errno::OPNOTSUPP));
    }
}

#[test]
fn the_guests_root_may_do_what_permissions_forbid_others() {
    let Some(mounted) = rootless() else {
        return;
    };
    let dir = mounted.at.join("dir");
    fs::create_dir(&dir).unwrap();
    let file = dir.join("file");
    fs::write(&file, "old").unwrap();
    for path in [&file, &dir] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o0)).unwrap();
        assert_eq!(mode(path), 0);
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "old");
    File::options()
        .append(true)
        .open(&file)
        .unwrap()
        .write_all(b" and new")
        .unwrap();
    fs::write(dir.join("another"), "").unwrap();
    fs::rename(dir.join("another"), dir.join("renamed")).unwrap();
    fs::remove_file(dir.join("renamed")).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "old and new");
    assert_eq!((mode(&dir), mode(&file)), (0, 0));
    // What the host keeps of it is what its own user needs, and for nobody else.
    assert_eq!(mode(mounted.source.join("dir")), 0o500);
    assert_eq!(mode(mounted.source.join("dir/file")), 0o400);
}

#[test]
fn numbers_are_mapped_as_they_were_asked_for() {
    let options = Options {
        owner: Owner::Mapped(Ids {
            uid: 1000,
            gid: 1000,
        }),
        ..Options::default()
    };
    let Some(mounted) = Mounted::rootless(options, USER) else {
        return;
    };
    fs::write(mounted.source.join("roots"), "").unwrap();
    fs::write(mounted.source.join("users"), "").unwrap();
    chown(mounted.source.join("users"), Some(USER.0), Some(USER.1)).unwrap();
    fs::write(mounted.source.join("others"), "").unwrap();
    chown(mounted.source.join("others"), Some(1000), Some(1000)).unwrap();
    assert_eq!(ids(mounted.at.join("roots")), (0, 0));
    assert_eq!(ids(mounted.at.join("users")), (1000, 1000));
    // A user of the host with the guest's number by chance is nobody in the guest.
    assert_eq!(ids(mounted.at.join("others")), (65534, 65534));
    // Somebody else's file is not the guest's to change.
    let refused = fs::write(mounted.at.join("roots"), "changed").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
    let refused = chown(mounted.at.join("roots"), Some(1000), None).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
}

#[test]
fn the_hosts_numbers_can_be_the_guests() {
    let options = Options {
        owner: Owner::Host,
        ..Options::default()
    };
    let Some(mounted) = Mounted::new(options) else {
        return;
    };
    let at = mounted.at.join("file");
    fs::write(&at, "").unwrap();
    chown(&at, Some(12), Some(34)).unwrap();
    assert_eq!(ids(&at), (12, 34));
    assert_eq!(ids(mounted.source.join("file")), (12, 34));
}

#[test]
fn what_is_a_device_to_the_guest_is_an_empty_file_on_the_host() {
    use rustix::fs::{CWD, FileType, Mode};
    use std::os::unix::fs::FileTypeExt;
    for mounted in [rootless(), Mounted::new(Options::default())]
        .into_iter()
        .flatten()
    {
        for (name, kind, major, minor) in [
            ("null", FileType::CharacterDevice, 1, 3),
            ("last", FileType::BlockDevice, 0xfff, 0xf_ffff),
        ] {
            let at = mounted.at.join(name);
            let device = rustix::fs::makedev(major, minor);
            rustix::fs::mknodat(CWD, &at, kind, Mode::from_raw_mode(0o640), device).unwrap();
            chown(&at, Some(3), Some(4)).unwrap();
            fs::rename(&at, mounted.at.join("moved")).unwrap();
            fs::rename(mounted.at.join("moved"), &at).unwrap();
            let found = fs::symlink_metadata(&at).unwrap();
            assert_eq!(FileType::from_raw_mode(found.mode()), kind);
            assert_eq!(found.rdev(), device);
            assert_eq!((mode(&at), ids(&at)), (0o640, (3, 4)));
            let on_host = fs::symlink_metadata(mounted.source.join(name)).unwrap();
            assert!(on_host.is_file() && on_host.len() == 0);
            let listed = fs::read_dir(&mounted.at).unwrap();
            let kinds = listed.map(|entry| entry.unwrap().metadata().unwrap().file_type());
            assert!(kinds.into_iter().all(|kind| !kind.is_file()));
            let kind = found.file_type();
            assert!(kind.is_char_device() || kind.is_block_device());
        }
    }
}

#[test]
fn attributes_and_access_lists_are_kept() {
    use rustix::fs::XattrFlags;
    for mounted in [rootless(), Mounted::new(Options::default())]
        .into_iter()
        .flatten()
    {
        let (at, on_host) = (mounted.at.join("file"), mounted.source.join("file"));
        fs::write(&at, "").unwrap();
        fs::set_permissions(&at, fs::Permissions::from_mode(0o400)).unwrap();
        let value = [7; 2000];
        rustix::fs::setxattr(&at, c"user.mine", &value, XattrFlags::CREATE).unwrap();
        let mut found = [0; 4000];
        for path in [&at, &on_host] {
            let length = rustix::fs::getxattr(path, c"user.mine", &mut found[..]).unwrap();
            assert_eq!(found[..length], value);
        }
        let again = rustix::fs::setxattr(&at, c"user.mine", &value, XattrFlags::CREATE);
        assert_eq!(again, Err(rustix::io::Errno::EXIST));
        let short = rustix::fs::getxattr(&at, c"user.mine", &mut found[..10]);
        assert_eq!(short, Err(rustix::io::Errno::RANGE));
        let length = rustix::fs::listxattr(&at, &mut found[..]).unwrap();
        assert_eq!(&found[..length], b"user.mine\0");
        rustix::fs::removexattr(&at, c"user.mine").unwrap();
        assert_eq!(rustix::fs::listxattr(&on_host, &mut found[..]), Ok(0));

        // u::rw- u:0:rwx g::r-- m::rwx o::---, with the guest's root in it.
        let mut list = 2_u32.to_le_bytes().to_vec();
        for (tag, permissions, id) in [
            (1_u16, 6_u16, u32::MAX),
            (2, 7, 0),
            (4, 4, u32::MAX),
            (16, 7, u32::MAX),
            (32, 0, u32::MAX),
        ] {
            list.extend(tag.to_le_bytes());
            list.extend(permissions.to_le_bytes());
            list.extend(id.to_le_bytes());
        }
        let name = c"system.posix_acl_access";
        rustix::fs::setxattr(&at, name, &list, XattrFlags::empty()).unwrap();
        let length = rustix::fs::getxattr(&at, name, &mut found[..]).unwrap();
        assert_eq!(found[..length], list);
        let length = rustix::fs::getxattr(&on_host, name, &mut found[..]).unwrap();
        assert_eq!(length, list.len());
        let user = fs::metadata(&on_host).unwrap().uid();
        assert_eq!(found[4 + 8 + 4..4 + 16], user.to_le_bytes());
        assert_eq!(mode(&at), 0o670);
    }
}

#[test]
fn nothing_is_changed_where_nothing_may_be() {
    let options = Options {
        read_only: true,
        ..Options::default()
    };
    let Some(mounted) = Mounted::new(options) else {
        return;
    };
    fs::write(mounted.source.join("file"), "data").unwrap();
    fs::create_dir(mounted.source.join("dir")).unwrap();
    let at = |name: &str| mounted.at.join(name);
    assert_eq!(fs::read_to_string(at("file")).unwrap(), "data");
    let refused = [
        fs::write(at("file"), "x"),
        fs::write(at("new"), "x"),
        File::options().append(true).open(at("file")).map(drop),
        fs::create_dir(at("new")),
        fs::remove_file(at("file")),
        fs::remove_dir(at("dir")),
        fs::rename(at("file"), at("new")),
        fs::hard_link(at("file"), at("new")),
        std::os::unix::fs::symlink("x", at("new")),
        fs::set_permissions(at("file"), fs::Permissions::from_mode(0o777)),
        chown(at("file"), Some(1), None),
        rustix::fs::setxattr(at("file"), c"user.x", b"x", rustix::fs::XattrFlags::empty())
            .map_err(Into::into),
    ];
    for outcome in refused {
        assert_eq!(outcome.unwrap_err().raw_os_error(), Some(libc::EROFS));
    }
}
