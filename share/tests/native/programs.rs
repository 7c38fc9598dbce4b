//! Programs as people use them, on a share.

use std::fs;
use std::process::{Command, Output};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use share::{Cache, Options};

use crate::mount::Mounted;

/// Runs a shell's commands in the guest's directory; what they said.
fn in_guest(mounted: &Mounted, commands: &str) -> String {
    let output = Command::new("sh")
        .args(["-ec", commands])
        .current_dir(&mounted.at)
        // Nobody's own settings matter.
        .env("HOME", "/nonexistent")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .output()
        .unwrap();
    let Output { stdout, stderr, .. } = &output;
    let stderr = String::from_utf8_lossy(stderr);
    assert!(output.status.success(), "{commands}: {stderr}");
    String::from_utf8_lossy(stdout).into_owned()
}

/// Whether this machine has a program.
pub fn has(program: &str) -> bool {
    let found = Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .output()
        .is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("skipped: there is no {program}");
    }
    found
}

/// Runs a program in Python on a path in the guest; what it said. Nothing where there is no Python.
pub fn python(program: &str, arguments: &[&std::ffi::OsStr]) -> Option<String> {
    if !has("python3") {
        return None;
    }
    let output = Command::new("python3")
        .args(["-c", program])
        .args(arguments)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

pub fn every_cache() -> impl Iterator<Item = Mounted> {
    [Cache::Auto, Cache::Strict, Cache::Private]
        .into_iter()
        .filter_map(|cache| {
            let options = Options {
                cache,
                ..Options::default()
            };
            Mounted::new(options)
        })
}

#[test]
fn git_works_on_a_repository_and_sees_what_the_host_changes() {
    if !has("git") {
        return;
    }
    for mounted in every_cache() {
        let prepare = "git init -q -b main .; git config user.name a; git config user.email a@b
            for d in $(seq 20); do mkdir -p dir$d/sub; for f in $(seq 20); do
                echo $d $f > dir$d/sub/$f; done; done
            git add .; git commit -qm one
            git checkout -qb other; for d in $(seq 20); do git mv -k dir$d/sub dir$d/moved; echo more > dir$d/new; done
            git add .; git commit -qm two; git checkout -q main";
        in_guest(&mounted, prepare);
        let status = "git status --porcelain";
        assert_eq!(in_guest(&mounted, status), "");
        for _ in 0..3 {
            in_guest(
                &mounted,
                "git checkout -q other; test -e dir7/moved/3; test ! -e dir7/sub",
            );
            assert_eq!(in_guest(&mounted, status), "");
            in_guest(&mounted, "git checkout -q main; test ! -e dir7/new");
            assert_eq!(in_guest(&mounted, status), "");
        }
        in_guest(
            &mounted,
            "git gc -q --prune=now; git fsck --strict --no-progress",
        );
        assert_eq!(
            in_guest(&mounted, "git log --oneline --all | wc -l").trim(),
            "2"
        );
        mounted.on_host("git -c safe.directory='*' fsck --strict --no-progress");
        if mounted.is_told() {
            mounted.on_host("echo changed > dir1/sub/1; rm dir2/sub/2; echo new > dir3/untracked");
            mounted.until("what the host changed", || {
                in_guest(&mounted, status) == " M dir1/sub/1\n D dir2/sub/2\n?? dir3/untracked\n"
            });
        }
    }
}

#[test]
fn forty_thousand_small_files_are_unpacked_and_removed() {
    let packed = tempfile::tempdir().unwrap();
    let archive = packed.path().join("tree.tar");
    for dir in 0..400 {
        let dir = packed
            .path()
            .join("tree")
            .join(format!("{}/{dir}", dir % 20));
        fs::create_dir_all(&dir).unwrap();
        for file in 0..100 {
            fs::write(dir.join(file.to_string()), file.to_string()).unwrap();
        }
    }
    let tar = |arguments: &[&std::ffi::OsStr], dir: &std::path::Path| {
        let status = Command::new("tar")
            .args(arguments)
            .current_dir(dir)
            .status();
        assert!(status.unwrap().success());
    };
    tar(
        &["cf".as_ref(), archive.as_os_str(), "tree".as_ref()],
        packed.path(),
    );
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    tar(&["xf".as_ref(), archive.as_os_str()], &mounted.at);
    assert_eq!(in_guest(&mounted, "find . -type f | wc -l").trim(), "40000");
    // As it was packed, seen from either side.
    for seen in [&mounted.at, &mounted.source] {
        let status = Command::new("diff")
            .arg("-r")
            .args([packed.path().join("tree"), seen.join("tree")])
            .status();
        assert!(status.unwrap().success());
    }
    in_guest(&mounted, "rm -rf tree");
    assert_eq!(fs::read_dir(&mounted.source).unwrap().count(), 0);
    assert_eq!(fs::read_dir(&mounted.at).unwrap().count(), 0);
}

#[test]
fn cargo_builds_and_builds_again_what_was_changed() {
    for mounted in every_cache() {
        let at = &mounted.at;
        fs::create_dir(at.join("src")).unwrap();
        fs::write(
            at.join("Cargo.toml"),
            "[package]\nname = \"small\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[workspace]\n",
        )
        .unwrap();
        fs::write(
            at.join("build.rs"),
            "fn main() { println!(\"cargo:rustc-env=MADE=built\"); }",
        )
        .unwrap();
        for said in ["one", "two"] {
            let main = format!("fn main() {{ println!(\"{{}} {said}\", env!(\"MADE\")); }}");
            fs::write(at.join("src/main.rs"), main).unwrap();
            let output = Command::new(env!("CARGO"))
                .args(["run", "--quiet", "--offline", "--target-dir", "target"])
                .current_dir(at)
                .env_remove("CARGO_TARGET_DIR")
                .env_remove("RUSTFLAGS")
                .output()
                .unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(
                output.stdout,
                format!("built {said}\n").as_bytes(),
                "{stderr}"
            );
        }
    }
}

const MMAP: &str = "
import mmap, os, sys
path = sys.argv[1]
size = 1 << 20
if os.fork() == 0:
    fd = os.open(path, os.O_RDWR)
    m = mmap.mmap(fd, size)
    for at in range(1, size, 4096): m[at] = 0x62
    os._exit(0)
fd = os.open(path, os.O_RDWR)
m = mmap.mmap(fd, size)
for at in range(0, size, 4096): m[at] = 0x61
os.wait()
assert all(m[at:at + 2] == b'ab' for at in range(0, size, 4096)), 'mapped twice'
assert os.pread(fd, 2, 8192) == b'ab', 'mapped and read'
os.pwrite(fd, b'xy', 12288)
assert m[12288:12290] == b'xy', 'written and mapped'
m.flush()
";

#[test]
fn a_program_that_runs_is_not_cut_off() {
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    let program = mounted.at.join("program");
    let sleep = in_guest(&mounted, "command -v sleep");
    fs::copy(sleep.trim(), &program).unwrap();
    let size = fs::metadata(&program).unwrap().len();
    let mut running = Command::new(&program).arg("600").spawn().unwrap();
    for flags in [
        OFlags::TRUNC,
        OFlags::WRONLY,
        OFlags::WRONLY | OFlags::TRUNC,
    ] {
        let opened = rustix::fs::open(&program, flags, Mode::empty()).map(drop);
        assert_eq!(opened, Err(Errno::TXTBSY), "{flags:?}");
        assert_eq!(fs::metadata(&program).unwrap().len(), size, "{flags:?}");
    }
    assert!(running.try_wait().unwrap().is_none());
    running.kill().unwrap();
    running.wait().unwrap();
    // And then it is, however it is opened.
    rustix::fs::open(&program, OFlags::TRUNC, Mode::empty()).unwrap();
    assert_eq!(fs::metadata(&program).unwrap().len(), 0);
}

#[test]
fn mappings_of_a_file_are_one_with_each_other_and_reach_the_host() {
    for mounted in every_cache() {
        let path = mounted.at.join("mapped");
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        if python(MMAP, &[path.as_os_str()]).is_none() {
            return;
        }
        let found = fs::read(mounted.source.join("mapped")).unwrap();
        assert_eq!(found.len(), 1 << 20);
        for at in (0..found.len()).step_by(4096).filter(|at| *at != 12288) {
            assert_eq!(&found[at..at + 2], b"ab", "{at}");
        }
        assert_eq!(&found[12288..12290], b"xy");
    }
}

const LOCKS: &str = "
import fcntl, os, sys
path = sys.argv[1]
open(path, 'w').write('0')
def work(lock, unlock):
    for _ in range(100):
        fd = os.open(path, os.O_RDWR)
        lock(fd)
        number = int(os.pread(fd, 20, 0))
        os.pwrite(fd, str(number + 1).encode(), 0)
        unlock(fd)
        os.close(fd)
for lock, unlock in [
    (lambda fd: fcntl.flock(fd, fcntl.LOCK_EX), lambda fd: fcntl.flock(fd, fcntl.LOCK_UN)),
    (lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX), lambda fd: fcntl.lockf(fd, fcntl.LOCK_UN)),
]:
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            work(lock, unlock)
            os._exit(0)
        children.append(pid)
    for pid in children: assert os.waitpid(pid, 0)[1] == 0
# One who waits is refused when it will not wait.
fd = os.open(path, os.O_RDWR)
fcntl.lockf(fd, fcntl.LOCK_EX, 10, 5)
other = os.open(path, os.O_RDWR)
fcntl.flock(other, fcntl.LOCK_EX)
if os.fork() == 0:
    fd = os.open(path, os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 0)
    refused = 0
    try: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 14)
    except BlockingIOError: refused += 1
    try: fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError: refused += 1
    os._exit(0 if refused == 2 else 1)
assert os.wait()[1] == 0
print(open(path).read())
";

#[test]
fn locks_hold_between_the_guests_processes() {
    for mounted in every_cache() {
        let path = mounted.at.join("counter");
        let Some(said) = python(LOCKS, &[path.as_os_str()]) else {
            return;
        };
        assert_eq!(said, "800");
    }
}
