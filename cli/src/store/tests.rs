//! Machines on disk: what two processes at once, a crash, or another hand can do to them.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use super::*;

fn store() -> (TempDir, Store) {
    let base = tempfile::tempdir().unwrap();
    let dir = |name: &str| {
        let dir = base.path().join(name);
        fs::create_dir(&dir).unwrap();
        dir
    };
    let store = Store::at(&dir("state"), &dir("run")).unwrap();
    (base, store)
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn definition() -> Definition {
    Definition::new(&["--".into(), "true".into()], Vec::new()).unwrap()
}

fn make(store: &Store, text: &str) -> Claim {
    store.create(Some(&name(text)), &definition()).unwrap()
}

/// What an owner has besides its machine's directory.
fn owned_paths(store: &Store) -> Vec<PathBuf> {
    let dirs = [&store.owners, &store.runtime];
    dirs.into_iter().flat_map(|dir| paths_in(dir)).collect()
}

/// What remains of a machine whose owner was killed while it ran: its lock is free, its files are there.
fn kill(claim: Claim) {
    let (store, name) = (claim.store.clone(), claim.name.clone());
    let left: Vec<_> = owned_paths(&store)
        .into_iter()
        .filter(|path| path.extension().is_some_and(|kind| kind == "json"))
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    drop(claim);
    for (path, content) in left {
        fs::write(path, content).unwrap();
    }
    fs::write(store.lock_file(&name), "").unwrap();
    drop(socket::bind(&store.socket(&name)).unwrap());
}

#[test]
fn what_was_typed_comes_back_byte_for_byte() {
    let (_base, store) = store();
    let typed = [
        OsString::from("--name"),
        OsString::from_vec(vec![b'a', 0xff, 0x80, b'\n']),
        OsString::from("ä \u{1F600}\t\"\\"),
        OsString::new(),
    ];
    let env = vec![(Bytes::from("NAME"), Bytes(vec![0xfe]))];
    let mut definition = Definition::new(&typed, env).unwrap();
    definition.changes.publish = Some(vec![Bytes::from("8080:80")]);
    let claim = store.create(Some(&name("a")), &definition).unwrap();
    assert_eq!(claim.definition().unwrap(), definition);
    let words: Vec<_> = definition.argv.iter().map(Bytes::as_os_str).collect();
    assert_eq!(words, typed);
}

#[test]
fn whose_a_machine_is_does_not_depend_on_the_runtime_directory() {
    let (base, store) = store();
    let elsewhere = Store::at(&base.path().join("state"), &base.path().join("elsewhere")).unwrap();
    let mut definition = definition();
    definition.ephemeral = true;
    let mut claim = store.create(Some(&name("a")), &definition).unwrap();
    claim.started().unwrap();
    let _listener = claim.bind().unwrap();
    let listed = elsewhere.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(*listed[0].standing.as_ref().unwrap(), Standing::Owned);
    elsewhere.claim(&name("a")).unwrap_err();
    elsewhere.connect(&name("a"), Duration::ZERO).unwrap();
    claim.rename(&name("b")).unwrap();
    elsewhere.connect(&name("b"), Duration::ZERO).unwrap();
    // Its user has logged out.
    fs::remove_dir_all(base.path().join("run")).unwrap();
    assert_eq!(elsewhere.standing(&name("b")).unwrap(), Standing::Owned);
    assert_eq!(store.standing(&name("b")).unwrap(), Standing::Owned);
}

#[test]
fn a_runtime_directory_may_serve_several_states() {
    let (base, store) = store();
    let other = Store::at(&base.path().join("other"), &base.path().join("run")).unwrap();
    let claim = make(&store, "a");
    claim.started().unwrap();
    let _listener = claim.bind().unwrap();
    assert_eq!(other.list().unwrap().len(), 0);
    let error = other.create(Some(&name("a")), &definition()).unwrap_err();
    assert!(format!("{error:#}").contains("XDG_STATE_HOME"), "{error:#}");
    store.connect(&name("a"), Duration::ZERO).unwrap();
}

#[test]
fn a_machine_stands_as_its_owner_left_it() {
    let (_base, store) = store();
    let claim = make(&store, "a");
    claim.started().unwrap();
    assert_eq!(store.standing(&name("a")).unwrap(), Standing::Owned);
    let owner = store.owner(&name("a")).unwrap().unwrap();
    assert_eq!(owner.pid, std::process::id());

    let ending = Ending::exited(3);
    claim.ended(&ending).unwrap();
    assert_eq!(store.standing(&name("a")).unwrap(), Standing::Owned);
    drop(claim);
    let stands = store.standing(&name("a")).unwrap();
    assert_eq!(stands, Standing::Ended(ending));
    assert!(store.owner(&name("a")).unwrap().is_none());
    assert_eq!(owned_paths(&store), Vec::<PathBuf>::new());

    let claim = store.claim(&name("a")).unwrap();
    claim.started().unwrap();
    kill(claim);
    assert_eq!(store.standing(&name("a")).unwrap(), Standing::Killed);
    assert!(store.owner(&name("a")).unwrap().is_none());

    let claim = store.claim(&name("a")).unwrap();
    claim.started().unwrap();
    let _listener = claim.bind().unwrap();
    assert_eq!(store.standing(&name("a")).unwrap(), Standing::Owned);
}

#[test]
fn of_many_that_make_one_machine_exactly_one_does() {
    let (_base, store) = store();
    for round in 0..20 {
        let name = name(&format!("m{round}"));
        let made = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| match store.create(Some(&name), &definition()) {
                    Ok(claim) => {
                        made.fetch_add(1, Ordering::SeqCst);
                        thread::sleep(Duration::from_millis(2));
                        drop(claim);
                    }
                    Err(error) => {
                        let text = format!("{error:#}");
                        assert!(text.contains(name.as_str()), "{text}");
                    }
                });
            }
        });
        assert_eq!(made.into_inner(), 1, "round {round}");
        assert!(store.definition(&name).is_ok());
    }
}

