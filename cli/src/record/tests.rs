//! Records: what is written is what is read, whatever rotates, is torn, is full, or ends meanwhile.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;

use proptest::prelude::*;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;

use super::cursor::{Cursor, Found};
use super::*;

const SMALL: Set = Set {
    name: "log",
    patience: Duration::from_secs(60),
    max_file: 1000,
};

type Seen = Vec<(Stream, Vec<u8>)>;

fn all(dir: &TempDir, set: Set, since: Option<SystemTime>) -> Seen {
    let mut seen = Seen::new();
    let read = read(dir.path(), set, since, false, &mut |stream, data| {
        seen.push((stream, data.to_vec()));
        Ok(())
    });
    read.unwrap();
    seen
}

fn text(seen: &Seen, wanted: Stream) -> String {
    let of_it = seen.iter().filter(|(stream, _)| *stream == wanted);
    let bytes: Vec<u8> = of_it.flat_map(|(_, data)| data.clone()).collect();
    String::from_utf8(bytes).unwrap()
}

fn files(dir: &TempDir) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir.path()).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn what_is_printed_is_read_byte_for_byte_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let writer = Writer::open(dir.path(), LOG).unwrap();
    writer.write(Stream::Stdout, b"out \xff\0");
    writer.write(Stream::Stderr, b"err\r\n");
    writer.write(Stream::Stdout, b"");
    writer.write(Stream::Terminal, b"\x1b[2J");
    drop(writer);
    let expected: Seen = vec![
        (Stream::Stdout, b"out \xff\0".to_vec()),
        (Stream::Stderr, b"err\r\n".to_vec()),
        (Stream::Terminal, b"\x1b[2J".to_vec()),
    ];
    assert_eq!(all(&dir, LOG, None), expected);
    let writer = Writer::open(dir.path(), LOG).unwrap();
    writer.write(Stream::Stdout, b"again");
    drop(writer);
    assert_eq!(all(&dir, LOG, None).len(), 4);
}

#[test]
fn what_is_longer_than_a_record_becomes_several() {
    let dir = tempfile::tempdir().unwrap();
    let printed: Vec<u8> = (0..3 * MAX_DATA + 5).map(|at| at as u8).collect();
    let writer = Writer::open(dir.path(), LOG).unwrap();
    writer.write(Stream::Stdout, &printed);
    drop(writer);
    let seen = all(&dir, LOG, None);
    assert_eq!(seen.len(), 4);
    let joined: Vec<u8> = seen.into_iter().flat_map(|(_, data)| data).collect();
    assert!(joined == printed, "the bytes differ");
}

#[test]
fn files_rotate_and_the_last_records_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let writer = Writer::open(dir.path(), SMALL).unwrap();
    for line in 0..500 {
        writer.write(Stream::Stdout, format!("line {line:04}\n").as_bytes());
    }
    drop(writer);
    let names: Vec<_> = files(&dir)
        .iter()
        .map(|path| path.file_name().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["log", "log.1", "log.2"]);
    for path in files(&dir) {
        assert!(fs::metadata(&path).unwrap().len() <= SMALL.max_file);
    }
    let lines = text(&all(&dir, SMALL, None), Stream::Stdout);
    let kept = lines.lines().count();
    assert!(kept > 2 * 1000 / 24, "{kept} lines");
    let expected: String = (500 - kept..500)
        .map(|line| format!("line {line:04}\n"))
        .collect();
    assert_eq!(lines, expected);
}

#[test]
fn only_what_came_since_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let writer = Writer::open(dir.path(), LOG).unwrap();
    writer.write(Stream::Stdout, b"before");
    thread::sleep(Duration::from_millis(20));
    let since = SystemTime::now();
    writer.write(Stream::Stdout, b"after");
    drop(writer);
    assert_eq!(text(&all(&dir, LOG, Some(since)), Stream::Stdout), "after");
    let later = SystemTime::now() + Duration::from_secs(60);
    assert_eq!(all(&dir, LOG, Some(later)), []);
    assert_eq!(all(&dir, LOG, Some(UNIX_EPOCH)).len(), 2);
}

#[test]
fn sets_in_one_directory_do_not_mix() {
    let dir = tempfile::tempdir().unwrap();
    let log = Writer::open(dir.path(), LOG).unwrap();
    let mut console = Writer::open(dir.path(), CONSOLE).unwrap();
    log.write(Stream::Stdout, b"output");
    console.write_all(b"kernel").unwrap();
    drop((log, console));
    assert_eq!(text(&all(&dir, LOG, None), Stream::Stdout), "output");
    assert_eq!(text(&all(&dir, CONSOLE, None), Stream::Console), "kernel");
}

/// Reads with `follow` in a thread, passing on what it gets.
fn follow(dir: &TempDir, set: Set) -> (mpsc::Receiver<(Stream, Vec<u8>)>, thread::JoinHandle<()>) {
    let (sender, receiver) = mpsc::channel();
    let dir = dir.path().to_owned();
    let follower = thread::spawn(move || {
        let done = read(&dir, set, None, true, &mut |stream, data| {
            Ok(sender.send((stream, data.to_vec()))?)
        });
        done.unwrap();
    });
    (receiver, follower)
}

