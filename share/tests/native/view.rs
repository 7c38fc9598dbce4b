//! A part of a directory, as the guest of a host's root sees it: the tests' user is root on both sides, so
//! nothing but the server is in the way.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Instant;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use share::{Change, Readers, View};
use tempfile::TempDir;

use crate::mount::{Mounted, PATIENCE};

/// Somebody without privileges.
const USER: (u32, u32) = (1234, 1234);

/// Makes a file with some content and permissions, and the directories above it.
fn file(root: &Path, path: &str, mode: u32) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, path.as_os_str().as_encoded_bytes()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A small host.
fn host() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
    file(root, "usr/bin/cc", 0o755);
    file(root, "usr/lib/deep/down/libc.so", 0o644);
    file(root, "etc/passwd", 0o644);
    file(root, "etc/shadow", 0o640);
    file(root, "etc/ssh/host_key", 0o600);
    file(root, "etc/ssl/private/server.key", 0o644);
    fs::set_permissions(
        root.join("etc/ssl/private"),
        fs::Permissions::from_mode(0o710),
    )
    .unwrap();
    file(root, "etc/named-secret", 0o644);
    file(root, "home/me/.cargo/bin/cargo", 0o755);
    file(root, "home/me/.cargo/own", 0o600);
    file(root, "home/me/.cargo/credentials.toml", 0o644);
    file(root, "home/me/.cargo/deep/.netrc", 0o644);
    file(root, "home/me/.ssh/id", 0o644);
    file(root, "srv/data", 0o644);
    symlink("usr/bin", root.join("bin")).unwrap();
    for path in ["home/me", "home/me/.cargo"] {
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(0o700)).unwrap();
    }
    dir
}

fn view() -> View {
    let mut view = View::default();
    for path in ["/usr", "/bin", "/etc"] {
        view.show(Path::new(path), Readers::Everybody);
    }
    view.hide(Path::new("/etc/named-secret"));
    view.show(Path::new("/home/me/.cargo"), Readers::Owner);
    view.hide(Path::new("/home/me/.cargo/credentials.toml"));
    view.hide_names([".netrc"]);
    view
}

fn listed(path: impl AsRef<Path>) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[track_caller]
fn absent(path: impl AsRef<Path>) {
    let path = path.as_ref();
    for outcome in [
        fs::symlink_metadata(path).map(drop),
        fs::File::open(path).map(drop),
        fs::read_dir(path).map(drop),
        fs::read_link(path).map(drop),
    ] {
        let kind = outcome.unwrap_err().kind();
        assert!(kind == ErrorKind::NotFound, "{}: {kind}", path.display());
    }
}

#[test]
fn what_is_not_named_or_not_everybodys_is_not_there() {
    let Some(mounted) = Mounted::of_view(host(), view(), None) else {
        return;
    };
    let at = &mounted.at;
    assert_eq!(listed(at), ["bin", "etc", "home", "usr"]);
    assert_eq!(listed(at.join("etc")), ["passwd", "ssh", "ssl"]);
    assert_eq!(listed(at.join("etc/ssh")), [""; 0]);
    assert_eq!(listed(at.join("etc/ssl")), [""; 0]);
    assert_eq!(listed(at.join("home")), ["me"]);
    assert_eq!(listed(at.join("home/me")), [".cargo"]);
    assert_eq!(listed(at.join("home/me/.cargo")), ["bin", "deep", "own"]);
    assert_eq!(listed(at.join("home/me/.cargo/deep")), [""; 0]);
    for path in [
        "etc/shadow",
        "etc/ssh/host_key",
        "etc/ssl/private",
        "etc/ssl/private/server.key",
        "etc/named-secret",
        "home/me/.cargo/credentials.toml",
        "home/me/.cargo/deep/.netrc",
        "home/me/.ssh",
        "home/me/.ssh/id",
        "srv",
        "srv/data",
    ] {
        absent(at.join(path));
    }
    for path in ["bin/cc", "usr/lib/deep/down/libc.so", "home/me/.cargo/own"] {
        let content = fs::read_to_string(at.join(path)).unwrap();
        assert!(content.ends_with(path.rsplit('/').next().unwrap()));
    }
}

