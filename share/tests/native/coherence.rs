//! What others do on the host is seen in the guest, and told to it.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use share::{Cache, Change, HostEvent, Kind, Options};

use crate::mount::Mounted;

fn content(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn what_the_host_changes_is_seen_though_the_guest_believes_for_good() {
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    let at = |name: &str| mounted.at.join(name);
    mounted.on_host("mkdir -p dir/sub; echo one > dir/file");
    assert_eq!(content(&at("dir/file")), "one\n");
    assert!(!at("dir/new").exists());
    assert_eq!(fs::read_dir(at("dir")).unwrap().count(), 2);
    let open = fs::File::open(at("dir/file")).unwrap();
    assert_eq!(open.metadata().unwrap().len(), 4);

    mounted.on_host("echo two > dir/file");
    mounted.until("same size, other data", || {
        content(&at("dir/file")) == "two\n"
    });
    let mut data = [0; 4];
    open.read_exact_at(&mut data, 0).unwrap();
    assert_eq!(&data, b"two\n");
    mounted.on_host("echo more >> dir/file");
    mounted.until("more data", || open.metadata().unwrap().len() == 9);
    mounted.on_host("echo short > dir/file");
    mounted.until("less data", || content(&at("dir/file")) == "short\n");
    mounted.on_host("echo new > dir/new");
    mounted.until("a new file", || content(&at("dir/new")) == "new\n");
    assert_eq!(fs::read_dir(at("dir")).unwrap().count(), 3);
    mounted.on_host("echo replaced > dir/other; mv dir/other dir/file");
    mounted.until("a replaced file", || {
        content(&at("dir/file")) == "replaced\n"
    });
    mounted.on_host("chmod 604 dir/file");
    mounted.until("permissions", || {
        fs::metadata(at("dir/file")).unwrap().mode() & 0o777 == 0o604
    });
    mounted.on_host("rm dir/new");
    mounted.until("a removed file", || !at("dir/new").exists());
    mounted.on_host("mv dir/sub dir/renamed; touch dir/renamed/inner");
    mounted.until("a renamed directory", || at("dir/renamed/inner").exists());
    assert!(!at("dir/sub").exists());
    mounted.on_host("rm -r dir");
    mounted.until("a removed directory", || !at("dir").exists());
    mounted.on_host("echo a file > dir");
    mounted.until("a file in its place", || content(&at("dir")) == "a file\n");
}

#[test]
fn what_one_share_changes_is_seen_in_another_of_the_same_process() {
    let source = tempfile::tempdir().unwrap();
    fs::create_dir_all(source.path().join("outer/inner")).unwrap();
    fs::write(source.path().join("outer/inner/file"), "one").unwrap();
    let at = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let dirs = [source.path().to_owned(), source.path().join("outer")];
    let mount = |n: usize| Mounted::of(&dirs[n], at[n].path(), Options::default(), None);
    let (Some(outer), Some(inner)) = (mount(0), mount(1)) else {
        return;
    };
    let by_outer = |name: &str| outer.at.join("outer/inner").join(name);
    let by_inner = |name: &str| inner.at.join("inner").join(name);
    for (change, look) in [
        (
            &by_outer as &dyn Fn(&str) -> _,
            &by_inner as &dyn Fn(&str) -> _,
        ),
        (&by_inner, &by_outer),
    ] {
        assert_eq!(content(&look("file")), "one");
        assert!(!look("new").exists());
        fs::write(change("file"), "two").unwrap();
        outer.until("a change by the other", || content(&look("file")) == "two");
        fs::write(change("new"), "").unwrap();
        outer.until("a file by the other", || look("new").exists());
        fs::rename(change("new"), change("file")).unwrap();
        outer.until("a rename by the other", || {
            !look("new").exists() && content(&look("file")).is_empty()
        });
        fs::write(change("file"), "one").unwrap();
        outer.until("as it was", || content(&look("file")) == "one");
    }
    assert!(
        outer.is_quiet() && inner.is_quiet(),
        "a guest's own doing was told to it"
    );
}

#[test]
fn what_happens_in_a_directory_that_the_guest_only_knows_is_told_too() {
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    mounted.on_host("mkdir -p seen/below");
    assert!(mounted.at.join("seen/below").is_dir());
    // The root may have been watched before there was anything in it.
    mounted.events_until_quiet();
    // What the guest knows is watched a moment later.
    let mut names = Vec::new();
    while names.is_empty() {
        mounted.on_host("mktemp -d seen/below/XXXXXXXX");
        names = mounted.events_until_quiet();
    }
    let change = Change::Created {
        kind: Kind::Directory,
    };
    assert_eq!(
        (&names[0].path, &names[0].change),
        (&"seen/below".into(), &change)
    );
}

#[test]
fn what_is_changed_where_nobody_watches_is_seen_in_another_share_of_the_same_process() {
    let source = tempfile::tempdir().unwrap();
    fs::create_dir(source.path().join("dir")).unwrap();
    fs::write(source.path().join("dir/file"), "one").unwrap();
    let strict = Options {
        cache: Cache::Strict,
        ..Options::default()
    };
    let all = tempfile::tempdir().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let single = tempfile::NamedTempFile::new().unwrap();
    let mount =
        |path: &str, at: &Path, options| Mounted::of(&source.path().join(path), at, options, None);
    let (Some(all), Some(dir), Some(single)) = (
        mount("", all.path(), Options::default()),
        mount("dir", dir.path(), strict),
        mount("dir/file", single.path(), Options::default()),
    ) else {
        return;
    };
    let seen = || content(&all.at.join("dir/file"));
    assert_eq!(seen(), "one");
    for (by, text) in [(dir.at.join("file"), "two"), (single.at.clone(), "three")] {
        fs::write(by, text).unwrap();
        all.until("a change by another share", || seen() == text);
    }
    assert!(all.is_quiet(), "a guest's own doing was told to it");
}

#[test]
fn what_a_guest_writes_is_not_asked_for_because_of_a_share_that_can_change_nothing() {
    let source = tempfile::tempdir().unwrap();
    for name in ["dir", "unwatched"] {
        fs::create_dir(source.path().join(name)).unwrap();
    }
    let read_only = Options {
        read_only: true,
        ..Options::default()
    };
    let elsewhere = tempfile::tempdir().unwrap();
    let at = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let path = |name: &str| source.path().join(name);
    // No directory of FUSE is watched.
    let (Some(_below), Some(all), Some(dir)) = (
        Mounted::of(
            elsewhere.path(),
            &path("unwatched"),
            Options::default(),
            None,
        ),
        Mounted::of(source.path(), at[0].path(), read_only, None),
        Mounted::of(&path("dir"), at[1].path(), Options::default(), None),
    ) else {
        return;
    };
    assert_eq!(fs::read_dir(all.at.join("unwatched")).unwrap().count(), 0);
    let name = dir.at.join("file");
    fs::write(&name, "one").unwrap();
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&name)
        .unwrap();
    let mut data = [0; 3];
    // The kernel has all of the page only once it has read it.
    file.read_exact_at(&mut data, 0).unwrap();
    file.write_all_at(b"two", 0).unwrap();
    file.sync_all().unwrap();
    // What was to be told of the file was told before what happened after it.
    dir.on_host("echo > later");
    dir.until("a later change", || dir.at.join("later").exists());
    let before = dir.requests();
    file.read_exact_at(&mut data, 0).unwrap();
    assert_eq!((&data, dir.requests()), (b"two", before));
}

