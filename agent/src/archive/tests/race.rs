//! Somebody rearranges the destination during the copy.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::fs::{CWD, Mode, RenameFlags, mkdirat, renameat, renameat_with};
use rustix::io::Errno;

use super::super::chain::{self, Chain};
use super::*;

/// Copies that are raced.
const ROUNDS: usize = 200;

#[test]
fn a_directory_swapped_for_a_symlink_leads_nowhere() {
    let temporary = tempfile::tempdir().unwrap();
    let path = |name: &str| temporary.path().join(name);
    for name in ["from/a/b/c", "outside/b/c", "to"] {
        fs::create_dir_all(path(name)).unwrap();
    }
    for number in 0..20 {
        fs::write(path("from/a").join(format!("file{number}")), "x").unwrap();
        fs::write(path("from/a/b/c").join(format!("file{number}")), "x").unwrap();
    }
    let before = names(&path("outside"));
    let wire = packed(&path("from"));
    symlink(path("outside"), path("to/swap")).unwrap();
    let done = AtomicBool::new(false);
    let (mut copied, mut refused) = (0, 0);
    thread::scope(|scope| {
        let (a, swap) = (path("to/a"), path("to/swap"));
        let done = &done;
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                match renameat_with(CWD, &a, CWD, &swap, RenameFlags::EXCHANGE) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        });
        for _ in 0..ROUNDS {
            match unpack(&wire, &path("to"), &Landing::Tree(None), PLAIN).result {
                Ok(_) => copied += 1,
                Err(_) => refused += 1,
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(copied + refused, ROUNDS);
    assert_eq!(
        names(&path("outside")),
        before,
        "{copied} copied, {refused} refused"
    );
}

#[test]
fn a_file_swapped_for_a_symlink_is_not_written_through() {
    let temporary = tempfile::tempdir().unwrap();
    let path = |name: &str| temporary.path().join(name);
    fs::create_dir(path("to")).unwrap();
    fs::write(path("from"), "new").unwrap();
    fs::write(path("secret"), "secret").unwrap();
    let wire = packed(&path("from"));
    symlink("../secret", path("to/swap")).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let (file, swap) = (path("to/file"), path("to/swap"));
        let done = &done;
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                let _ = renameat_with(CWD, &file, CWD, &swap, RenameFlags::EXCHANGE);
                let _ = renameat(CWD, &swap, CWD, &file);
                let _ = symlink("../secret", &swap);
            }
        });
        let named = Landing::Tree(Some(b"file".to_vec()));
        for _ in 0..ROUNDS {
            // Whether it got its place before it lost it again does not matter here.
            let _ = unpack(&wire, &path("to"), &named, PLAIN);
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(fs::read(path("secret")).unwrap(), b"secret");
}

#[test]
fn the_way_up_from_a_directory_that_was_moved_is_not_gone() {
    const DEPTH: usize = 200;
    let temporary = tempfile::tempdir().unwrap();
    let top = temporary.path().join("top");
    fs::create_dir(&top).unwrap();
    fs::create_dir(temporary.path().join("elsewhere")).unwrap();
    let mut chain = Chain::new(File::open(&top).unwrap().into(), 0).unwrap();
    for depth in 0..DEPTH {
        mkdirat(chain.here().unwrap(), "d", Mode::RWXU).unwrap();
        let below = chain::open(chain.here().unwrap(), b"d").unwrap();
        chain.enter(b"d", below, depth + 1).unwrap();
    }
    let moved = temporary.path().join("elsewhere/moved");
    renameat(CWD, top.join("d/d/d"), CWD, &moved).unwrap();
    for depth in (4..=DEPTH).rev() {
        let (name, left) = chain.leave();
        assert_eq!((name.as_slice(), left.unwrap().1), (&b"d"[..], depth));
    }
    let (_, left) = chain.leave();
    assert_eq!(left.unwrap_err(), Errno::STALE);
    assert!(chain.here().is_err());
}