#[test]
fn nothing_can_be_changed_or_given_another_name() {
    let Some(mounted) = Mounted::of_view(host(), view(), None) else {
        return;
    };
    let at = |path: &str| mounted.at.join(path);
    let refused = |outcome: std::io::Result<()>, what| {
        let kind = outcome.unwrap_err().kind();
        assert_eq!(kind, ErrorKind::ReadOnlyFilesystem, "{what}");
    };
    refused(fs::write(at("etc/passwd"), ""), "write");
    refused(fs::write(at("etc/new"), ""), "create");
    refused(fs::create_dir(at("usr/new")), "mkdir");
    refused(symlink("/", at("usr/new")), "symlink");
    refused(fs::hard_link(at("etc/passwd"), at("usr/new")), "link");
    refused(fs::rename(at("etc/passwd"), at("usr/new")), "rename");
    refused(fs::remove_file(at("etc/passwd")), "unlink");
    // Names that are hidden are no more than names that are free.
    refused(fs::write(at("etc/shadow"), ""), "create over");
    refused(
        fs::rename(at("etc/passwd"), at("etc/shadow")),
        "rename over",
    );
    refused(
        fs::set_permissions(at("etc/passwd"), fs::Permissions::from_mode(0o600)),
        "chmod",
    );
    refused(chown(at("etc/passwd"), Some(1), Some(1)), "chown");
    let kind = fs::hard_link(at("etc/shadow"), at("usr/new"))
        .unwrap_err()
        .kind();
    assert_eq!(kind, ErrorKind::NotFound, "link of what is hidden");
}

#[test]
fn other_names_of_what_is_hidden_lead_nowhere() {
    let dir = host();
    let root = dir.path();
    let link = |from: &str, to: &str| fs::hard_link(root.join(from), root.join(to)).unwrap();
    link("etc/named-secret", "usr/innocent");
    link("home/me/.cargo/credentials.toml", "home/me/.cargo/innocent");
    link("etc/shadow", "usr/shadow");
    symlink("../etc/shadow", root.join("usr/to-shadow")).unwrap();
    symlink("../srv/data", root.join("usr/to-data")).unwrap();
    symlink("../../.ssh", root.join("home/me/.cargo/bin/ssh")).unwrap();
    let Some(mounted) = Mounted::of_view(dir, view(), None) else {
        return;
    };
    for path in [
        "usr/innocent",
        "home/me/.cargo/innocent",
        "usr/shadow",
        "usr/to-data/x",
        "home/me/.cargo/bin/ssh/id",
        "home/me/.cargo/bin/../../.ssh/id",
    ] {
        absent(mounted.at.join(path));
    }
    for link in ["usr/to-shadow", "usr/to-data"] {
        let opened = fs::read(mounted.at.join(link)).unwrap_err();
        assert_eq!(opened.kind(), ErrorKind::NotFound, "{link}");
    }
}

#[test]
fn sockets_fifos_and_devices_are_not_there() {
    let dir = host();
    let at = |name: &str| dir.path().join("usr").join(name);
    let _socket = UnixListener::bind(at("socket")).unwrap();
    let all = Mode::from_raw_mode(0o666);
    mknodat(CWD, at("fifo"), FileType::Fifo, all, 0).unwrap();
    let null = rustix::fs::makedev(1, 3);
    let device = mknodat(CWD, at("null"), FileType::CharacterDevice, all, null);
    let Some(mounted) = Mounted::of_view(dir, view(), None) else {
        return;
    };
    assert_eq!(listed(mounted.at.join("usr")), ["bin", "lib"]);
    absent(mounted.at.join("usr/socket"));
    absent(mounted.at.join("usr/fifo"));
    if device.is_ok() {
        absent(mounted.at.join("usr/null"));
    }
}

#[test]
fn permissions_that_change_on_the_host_hold_at_once() {
    let Some(mounted) = Mounted::of_view(host(), view(), None) else {
        return;
    };
    let eventually = |what: &str, is_so: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < PATIENCE, "{what}");
        }
    };
    let passwd = mounted.at.join("etc/passwd");
    let shadow = mounted.at.join("etc/shadow");
    assert!(passwd.exists() && !shadow.exists());
    mounted.on_host("chmod 600 etc/passwd; chmod 644 etc/shadow");
    eventually("what was shown is there still", &|| !passwd.exists());
    eventually("what was hidden is not there", &|| shadow.exists());
    assert_eq!(listed(mounted.at.join("etc")), ["shadow", "ssh", "ssl"]);
    let bin = mounted.at.join("usr/bin");
    assert!(bin.join("cc").exists());
    mounted.on_host("chmod 750 usr/bin");
    eventually("a directory is there still", &|| !bin.exists());
}

