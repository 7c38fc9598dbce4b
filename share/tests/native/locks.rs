//! Locks that hold between guests and the host: two mounts of one directory stand for two guests.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use share::{Locking, Options};
use tempfile::TempDir;

use crate::mount::Mounted;
use crate::programs::{has, python};

/// One directory in two guests.
struct Two {
    source: TempDir,
    guests: [Mounted; 2],
    _at: [TempDir; 2],
}

impl Two {
    fn new() -> Option<Self> {
        let source = tempfile::tempdir().unwrap();
        let at = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let options = Options {
            locking: Locking::Host,
            ..Options::default()
        };
        let guest = |at: &TempDir| Mounted::of(source.path(), at.path(), options, None);
        let guests = [guest(&at[0])?, guest(&at[1])?];
        Some(Self {
            source,
            guests,
            _at: at,
        })
    }

    /// The same path on the host and in both guests.
    fn everywhere(&self, name: &str) -> [std::path::PathBuf; 3] {
        [self.source.path(), &self.guests[0].at, &self.guests[1].at].map(|dir| dir.join(name))
    }
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn a_lock_of_a_whole_file_keeps_out_the_host_and_other_guests() {
    let Some(two) = Two::new() else {
        return;
    };
    fs::write(two.source.path().join("file"), "").unwrap();
    let files = two.everywhere("file").map(|path| open(&path));
    for (number, holder) in files.iter().enumerate() {
        rustix::fs::flock(holder, FlockOperation::LockExclusive).unwrap();
        for (other, file) in files
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != number)
        {
            let refused = rustix::fs::flock(file, FlockOperation::NonBlockingLockShared);
            assert_eq!(refused, Err(Errno::AGAIN), "{other} while {number} has it");
        }
        rustix::fs::flock(holder, FlockOperation::Unlock).unwrap();
        for file in &files {
            rustix::fs::flock(file, FlockOperation::NonBlockingLockShared).unwrap();
        }
        for file in &files {
            rustix::fs::flock(file, FlockOperation::Unlock).unwrap();
        }
    }
    // Closing is giving up.
    let [host, guest, _] = &files;
    let again = open(&two.guests[0].at.join("file"));
    rustix::fs::flock(&again, FlockOperation::LockExclusive).unwrap();
    let refused = rustix::fs::flock(host, FlockOperation::NonBlockingLockExclusive);
    assert_eq!(refused, Err(Errno::AGAIN));
    drop(again);
    two.guests[0].until("a lock that was given up", || {
        rustix::fs::flock(host, FlockOperation::NonBlockingLockExclusive).is_ok()
    });
    let refused = rustix::fs::flock(guest, FlockOperation::NonBlockingLockExclusive);
    assert_eq!(refused, Err(Errno::AGAIN));
}

/// Holds a record lock until its standard input ends.
const HOLD: &str = "
import fcntl, os, sys
path, start, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = os.open(path, os.O_RDWR)
fcntl.lockf(fd, fcntl.LOCK_EX, length, start)
print('locked', flush=True)
sys.stdin.read()
";

/// Whether a record can be locked at once; who is in the way if not.
const TRY: &str = "
import fcntl, os, struct, sys
path, start, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = os.open(path, os.O_RDWR)
try:
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    print('free')
except BlockingIOError:
    lock = struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, start, length, 0)
    kind, _, start, length, _ = struct.unpack('hhqqi4x', fcntl.fcntl(fd, fcntl.F_GETLK, lock))
    print('taken', kind == fcntl.F_WRLCK, start, length)
";

/// A process that holds a lock, once it has it.
struct Holder(Child);

impl Holder {
    fn start(path: &Path, start: &str, length: &str) -> Self {
        let child = Command::new("python3")
            .args(["-c", HOLD])
            .arg(path)
            .args([start, length])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        Self(child.unwrap())
    }

    fn locked(mut self) -> Self {
        use std::io::Read;
        let mut said = [0; 7];
        self.0
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut said)
            .unwrap();
        assert_eq!(&said, b"locked\n");
        self
    }

    fn end(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success());
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn attempt(path: &Path, start: &str, length: &str) -> String {
    let arguments = [path.as_os_str(), OsStr::new(start), OsStr::new(length)];
    python(TRY, &arguments).unwrap()
}

