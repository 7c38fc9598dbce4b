//! What the host and other guests change under a request leads nowhere else.

use std::ffi::CStr;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::fs::{CWD, FileType, Mode, RenameFlags};
use rustix::io::Errno;
use share::wire::{self, Opcode, ROOT_ID};
use zerocopy::IntoBytes;

use crate::guest::{Guest, share, some_limits};

const ROUNDS: usize = 10_000;

/// Swaps two names for each other as fast as it goes, while `attack` runs.
fn while_swapping<T>(one: &Path, other: &Path, attack: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
            }
        });
        // The other thread ends, whatever becomes of this.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(attack));
        done.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// All that there is below a directory: names, content, permissions, times.
fn everything(dir: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let mut found = Vec::new();
    let mut entries: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    entries.sort();
    for path in entries {
        let about = fs::symlink_metadata(&path).unwrap();
        let content = fs::read(&path).unwrap_or_default();
        let (mode, links, changed) = (about.mode(), about.nlink(), about.ctime_nsec());
        found.push(format!("{path:?} {mode:o} {links} {changed} {content:?}"));
        if about.is_dir() {
            found.extend(everything(&path));
        }
    }
    found
}

/// Does to `name` in `dir` all that changes anything; how much of it succeeded.
fn change_everything(guest: &mut Guest<'_>, dir: u64, name: &CStr, round: usize) -> usize {
    let name = name.to_bytes_with_nul();
    let new = format!("new-{round}\0");
    let create = wire::CreateIn {
        flags: (libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC).cast_unsigned(),
        mode: libc::S_IFREG | 0o600,
        ..wire::CreateIn::default()
    };
    let mkdir = wire::MkdirIn {
        mode: 0o700,
        ..wire::MkdirIn::default()
    };
    let mknod = wire::MknodIn {
        mode: libc::S_IFIFO | 0o600,
        ..wire::MknodIn::default()
    };
    let to_root = wire::RenameIn { newdir: ROOT_ID };
    let mut succeeded = 0;
    let mut ask =
        |opcode, body: &[&[u8]]| succeeded += usize::from(guest.ask(opcode, dir, body).is_ok());
    ask(Opcode::Mkdir, &[mkdir.as_bytes(), new.as_bytes()]);
    ask(Opcode::Rmdir, &[new.as_bytes()]);
    ask(Opcode::Mknod, &[mknod.as_bytes(), new.as_bytes()]);
    ask(Opcode::Unlink, &[new.as_bytes()]);
    ask(Opcode::Symlink, &[new.as_bytes(), b"target\0"]);
    ask(
        Opcode::Rename,
        &[to_root.as_bytes(), new.as_bytes(), b"moved\0"],
    );
    ask(Opcode::Rename, &[to_root.as_bytes(), name, b"stolen\0"]);
    ask(Opcode::Unlink, &[name]);
    if let Ok(made) = guest.ask(Opcode::Create, dir, &[create.as_bytes(), name]) {
        succeeded += 1;
        let node = u64::from_ne_bytes(made[..8].try_into().unwrap());
        let attributes = wire::SetattrIn {
            valid: wire::fattr::MODE | wire::fattr::SIZE | wire::fattr::MTIME,
            size: 5,
            mode: 0o640,
            ..wire::SetattrIn::default()
        };
        let _ = guest.ask(Opcode::Setattr, node, &[attributes.as_bytes()]);
        let link = wire::LinkIn { oldnodeid: node };
        let _ = guest.ask(Opcode::Link, dir, &[link.as_bytes(), new.as_bytes()]);
        let _ = guest.ask(Opcode::Unlink, dir, &[new.as_bytes()]);
        let fh = &made[size_of::<wire::EntryOut>()..][..8];
        guest.release(node, u64::from_ne_bytes(fh.try_into().unwrap()));
    }
    succeeded
}

fn content(guest: &mut Guest<'_>) -> Result<Vec<u8>, Errno> {
    let dir = guest.lookup(ROOT_ID, c"swap")?;
    let file = guest.lookup(dir, c"secret")?;
    let fh = guest.open(file, libc::O_RDONLY)?;
    let content = guest.read(file, fh);
    guest.release(file, fh);
    content
}

#[test]
fn what_is_swapped_for_a_link_is_not_read_through_it() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "outside").unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("swap")).unwrap();
    fs::write(dir.path().join("swap/secret"), "inside").unwrap();
    symlink(outside.path(), dir.path().join("link")).unwrap();
    let share = share(&dir, some_limits());
    while_swapping(&dir.path().join("swap"), &dir.path().join("link"), || {
        let mut guest = Guest::new(&share);
        let mut inside = 0;
        for _ in 0..ROUNDS {
            if let Ok(content) = content(&mut guest) {
                assert_eq!(content, b"inside");
                inside += 1;
            }
        }
        assert!(inside > 0, "nothing was ever read");
    });
}

