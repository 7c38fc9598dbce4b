//! Folders in a guest that is none: mounted by this machine's own kernel, with all that is between. Where
//! FUSE cannot be mounted here, these tests say so and pass.

mod fake;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use self::fake::{FakeGuest, PATIENCE};
use super::*;

/// `HOST:GUEST[:OPTIONS]` with HOST in a directory of the test's own.
fn volume(dir: &TempDir, rest: &str) -> Volume {
    let text = format!("{}/{rest}", dir.path().display());
    Volume::parse(OsStr::new(&text)).unwrap()
}

fn folders(declared: Vec<Volume>) -> Folders {
    Folders::new(declared, None, 1).unwrap()
}

/// A directory with `src/file`, and a guest.
fn set_up() -> Option<(TempDir, FakeGuest)> {
    let guest = FakeGuest::new()?;
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("src")).unwrap();
    fs::write(dir.path().join("src/file"), "host").unwrap();
    Some((dir, guest))
}

fn eventually(what: &str, mut wanted: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !wanted() {
        assert!(Instant::now() < deadline, "{what}: it did not come to that");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_is_declared_is_there_when_the_guest_is_and_goes_with_it() {
    let Some((dir, guest)) = set_up() else { return };
    let declared = vec![
        volume(&dir, "src:/a/b/inner"),
        volume(&dir, "src/file:/etc/single"),
        volume(&dir, "src:/a:ro"),
    ];
    fs::create_dir_all(dir.path().join("src/b/inner")).unwrap();
    let folders = folders(declared);
    folders.attach(&guest.link()).unwrap();
    let guests: Vec<_> = folders
        .list()
        .into_iter()
        .map(|folder| folder.volume.guest)
        .collect();
    assert_eq!(
        guests,
        ["/a", "/etc/single", "/a/b/inner"].map(PathBuf::from)
    );

    assert_eq!(fs::read_to_string(guest.path("/a/file")).unwrap(), "host");
    assert_eq!(
        fs::read_to_string(guest.path("/etc/single")).unwrap(),
        "host"
    );
    fs::write(guest.path("/a/b/inner/new"), "guest").unwrap();
    assert_eq!(
        fs::read_to_string(dir.path().join("src/new")).unwrap(),
        "guest"
    );
    let refused = fs::write(guest.path("/a/other"), "guest").unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
    let large: Vec<u8> = (0..3_000_000_u32)
        .map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1])
        .collect();
    fs::write(guest.path("/a/b/inner/large"), &large).unwrap();
    assert!(fs::read(dir.path().join("src/large")).unwrap() == large);
    assert!(fs::read(guest.path("/a/large")).unwrap() == large);

    folders.end();
    eventually("the mount is gone", || {
        fs::read_dir(guest.path("/a")).is_ok_and(|mut dir| dir.next().is_none())
    });
}

#[test]
fn what_is_changed_through_one_folder_is_seen_through_another() {
    let Some((dir, guest)) = set_up() else { return };
    let declared = vec![
        volume(&dir, "src:/project"),
        volume(&dir, "src:/same:ro"),
        volume(&dir, "src/file:/single"),
    ];
    let folders = folders(declared);
    folders.attach(&guest.link()).unwrap();
    let read = |path: &str| fs::read_to_string(guest.path(path)).unwrap();
    for (path, text) in [
        ("/single", "one"),
        ("/project/file", "two"),
        ("/single", "three"),
    ] {
        fs::write(guest.path(path), text).unwrap();
        for other in ["/project/file", "/same/file", "/single"] {
            eventually("it is seen everywhere", || read(other) == text);
        }
    }
}

#[test]
fn the_hosts_user_is_the_one_of_the_command() {
    let Some((dir, guest)) = set_up() else { return };
    let declared = vec![
        volume(&dir, "src:/project"),
        volume(&dir, "src:/as:uid=7,gid=8"),
    ];
    let folders = Folders::new(declared, Some("somebody".to_owned()), 1).unwrap();
    folders.attach(&guest.link()).unwrap();
    let owner = |path| {
        let found = fs::metadata(guest.path(path)).unwrap();
        (found.uid(), found.gid())
    };
    assert_eq!(owner("/project/file"), (1234, 5678));
    assert_eq!(owner("/as/file"), (7, 8));

    let folders = Folders::new(
        vec![volume(&dir, "src:/other")],
        Some("nobody".to_owned()),
        1,
    );
    let error = folders.unwrap().attach(&guest.link()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "there is no user \"nobody\" in the machine"
    );
}