#[test]
fn a_lock_of_a_record_keeps_out_the_host_and_other_guests() {
    let Some(two) = Two::new() else {
        return;
    };
    if !has("python3") {
        return;
    }
    fs::write(two.source.path().join("file"), "").unwrap();
    let paths = two.everywhere("file");
    for (number, path) in paths.iter().enumerate() {
        let holder = Holder::start(path, "10", "5").locked();
        for (other, path) in paths.iter().enumerate() {
            let who = format!("{other} while {number} has it");
            assert_eq!(attempt(path, "12", "100"), "taken True 10 5", "{who}");
            assert_eq!(attempt(path, "0", "10"), "free", "{who}");
            assert_eq!(attempt(path, "15", "0"), "free", "{who}");
        }
        holder.end();
        for path in &paths {
            assert_eq!(attempt(path, "0", "0"), "free");
        }
        // So does the death of who has it.
        let holder = Holder::start(path, "10", "0").locked();
        assert_eq!(attempt(&paths[0], "1000", "1"), "taken True 10 0");
        holder.kill();
        assert_eq!(attempt(&paths[0], "0", "0"), "free");
    }
}

#[test]
fn who_waits_for_a_lock_gets_it_when_it_is_given_up_and_may_stop_waiting() {
    let Some(two) = Two::new() else {
        return;
    };
    if !has("python3") {
        return;
    }
    fs::write(two.source.path().join("file"), "").unwrap();
    let [host, one, other] = two.everywhere("file");
    let holder = Holder::start(&host, "0", "0").locked();
    let waiting = Holder::start(&one, "0", "0");
    let stopped = Holder::start(&other, "0", "0");
    // They wait by now, and yet the guests' other requests are answered.
    std::thread::sleep(Duration::from_millis(300));
    for at in [&one, &other] {
        assert_eq!(fs::read(at).unwrap(), b"");
    }
    stopped.kill();
    holder.end();
    let waiting = waiting.locked();
    assert_eq!(attempt(&other, "0", "0"), "taken True 0 0");
    waiting.end();
    assert_eq!(attempt(&other, "0", "0"), "free");
}

/// Adds rows, one transaction each, and looks at how many there are meanwhile.
const SQLITE: &str = "
import random, sqlite3, sys, time
path, mode, writer, rows = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def connect():
    return sqlite3.connect(path, timeout=0 if mode == 'wal' else 120, isolation_level=None)
def prepare(db):
    # The index of a write-ahead log is memory that all its users share: across kernels there is none.
    if mode == 'wal': db.execute('pragma locking_mode=exclusive')
    db.execute(f'pragma journal_mode={mode}')
    db.execute('create table if not exists t (writer integer, number integer, total integer)')
def add(db, number):
    db.execute('begin immediate')
    total = db.execute('select count(*) from t').fetchone()[0]
    assert db.execute('select coalesce(max(total), -1) from t').fetchone()[0] == total - 1
    db.execute('insert into t values (?, ?, ?)', (writer, number, total))
    db.execute('commit')
def alone(number):
    # Closed whatever happens: one that is left to the garbage collector goes on to hold its locks.
    db = connect()
    try:
        prepare(db)
        add(db, number)
        return True
    except sqlite3.OperationalError as error:
        # Two that have read and wait to write would wait for each other.
        assert 'locked' in str(error), error
        return False
    finally:
        db.close()
if mode == 'wal':
    for number in range(rows):
        while not alone(number): time.sleep(random.uniform(0, 0.1))
else:
    db = connect()
    prepare(db)
    for number in range(rows): add(db, number)
";

const CHECK: &str = "
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=60)
print(db.execute('pragma integrity_check').fetchone()[0])
print(*db.execute('select count(*), count(distinct total), count(distinct writer) from t').fetchone())
";

#[test]
fn sqlite_is_written_by_two_guests_and_the_host_at_the_same_time() {
    const ROWS: usize = 15;
    let Some(two) = Two::new() else {
        return;
    };
    if python("import sqlite3", &[]).is_none() {
        return;
    }
    for mode in ["delete", "truncate", "wal"] {
        let paths = two.everywhere(mode);
        let writers = paths.iter().enumerate().map(|(number, path)| {
            Command::new("python3")
                .args(["-c", SQLITE])
                .arg(path)
                .args([mode, &number.to_string(), &ROWS.to_string()])
                .stderr(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        });
        let writers: Vec<_> = writers.collect();
        for writer in writers {
            let output = writer.wait_with_output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{mode}: {stderr}");
        }
        for path in &paths {
            let said = python(CHECK, &[path.as_os_str()]).unwrap();
            assert_eq!(said, format!("ok\n{0} {0} 3", 3 * ROWS), "{mode}");
        }
    }
}