#[test]
fn what_is_swapped_for_a_link_is_not_written_through_it() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "outside").unwrap();
    fs::create_dir(outside.path().join("below")).unwrap();
    fs::write(outside.path().join("below/secret"), "outside").unwrap();
    let before = everything(outside.path());
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("swap/below")).unwrap();
    symlink(outside.path(), dir.path().join("link")).unwrap();
    let share = share(&dir, some_limits());
    let changed = while_swapping(&dir.path().join("swap"), &dir.path().join("link"), || {
        let mut guest = Guest::new(&share);
        let mut changed = 0;
        for round in 0..ROUNDS / 10 {
            let Ok(swap) = guest.lookup(ROOT_ID, c"swap") else {
                continue;
            };
            changed += change_everything(&mut guest, swap, c"secret", round);
            if let Ok(below) = guest.lookup(swap, c"below") {
                changed += change_everything(&mut guest, below, c"secret", round);
            }
        }
        changed
    });
    assert!(changed > 0, "nothing was ever changed");
    assert_eq!(everything(outside.path()), before);
}

#[test]
fn a_file_that_is_swapped_for_a_link_or_a_fifo_is_neither_followed_nor_waited_for() {
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, "outside").unwrap();
    // Other tests of this process change its umask.
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).unwrap();
    for with_fifo in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("swap")).unwrap();
        let (one, other) = (dir.path().join("swap/secret"), dir.path().join("other"));
        fs::write(&one, "inside").unwrap();
        match with_fifo {
            true => rustix::fs::mknodat(CWD, &other, FileType::Fifo, Mode::RWXU, 0).unwrap(),
            false => symlink(&secret, &other).unwrap(),
        }
        // So few descriptors that files are found again by their names all the time.
        let mut limits = some_limits();
        limits.descriptors = 1;
        let share = share(&dir, limits);
        while_swapping(&one, &other, || {
            let mut guest = Guest::new(&share);
            let swap = guest.lookup(ROOT_ID, c"swap").unwrap();
            for _ in 0..ROUNDS {
                let Ok(file) = guest.lookup(swap, c"secret") else {
                    continue;
                };
                for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_WRONLY] {
                    let Ok(fh) = guest.open(file, flags) else {
                        continue;
                    };
                    if flags != libc::O_WRONLY {
                        assert_eq!(guest.read(file, fh).unwrap(), b"inside");
                    }
                    guest.release(file, fh);
                }
                let shorter = wire::SetattrIn {
                    valid: wire::fattr::MODE,
                    mode: 0o666,
                    ..wire::SetattrIn::default()
                };
                let _ = guest.ask(Opcode::Setattr, file, &[shorter.as_bytes()]);
            }
        });
        assert_eq!(fs::read_to_string(&secret).unwrap(), "outside");
        assert_eq!(
            fs::metadata(&secret).unwrap().permissions().mode() & 0o777,
            0o644
        );
    }
}

#[test]
fn a_directory_that_moves_while_it_is_walked_leads_nowhere_else() {
    let outer = tempfile::tempdir().unwrap();
    fs::write(outer.path().join("secret"), "outside").unwrap();
    let dir = tempfile::tempdir_in(outer.path()).unwrap();
    fs::create_dir_all(dir.path().join("a/b/c")).unwrap();
    fs::create_dir(dir.path().join("x")).unwrap();
    let share = share(&dir, some_limits());
    // Up and down in the tree: what is `..` of it is another directory each time.
    let (low, high) = (dir.path().join("a/b/c"), dir.path().join("x"));
    while_swapping(&low, &high, || {
        let mut guest = Guest::new(&share);
        for _ in 0..ROUNDS {
            let mut at = ROOT_ID;
            for name in [c"a", c"b", c"c", c"..", c"..", c"..", c"..", c"secret"] {
                match guest.lookup(at, name) {
                    Ok(node) => at = node,
                    Err(errno) => assert!(
                        matches!(errno, Errno::INVAL | Errno::NOENT | Errno::STALE),
                        "{errno}"
                    ),
                }
            }
            assert!(
                guest
                    .open(at, libc::O_RDONLY)
                    .is_err_and(|e| e == Errno::ISDIR || e == Errno::STALE)
            );
        }
    });
}
