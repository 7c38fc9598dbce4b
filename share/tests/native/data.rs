//! The data of files, and what is expected of open ones.

use std::fs::{self, File, FileTimes};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use share::Options;

use crate::mount::Mounted;
use crate::programs::every_cache;

#[test]
fn a_file_may_be_larger_than_four_gibibytes_and_mostly_holes() {
    for mounted in every_cache() {
        const FAR: u64 = (5 << 30) + 4096;
        let path = mounted.at.join("sparse");
        let file = File::options()
            .create(true)
            .read(true)
            .write(true)
            .truncate(true)
            .open(&path);
        let mut file = file.unwrap();
        file.write_all_at(b"start", 0).unwrap();
        file.write_all_at(b"end", FAR).unwrap();
        file.sync_all().unwrap();
        assert_eq!(file.metadata().unwrap().len(), FAR + 3);
        assert!(file.metadata().unwrap().blocks() < 1024, "it has no holes");
        let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(0)).unwrap();
        assert!(hole > 0 && hole < FAR, "{hole}");
        let data = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(hole)).unwrap();
        assert!(data > hole && data <= FAR, "{data}");
        let mut end = String::new();
        file.seek(SeekFrom::Start(FAR)).unwrap();
        file.read_to_string(&mut end).unwrap();
        assert_eq!(end, "end");
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, flags, FAR & !4095, 4096).unwrap();
        let mut end = [1; 3];
        file.read_exact_at(&mut end, FAR).unwrap();
        assert_eq!(end, [0; 3]);
    }
}

#[test]
fn times_are_kept_to_the_nanosecond_before_1970_too() {
    for mounted in every_cache() {
        let path = mounted.at.join("file");
        let file = File::create(&path).unwrap();
        let accessed = UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789);
        let modified = UNIX_EPOCH - Duration::new(3, 999_999_999);
        let times = FileTimes::new()
            .set_accessed(accessed)
            .set_modified(modified);
        file.set_times(times).unwrap();
        drop(file);
        for path in [&path, &mounted.source.join("file")] {
            let metadata = fs::metadata(path).unwrap();
            assert_eq!(metadata.accessed().unwrap(), accessed);
            assert_eq!(metadata.modified().unwrap(), modified);
        }
    }
}

#[test]
fn several_writers_append_without_losing_a_line() {
    const LINES: usize = 200;
    for mounted in every_cache() {
        let path = mounted.at.join("log");
        thread::scope(|scope| {
            for writer in 0..4 {
                let path = &path;
                scope.spawn(move || {
                    let mut log = File::options()
                        .create(true)
                        .append(true)
                        .open(path)
                        .unwrap();
                    for line in 0..LINES {
                        log.write_all(format!("{writer} {line}\n").as_bytes())
                            .unwrap();
                    }
                });
            }
        });
        let content = fs::read_to_string(&path).unwrap();
        for writer in 0..4 {
            let start = format!("{writer} ");
            let lines: Vec<_> = content.lines().filter(|l| l.starts_with(&start)).collect();
            let expected: Vec<_> = (0..LINES).map(|line| format!("{writer} {line}")).collect();
            assert_eq!(lines, expected);
        }
    }
}

#[test]
fn what_the_host_appends_meanwhile_is_not_overwritten() {
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    let open = |path| {
        File::options()
            .create(true)
            .append(true)
            .open(path)
            .unwrap()
    };
    let mut guest = open(mounted.at.join("log"));
    let mut host = open(mounted.source.join("log"));
    for number in 0..50 {
        writeln!(guest, "guest {number}").unwrap();
        writeln!(host, "host {number}").unwrap();
    }
    let content = fs::read_to_string(mounted.source.join("log")).unwrap();
    for number in 0..50 {
        for who in ["guest", "host"] {
            let line = format!("{who} {number}");
            assert_eq!(content.lines().filter(|l| **l == line).count(), 1, "{line}");
        }
    }
}

#[test]
fn an_open_file_lives_on_without_its_name() {
    for mounted in every_cache() {
        let path = mounted.at.join("file");
        fs::write(&path, "old").unwrap();
        let open = File::options().read(true).write(true).open(&path).unwrap();
        fs::write(mounted.at.join("new"), "new").unwrap();
        fs::rename(mounted.at.join("new"), &path).unwrap();
        let mut old = [0; 3];
        open.read_exact_at(&mut old, 0).unwrap();
        assert_eq!(&old, b"old");
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(open.metadata().unwrap().nlink(), 0);

        let gone = File::options().read(true).write(true).open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        gone.write_all_at(b"more", 3).unwrap();
        gone.sync_all().unwrap();
        assert_eq!(gone.metadata().unwrap().len(), 7);
        gone.set_len(2).unwrap();
        assert_eq!(gone.metadata().unwrap().len(), 2);
        assert_eq!(fs::read_dir(&mounted.source).unwrap().count(), 0);
    }
}

#[test]
fn a_file_without_a_name_gets_one() {
    use rustix::fs::{AtFlags, CWD, Mode, OFlags};
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let file = rustix::fs::open(&mounted.at, flags, Mode::from_raw_mode(0o600)).unwrap();
    rustix::io::write(&file, b"content").unwrap();
    let from = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let to = mounted.at.join("named");
    rustix::fs::linkat(CWD, from, CWD, &to, AtFlags::SYMLINK_FOLLOW).unwrap();
    assert_eq!(fs::read_to_string(to).unwrap(), "content");
    assert_eq!(
        fs::read_to_string(mounted.source.join("named")).unwrap(),
        "content"
    );
}

#[test]
fn much_data_is_copied_as_it_is() {
    for mounted in every_cache() {
        let data: Vec<u8> = (0..5_000_000_u32).flat_map(u32::to_le_bytes).collect();
        fs::write(mounted.at.join("one"), &data).unwrap();
        fs::copy(mounted.at.join("one"), mounted.at.join("two")).unwrap();
        assert!(fs::read(mounted.at.join("two")).unwrap() == data);
        assert!(fs::read(mounted.source.join("two")).unwrap() == data);
    }
}

const SQLITE: &str = "
import sqlite3, sys, threading
path, mode = sys.argv[1:]
db = sqlite3.connect(path, timeout=60)
db.execute(f'pragma journal_mode={mode}')
db.execute('create table t (writer integer, number integer)')
db.commit()
def write(writer):
    db = sqlite3.connect(path, timeout=60)
    for number in range(25):
        db.execute('insert into t values (?, ?)', (writer, number))
        db.commit()
threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(db.execute('pragma integrity_check').fetchone()[0], db.execute('select count(*) from t').fetchone()[0])
";

#[test]
fn sqlite_keeps_its_databases_whole() {
    if Command::new("python3")
        .args(["-c", "import sqlite3"])
        .output()
        .map_or(true, |o| !o.status.success())
    {
        eprintln!("skipped: there is no Python with SQLite");
        return;
    }
    for mounted in every_cache() {
        for mode in ["wal", "delete"] {
            let path = mounted.at.join(mode);
            let output = Command::new("python3")
                .args(["-c", SQLITE])
                .arg(&path)
                .arg(mode)
                .output();
            let output = output.unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert_eq!(
                said.trim(),
                "ok 75",
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
}