#[test]
fn what_others_than_this_kernel_change_is_seen_after_a_while() {
    // To the inner share, the outer one is a filesystem whose server does as it likes.
    let Some(outer) = Mounted::new(Options::default()) else {
        return;
    };
    outer.on_host("mkdir dir; echo one > dir/file");
    let at = tempfile::tempdir().unwrap();
    let shared = outer.at.join("dir");
    let inner = Mounted::of(&shared, at.path(), Options::default(), None).unwrap();
    let seen = || content(&inner.at.join("file"));
    assert_eq!(seen(), "one\n");
    outer.on_host("echo two > dir/file; echo > dir/new");
    inner.until("data", || seen() == "two\n");
    inner.until("a new file", || inner.at.join("new").exists());
}

#[test]
fn what_nobody_changes_is_not_asked_for_again() {
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    mounted.on_host("mkdir dir; echo data > dir/file");
    assert_eq!(content(&mounted.at.join("dir/file")), "data\n");
    let _ = fs::read_dir(mounted.at.join("dir")).unwrap().count();
    // Longer than what is believed only briefly is believed.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let _ = fs::metadata(mounted.at.join("dir/file"));
    let before = mounted.requests();
    for _ in 0..10 {
        fs::metadata(mounted.at.join("dir/file")).unwrap();
        assert!(fs::metadata(mounted.at.join("dir/absent")).is_err());
    }
    let asked = mounted.requests() - before;
    // The absent name once.
    assert!(asked <= 2, "{asked} requests");
}