fn next(receiver: &mpsc::Receiver<(Stream, Vec<u8>)>) -> Vec<u8> {
    let received = receiver.recv_timeout(Duration::from_secs(60));
    received.expect("nothing more was read").1
}

#[test]
fn who_follows_sees_what_comes_and_ends_with_the_writer() {
    let dir = tempfile::tempdir().unwrap();
    let writer = Writer::open(dir.path(), LOG).unwrap();
    writer.write(Stream::Stdout, b"first");
    let (receiver, follower) = follow(&dir, LOG);
    assert_eq!(next(&receiver), b"first");
    writer.write(Stream::Stdout, b"second");
    assert_eq!(next(&receiver), b"second");
    writer.write(Stream::Stdout, b"last");
    drop(writer);
    assert_eq!(next(&receiver), b"last");
    assert!(receiver.recv_timeout(Duration::from_secs(60)).is_err());
    follower.join().unwrap();
}

#[test]
fn who_follows_misses_nothing_where_files_rotate() {
    let dir = tempfile::tempdir().unwrap();
    let writer = Writer::open(dir.path(), SMALL).unwrap();
    let (receiver, follower) = follow(&dir, SMALL);
    // Each answer is waited for, so that no file is put away before it was read.
    for line in 0..400 {
        let line = format!("line {line:04}\n").into_bytes();
        writer.write(Stream::Stdout, &line);
        assert_eq!(next(&receiver), line);
    }
    drop(writer);
    follower.join().unwrap();
}

#[test]
fn who_follows_and_is_too_slow_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let writer = Writer::open(dir.path(), SMALL).unwrap();
    writer.write(Stream::Stdout, b"first");
    let (held, seen) = (Arc::new(Mutex::new(())), Arc::new(Mutex::new(Seen::new())));
    let (started, waiting) = mpsc::channel();
    let hold = held.lock().unwrap();
    let follower = thread::spawn({
        let (path, held, seen) = (dir.path().to_owned(), held.clone(), seen.clone());
        move || {
            let done = read(&path, SMALL, None, true, &mut |stream, data| {
                let _ = started.send(());
                drop(held.lock());
                seen.lock().unwrap().push((stream, data.to_vec()));
                Ok(())
            });
            done.unwrap();
        }
    });
    waiting.recv_timeout(Duration::from_secs(60)).unwrap();
    for line in 0..500 {
        writer.write(Stream::Stdout, format!("line {line:04}\n").as_bytes());
    }
    drop(writer);
    drop(hold);
    follower.join().unwrap();
    let seen = seen.lock().unwrap();
    assert!(
        text(&seen, Stream::Note).contains("put away"),
        "nothing was told"
    );
    assert!(text(&seen, Stream::Stdout).ends_with("line 0499\n"));
}

#[test]
fn a_machine_that_does_not_run_has_nothing_to_follow() {
    let dir = tempfile::tempdir().unwrap();
    follow(&dir, LOG).1.join().unwrap();
    drop(Writer::open(dir.path(), LOG).unwrap());
    follow(&dir, LOG).1.join().unwrap();
}

#[test]
fn a_torn_record_is_skipped_and_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let writer = Writer::open(dir.path(), LOG).unwrap();
    writer.write(Stream::Stdout, b"whole");
    writer.write(Stream::Stdout, b"torn");
    drop(writer);
    let len = fs::metadata(&path).unwrap().len();
    for cut in 1..4 + HEADER as u64 {
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(len - cut)
            .unwrap();
        assert_eq!(
            text(&all(&dir, LOG, None), Stream::Stdout),
            "whole",
            "{cut}"
        );
    }
    let writer = Writer::open(dir.path(), LOG).unwrap();
    writer.write(Stream::Stdout, b" more");
    drop(writer);
    assert_eq!(text(&all(&dir, LOG, None), Stream::Stdout), "whole more");
}

#[test]
fn zeroes_that_a_crash_of_the_host_left_are_written_over() {
    let dir = tempfile::tempdir().unwrap();
    drop(Writer::open(dir.path(), LOG).unwrap());
    fs::write(dir.path().join("log"), [0; 5000]).unwrap();
    assert_eq!(all(&dir, LOG, None), []);
    let writer = Writer::open(dir.path(), LOG).unwrap();
    writer.write(Stream::Stdout, b"new");
    drop(writer);
    assert_eq!(text(&all(&dir, LOG, None), Stream::Stdout), "new");
}

#[test]
fn something_else_in_the_place_of_a_log_is_an_error_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    assert!(read(dir.path(), LOG, None, true, &mut |_, _| Ok(())).is_err());
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    assert!(read(dir.path(), LOG, None, false, &mut |_, _| Ok(())).is_err());
}