#[test]
fn who_looks_at_a_dead_machine_does_not_keep_others_from_starting_it() {
    let (_base, store) = store();
    kill(make(&store, "a"));
    let looking = AtomicUsize::new(1);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while looking.load(Ordering::Relaxed) == 1 {
                    store.is_owned(&name("a"));
                }
            });
        }
        for _ in 0..50 {
            let claim = store.claim(&name("a")).map(|claim| claim.started());
            if claim.is_err() {
                looking.store(0, Ordering::Relaxed);
            }
            claim.unwrap().unwrap();
        }
        looking.store(0, Ordering::Relaxed);
    });
}

#[test]
fn machines_without_a_name_get_different_ones() {
    let (_base, store) = store();
    let claims: Vec<_> = (0..50)
        .map(|_| store.create(None, &definition()).unwrap())
        .collect();
    let mut names: Vec<_> = claims.iter().map(|claim| claim.name().clone()).collect();
    names.sort();
    assert_eq!(names, store.names().unwrap());
    names.dedup();
    assert_eq!(names.len(), 50);
}

#[test]
fn a_machine_that_runs_is_not_claimed_again() {
    let (_base, store) = store();
    let claim = make(&store, "a");
    for error in [
        store.claim(&name("a")).unwrap_err(),
        store.create(Some(&name("a")), &definition()).unwrap_err(),
    ] {
        assert!(format!("{error:#}").contains("is running"), "{error:#}");
    }
    drop(claim);
    let error = store.create(Some(&name("a")), &definition()).unwrap_err();
    assert!(format!("{error:#}").contains("mvm start a"), "{error:#}");
    store.claim(&name("a")).unwrap();
}

#[test]
fn an_unknown_machine_is_told_with_its_neighbours() {
    let (_base, store) = store();
    drop((make(&store, "web"), make(&store, "db")));
    let error = store.claim(&name("wbe")).unwrap_err().to_string();
    assert!(error.contains("did you mean web?"), "{error}");
    let error = store.claim(&name("elsewhere")).unwrap_err().to_string();
    assert!(error.contains("no machine named elsewhere"), "{error}");
    // Nobody's lock is left behind by having looked.
    assert_eq!(owned_paths(&store), Vec::<PathBuf>::new());
}

#[test]
fn a_removed_machine_leaves_nothing() {
    let (_base, store) = store();
    let claim = make(&store, "a");
    claim.started().unwrap();
    fs::write(claim.dir().join("log"), "text").unwrap();
    kill(claim);
    store.claim(&name("a")).unwrap().remove().unwrap();
    assert_eq!(paths_in(&store.state), Vec::<PathBuf>::new());
    assert_eq!(owned_paths(&store), Vec::<PathBuf>::new());
    make(&store, "a");
}

#[test]
fn a_running_machine_takes_a_new_name_with_all_it_has() {
    let (_base, store) = store();
    let mut claim = make(&store, "a");
    claim.started().unwrap();
    let listener = claim.bind().unwrap();
    let other = make(&store, "b");
    let error = claim.rename(&name("b")).unwrap_err();
    assert!(
        format!("{error:#}").contains("machine named b"),
        "{error:#}"
    );
    drop(other);
    let error = claim.rename(&name("b")).unwrap_err();
    assert!(
        format!("{error:#}").contains("machine named b"),
        "{error:#}"
    );
    assert_eq!(claim.name(), &name("a"));

    let mut owner = store.owner(&name("a")).unwrap().unwrap();
    claim.rename(&name("c")).unwrap();
    let socket = store.socket(&name("c"));
    owner.socket = Bytes(socket.into_os_string().into_vec());
    assert_eq!(store.owner(&name("c")).unwrap(), Some(owner));
    assert_eq!(store.names().unwrap(), [name("b"), name("c")]);
    assert_eq!(store.standing(&name("c")).unwrap(), Standing::Owned);
    assert!(!store.is_owned(&name("a")) && !store.is_owned(&name("b")));
    store.connect(&name("c"), Duration::from_secs(10)).unwrap();
    listener.accept().unwrap();
    drop(claim);
    assert_eq!(owned_paths(&store), Vec::<PathBuf>::new());
}