#[test]
fn strict_asks_each_time() {
    let options = Options {
        cache: Cache::Strict,
        ..Options::default()
    };
    let Some(mounted) = Mounted::new(options) else {
        return;
    };
    let file = mounted.at.join("file");
    for number in 0..50 {
        mounted.on_host(&format!("echo {number} > file"));
        assert_eq!(content(&file), format!("{number}\n"));
        mounted.on_host("rm file");
        assert!(!file.exists());
    }
}

fn shown(event: &HostEvent) -> String {
    let path = event.path.to_str().unwrap();
    let name = event.name.to_str().unwrap();
    let change = match &event.change {
        Change::Moved { path, name, .. } => {
            format!(
                "Moved to {}/{}",
                path.to_str().unwrap(),
                name.to_str().unwrap()
            )
        }
        change => format!("{change:?}"),
    };
    format!("{path}/{name} {change}")
}

#[test]
fn what_the_host_does_is_told_in_order_and_what_the_guest_does_is_not() {
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    mounted.on_host("mkdir -p a/b");
    assert!(!mounted.at.join("a/b/nothing").exists());
    // The root may have been watched before there was anything in it.
    mounted.events_until_quiet();
    fs::write(mounted.at.join("a/b/guests"), "data").unwrap();
    fs::rename(
        mounted.at.join("a/b/guests"),
        mounted.at.join("a/b/renamed"),
    )
    .unwrap();
    fs::remove_file(mounted.at.join("a/b/renamed")).unwrap();
    assert!(mounted.is_quiet());

    let expect = |commands: &str, expected: &[&str]| {
        mounted.on_host(commands);
        let told: Vec<_> = expected.iter().map(|_| shown(&mounted.event())).collect();
        assert_eq!(told, expected, "{commands}");
    };
    expect(
        ": > a/b/file",
        &["a/b/file Created { kind: File }", "a/b/file CloseWrite"],
    );
    expect(
        "echo more >> a/b/file",
        &["a/b/file Modified", "a/b/file CloseWrite"],
    );
    expect("chmod 600 a/b/file", &["a/b/file Attrib"]);
    expect("mv a/b/file a/file", &["a/b/file Moved to a/file"]);
    expect("mkdir a/b/c", &["a/b/c Created { kind: Directory }"]);
    expect("rmdir a/b/c", &["a/b/c Deleted { is_dir: true }"]);
    expect("rm a/file", &["a/file Deleted { is_dir: false }"]);
    assert!(mounted.is_quiet());
}

#[test]
fn a_burst_of_changes_loses_no_final_state() {
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    for number in 0..20 {
        let dir = mounted.at.join(number.to_string());
        fs::create_dir(&dir).unwrap();
        assert!(!dir.join("0").exists());
    }
    mounted.on_host("for d in *; do for f in $(seq 100); do echo $d > $d/$f; done; done; rm -r 7/*; echo > done");
    mounted.until("the last file", || mounted.at.join("done").exists());
    for number in 0..20 {
        let dir = mounted.at.join(number.to_string());
        let expected = if number == 7 { 0 } else { 100 };
        mounted.until("all files", || {
            fs::read_dir(&dir).unwrap().count() == expected
        });
        if number != 7 {
            assert_eq!(content(&dir.join("50")), format!("{number}\n"));
        }
    }
}