#[test]
fn a_file_that_is_known_is_not_opened_again_once_it_may_not_be_read() {
    let Some(mounted) = Mounted::of_view(host(), view(), None) else {
        return;
    };
    // A descriptor that holds on to the file needs no name to open it.
    let flags = rustix::fs::OFlags::PATH;
    let path = mounted.at.join("etc/passwd");
    let held = rustix::fs::openat(CWD, &path, flags, Mode::empty()).unwrap();
    let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&held));
    assert!(fs::read(&again).is_ok());
    mounted.on_host("chmod 600 etc/passwd");
    let opened = fs::File::open(&again).unwrap_err();
    assert_eq!(opened.raw_os_error(), Some(libc::ESTALE));
}

#[test]
fn nothing_is_told_of_hidden_names() {
    let Some(mounted) = Mounted::of_view(host(), view(), None) else {
        return;
    };
    listed(mounted.at.join("home/me"));
    listed(mounted.at.join("etc"));
    assert!(!mounted.at.join("home/me/.ssh").exists());
    mounted.on_host("echo > home/me/diary; mv home/me/diary home/me/letter; rm home/me/letter");
    mounted.on_host("mkdir home/me/private; rmdir home/me/private; echo >> etc/named-secret");
    mounted.on_host("umask 077; echo > etc/key");
    mounted.on_host("mv home/me/.ssh/id etc/id; mv etc/id home/me/.ssh/id");
    mounted.on_host("echo > etc/last");
    let names: Vec<_> = mounted
        .events_until_quiet()
        .into_iter()
        .map(|event| (event.name.into_string().unwrap(), event.change))
        .collect();
    assert!(names.iter().any(|(name, _)| name == "last"), "{names:?}");
    for (name, change) in &names {
        let known = ["last", "id"].contains(&name.as_str());
        let gone = matches!(change, Change::Deleted { .. });
        assert!(known || (gone && name == "key"), "{name}: {change:?}");
    }
}

#[test]
fn a_user_without_privileges_shares_their_own_toolchains_and_changes_nothing() {
    let dir = host();
    let me = dir.path().join("home/me");
    for path in [
        ".",
        ".cargo",
        ".cargo/own",
        ".cargo/bin",
        ".cargo/bin/cargo",
        ".ssh",
    ] {
        chown(me.join(path), Some(USER.0), Some(USER.1)).unwrap();
    }
    // What even its owner may not read.
    let closed = me.join(".cargo/closed");
    fs::DirBuilder::new().mode(0o000).create(&closed).unwrap();
    chown(&closed, Some(USER.0), Some(USER.1)).unwrap();
    let Some(mounted) = Mounted::of_view(dir, view(), Some(USER)) else {
        return;
    };
    let cargo = mounted.at.join("home/me/.cargo");
    assert!(fs::read(cargo.join("own")).is_ok());
    assert!(fs::read(cargo.join("bin/cargo")).is_ok());
    absent(cargo.join("closed"));
    absent(mounted.at.join("home/me/.ssh"));
    absent(mounted.at.join("etc/shadow"));
    let mode = fs::metadata(closed).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0, "permissions were lent");
}

#[test]
fn a_directory_that_may_only_be_passed_through_is_not_listed() {
    let dir = host();
    fs::set_permissions(
        dir.path().join("usr/lib/deep"),
        fs::Permissions::from_mode(0o711),
    )
    .unwrap();
    let Some(mounted) = Mounted::of_view(dir, view(), None) else {
        return;
    };
    let deep = mounted.at.join("usr/lib/deep");
    assert!(fs::read(deep.join("down/libc.so")).is_ok());
    let mut listing = fs::read_dir(&deep).into_iter().flatten();
    let error = match fs::read_dir(&deep) {
        Err(error) => error,
        Ok(_) => listing.next().unwrap().unwrap_err(),
    };
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
}