#[test]
fn folders_come_and_go_while_the_guest_runs() {
    let Some((dir, guest)) = set_up() else { return };
    let folders = folders(Vec::new());
    let work = volume(&dir, "src:/project");
    let early = folders.add(work.clone()).unwrap_err();
    assert!(matches!(early, FolderError::NotUp), "{early}");
    folders.attach(&guest.link()).unwrap();

    folders.add(work.clone()).unwrap();
    assert_eq!(
        fs::read_to_string(guest.path("/project/file")).unwrap(),
        "host"
    );
    let twice = folders.add(work.clone()).unwrap_err().to_string();
    assert!(
        twice.contains("at /project in the guest already"),
        "{twice}"
    );
    fs::create_dir(dir.path().join("src/sub")).unwrap();
    folders.add(volume(&dir, "src:/project/sub")).unwrap();
    let hiding = folders
        .remove(Path::new("/project"), true)
        .unwrap_err()
        .to_string();
    assert!(hiding.contains("the one at /project/sub"), "{hiding}");
    folders.remove(Path::new("/project/sub"), false).unwrap();

    let open = fs::File::open(guest.path("/project/file")).unwrap();
    let busy = folders.remove(Path::new("/project"), false).unwrap_err();
    let busy = format!("{:#}", anyhow::Error::new(busy));
    assert!(
        busy.contains("/project in the guest stays: it is in use"),
        "{busy}"
    );
    assert_eq!(folders.list().len(), 1);
    drop(open);
    eventually("it is in use no longer", || {
        folders.remove(Path::new("/project"), false).is_ok()
    });
    assert!(folders.list().is_empty());
    let gone = folders
        .remove(Path::new("/project"), false)
        .unwrap_err()
        .to_string();
    assert_eq!(gone, "no folder is shared at /project in the guest");

    folders.add(work).unwrap();
    let open = fs::File::open(guest.path("/project/file")).unwrap();
    folders.remove(Path::new("/project"), true).unwrap();
    drop(open);
    assert!(!guest.path("/project/file").exists());
}

#[test]
fn what_the_guest_unmounts_itself_is_there_no_longer() {
    let Some((dir, guest)) = set_up() else { return };
    let folders = folders(vec![volume(&dir, "src:/project")]);
    folders.attach(&guest.link()).unwrap();
    let flags = rustix::mount::UnmountFlags::empty();
    rustix::mount::unmount(guest.path("/project"), flags).unwrap();
    eventually("it is not listed", || folders.list().is_empty());
    folders.add(volume(&dir, "src:/project")).unwrap();
}

#[test]
fn what_the_host_changes_is_seen_and_heard_in_the_guest() {
    let Some((dir, guest)) = set_up() else { return };
    let folders = folders(vec![volume(&dir, "src:/project")]);
    folders.attach(&guest.link()).unwrap();
    assert_eq!(
        fs::read_to_string(guest.path("/project/file")).unwrap(),
        "host"
    );
    assert!(!guest.path("/project/new").exists());
    // By another process: this one's own changes are the guest's.
    let script = "echo changed > file; echo new > new; mv new renamed; rm renamed; touch last";
    let mut shell = std::process::Command::new("sh");
    let status = shell
        .args(["-ec", script])
        .current_dir(dir.path().join("src"))
        .status();
    assert!(status.unwrap().success());
    eventually("the file is another", || {
        fs::read_to_string(guest.path("/project/file")).is_ok_and(|text| text == "changed\n")
    });
    eventually("the last change is told", || {
        guest.told().iter().any(|change| change.name == b"last")
    });
    let told: Vec<_> = guest.told().into_iter().map(|change| change.what).collect();
    use agent::protocol::ChangeKind::{CreatedFile, Deleted, Modified, Moved};
    assert!(
        told.contains(&Modified) && told.contains(&CreatedFile),
        "{told:?}"
    );
    assert!(told.contains(&Deleted { is_dir: false }), "{told:?}");
    assert!(
        told.iter().any(|what| matches!(what, Moved { .. })),
        "{told:?}"
    );
}

#[test]
fn an_agent_that_does_not_replay_keeps_nobody_from_the_files() {
    let Some((dir, guest)) = set_up() else { return };
    let folders = folders(vec![volume(&dir, "src:/project")]);
    folders.attach(&guest.link()).unwrap();
    guest.stop_replaying();
    assert!(!guest.path("/project/new").exists());
    for round in 0..20 {
        let script = format!("echo {round} > new; mv new file");
        let mut shell = std::process::Command::new("sh");
        let status = shell
            .args(["-ec", &script])
            .current_dir(dir.path().join("src"))
            .status();
        assert!(status.unwrap().success());
        eventually("it is seen", || {
            fs::read_to_string(guest.path("/project/file"))
                .is_ok_and(|text| text == format!("{round}\n"))
        });
    }
    folders.remove(Path::new("/project"), true).unwrap();
    assert!(folders.list().is_empty());
    assert!(fs::read_to_string(guest.path("/project/file")).is_err());
}

#[test]
fn threads_end_with_the_folder() {
    let Some((dir, guest)) = set_up() else { return };
    let folders = folders(vec![volume(&dir, "src:/project")]);
    folders.attach(&guest.link()).unwrap();
    let mounted = lock(&folders.mounted)[0].clone();
    folders.remove(Path::new("/project"), false).unwrap();
    assert_eq!(mounted.served.threads(), 0);
    assert_eq!(Arc::strong_count(&mounted), 1);
}

#[test]
fn what_cannot_be_shared_is_told_before_anything_is_mounted() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("src")).unwrap();
    let declared = |list: &[&str]| {
        let declared = list.iter().map(|rest| volume(&dir, rest)).collect();
        Folders::new(declared, None, 1).map(drop)
    };
    let error = declared(&["src:/a", "nothing:/b"]).unwrap_err();
    let error = format!("{:#}", anyhow::Error::new(error));
    assert!(
        error.contains("nothing cannot be shared: No such file"),
        "{error}"
    );
    let error = declared(&["src:/a", "src:/b", "src:/a/./"])
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("a folder is shared at /a in the guest already"),
        "{error}"
    );
    let many: Vec<_> = (0..=MAX_FOLDERS)
        .map(|number| format!("src:/{number}"))
        .collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    assert!(matches!(declared(&many), Err(FolderError::TooMany(_))));
    declared(&many[1..]).unwrap();
}