#[test]
fn what_cannot_be_written_is_counted_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    fs::create_dir(&path).unwrap();
    let writer = Writer::open(dir.path(), LOG).unwrap();
    for _ in 0..10 {
        writer.write(Stream::Stdout, b"lost for good");
        writer.flush();
    }
    fs::remove_dir(&path).unwrap();
    writer.write(Stream::Stdout, b"found");
    drop(writer);
    let seen = all(&dir, LOG, None);
    assert!(
        text(&seen, Stream::Note).starts_with("130 bytes of output were lost"),
        "{seen:?}"
    );
    assert_eq!(text(&seen, Stream::Stdout), "found");
}

/// The name of the test below, for the process that it starts: what it limits is the whole process's.
const FULL_DISK: &str = "record::tests::a_full_disk_loses_records_and_tears_none";
const FULL_DISK_DIR: &str = "MVM_TEST_FULL_DISK";

#[test]
fn a_full_disk_loses_records_and_tears_none() {
    let Some(inner) = std::env::var_os(FULL_DISK_DIR) else {
        let dir = tempfile::tempdir().unwrap();
        let test = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", FULL_DISK])
            .env(FULL_DISK_DIR, dir.path())
            .output()
            .unwrap();
        assert!(
            test.status.success(),
            "{}",
            String::from_utf8_lossy(&test.stdout)
        );
        let seen = all(&dir, LOG, None);
        let (out, notes) = (text(&seen, Stream::Stdout), text(&seen, Stream::Note));
        // 100 records of 23 bytes fit into 2345 bytes, and the rest of 500 does not.
        let expected: String = (0..101).map(|n| format!("line {n:03}!\n")).collect();
        assert_eq!(out, expected + "there is room again\n");
        assert!(
            notes.starts_with("3990 bytes of output were lost: "),
            "{notes}"
        );
        return;
    };
    // The signal that goes with the limit would end the process.
    let caught = Arc::new(std::sync::atomic::AtomicBool::new(false));
    signal_hook::flag::register(25, caught).unwrap();
    let limit = getrlimit(Resource::Fsize);
    let writer = Writer::open(inner.as_ref(), LOG).unwrap();
    let small = Rlimit {
        current: Some(2345),
        maximum: limit.maximum,
    };
    setrlimit(Resource::Fsize, small).unwrap();
    for line in 0..500 {
        writer.write(Stream::Stdout, format!("line {line:03}!\n").as_bytes());
    }
    writer.flush();
    setrlimit(Resource::Fsize, limit).unwrap();
    writer.write(Stream::Stdout, b"there is room again\n");
}

#[test]
fn a_disk_that_does_not_keep_up_does_not_hold_up_the_console() {
    // Nobody empties this queue.
    let dir = tempfile::tempdir().unwrap();
    let writer = Writer::open(dir.path(), CONSOLE).unwrap();
    let printed = vec![b'x'; MAX_DATA];
    for _ in 0..64 {
        writer.write(Stream::Console, &printed);
    }
    drop(writer);
    let seen = all(&dir, CONSOLE, None);
    let kept = seen
        .iter()
        .filter(|(stream, _)| *stream == Stream::Console)
        .count();
    let lost: usize = text(&seen, Stream::Note)
        .lines()
        .map(|note| note.split_once(' ').unwrap().0.parse::<usize>().unwrap())
        .sum();
    // Rotation puts some away; what was lost is told in the last note.
    assert!(
        kept >= 1 && kept + lost / MAX_DATA <= 64,
        "{kept} kept, {lost} bytes lost"
    );
}

proptest! {
    #[test]
    fn whatever_a_file_holds_is_read_in_bounds(content in prop::collection::vec(any::<u8>(), 0..4096)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, &content).unwrap();
        let mut cursor = Cursor::new(File::open(&path).unwrap());
        let mut sum = 0;
        while let Found::Record { data, .. } = cursor.next().unwrap() {
            sum += HEADER + data.len();
        }
        prop_assert!(sum <= content.len());
        prop_assert_eq!(cursor.position(), sum as u64);
    }

    #[test]
    fn records_before_a_cut_or_damage_are_read(
        pieces in prop::collection::vec((1u8..6, prop::collection::vec(any::<u8>(), 0..200)), 0..20),
        cut in any::<prop::sample::Index>(),
        damage in prop::option::of(any::<u8>()),
    ) {
        let mut content = Vec::new();
        let mut ends = Vec::new();
        for (stream, data) in &pieces {
            let stream = Stream::from_byte(*stream).unwrap();
            content.extend_from_slice(&Header::now(stream, data.len()).encode());
            content.extend_from_slice(data);
            ends.push(content.len());
        }
        let cut = cut.index(content.len() + 1);
        content.truncate(cut);
        if let Some(damage) = damage {
            content.extend_from_slice(&[damage; 3]);
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("log"), &content).unwrap();
        let seen = all(&dir, LOG, None);
        let whole = ends.iter().filter(|end| **end <= cut).count();
        prop_assert!(seen.len() >= whole);
        for ((stream, data), (read_stream, read_data)) in pieces.iter().zip(&seen).take(whole) {
            prop_assert_eq!(*stream, *read_stream as u8);
            prop_assert_eq!(data, read_data);
        }
    }
}