#[test]
fn an_ephemeral_machine_goes_with_its_owner_and_others_stay() {
    let (_dir, store) = store();
    let ephemeral = Definition {
        ephemeral: true,
        ..definition()
    };
    let running = store.create(Some(&name("runs")), &ephemeral).unwrap();
    let killed = store.create(Some(&name("killed")), &ephemeral).unwrap();
    kill(killed);
    kill(make(&store, "kept"));
    let names: Vec<_> = store
        .list()
        .unwrap()
        .into_iter()
        .map(|entry| entry.name)
        .collect();
    assert_eq!(names, [name("kept"), name("runs")]);
    drop(running);
}

#[test]
fn a_rename_that_was_cut_short_leaves_one_machine() {
    let (_base, store) = store();
    let claim = make(&store, "a");
    claim.started().unwrap();
    kill(claim);
    // The state was moved, and nothing else.
    fs::rename(store.dir(&name("a")), store.dir(&name("b"))).unwrap();
    assert_eq!(store.names().unwrap(), [name("b")]);
    assert_eq!(store.standing(&name("b")).unwrap(), Standing::Killed);
    let claim = make(&store, "a");
    claim.bind().unwrap();
    drop(claim);
    store.claim(&name("b")).unwrap();
}

#[test]
fn leftovers_of_a_crash_are_no_machines_and_go_away() {
    let (_base, store) = store();
    fs::create_dir(store.state.join(".gone-old.17")).unwrap();
    fs::write(store.state.join(".gone-old.17/machine.json"), "{").unwrap();
    fs::create_dir(store.state.join(".new-fresh.17")).unwrap();
    let (owners, runtime) = (&store.owners, &store.runtime);
    for (dir, extension) in [
        (owners, "lock"),
        (owners, "json"),
        (runtime, "lock"),
        (runtime, "sock"),
    ] {
        fs::write(dir.join(format!("ghost.{extension}")), "").unwrap();
    }
    assert_eq!(store.names().unwrap(), []);
    let claim = make(&store, "a");
    let left = paths_in(&store.state);
    // Somebody may be about to finish the fresh one.
    let mut expected = vec![store.state.join(".new-fresh.17"), claim.dir()];
    expected.sort();
    let mut left_sorted = left;
    left_sorted.sort();
    assert_eq!(left_sorted, expected);
    drop(claim);
    assert_eq!(owned_paths(&store), Vec::<PathBuf>::new());
}

#[test]
fn a_damaged_machine_does_not_hide_the_others() {
    let (base, store) = store();
    drop((make(&store, "good"), make(&store, "zebra")));
    let damage = |machine: &str, file: &str, content: &[u8]| {
        let dir = store.dir(&name(machine));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(file), content).unwrap();
    };
    let whole = serde_json::to_vec(&definition()).unwrap();
    damage("half", DEFINITION, &whole[..whole.len() / 2]);
    damage("garbage", DEFINITION, b"\xff\xfe\0");
    damage("newer", DEFINITION, b"{\"version\": 99, \"shape\": []}");
    fs::create_dir(store.dir(&name("empty"))).unwrap();
    fs::write(store.dir(&name("file")), "").unwrap();
    fs::create_dir_all(store.dir(&name("dir")).join(DEFINITION)).unwrap();
    let outside = base.path().join("outside");
    fs::write(&outside, whole).unwrap();
    fs::create_dir(store.dir(&name("link"))).unwrap();
    std::os::unix::fs::symlink(&outside, store.dir(&name("link")).join(DEFINITION)).unwrap();
    let endless = std::os::unix::fs::symlink("/dev/zero", store.dir(&name("empty")).join(ENDING));
    endless.unwrap();

    let entries = store.list().unwrap();
    assert_eq!(entries.len(), 9);
    for entry in entries {
        let fine = ["good", "zebra"].contains(&entry.name.as_str());
        match entry.definition {
            Ok(_) => assert!(fine, "{} was taken", entry.name),
            Err(error) => {
                let text = format!("{error:#}");
                assert!(!fine, "{text}");
                assert!(text.contains(entry.name.as_str()), "{text}");
            }
        }
        assert_eq!(
            entry.standing.is_err(),
            ["empty", "file"].contains(&entry.name.as_str())
        );
    }
    for damaged in ["half", "garbage", "newer", "empty", "dir", "link"] {
        store.claim(&name(damaged)).unwrap().remove().unwrap();
    }
    assert!(outside.exists(), "a link was followed");
    assert_eq!(
        store.names().unwrap(),
        [name("file"), name("good"), name("zebra")]
    );
}

#[test]
fn half_a_write_is_never_seen() {
    let (_base, store) = store();
    let claim = make(&store, "a");
    // As a process leaves it that is killed between write and rename.
    fs::write(claim.dir().join(".machine.json.17.0"), "{\"vers").unwrap();
    assert!(claim.definition().is_ok());
    let mut definition = claim.definition().unwrap();
    definition.changes.auto = Some(true);
    claim.redefine(&definition).unwrap();
    assert_eq!(claim.definition().unwrap(), definition);
}
