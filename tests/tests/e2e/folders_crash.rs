//! Machines that are killed while they write to a shared folder, and several that write to one.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;
use tests::host::{self, eventually};
use tests::python::has_python;
use tests::{Guest, Machines};

/// A guest that has the host's programs, and `dir` at `/project`.
fn with_python(dir: &TempDir, options: &str) -> Guest {
    Guest::new()
        .memory("512M")
        .option("--rootfs", "/")
        .option("-v", format!("{}:/project{options}", dir.path().display()))
}

/// Commits row after row, and says which.
const WRITER: &str = "
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=120, isolation_level=None)
db.execute(f'pragma journal_mode={sys.argv[2]}')
db.execute('pragma synchronous=full')
db.execute('create table if not exists t (number integer, filler blob)')
for number in range(1_000_000):
    db.execute('insert into t values (?, randomblob(3000))', (number,))
    print(number, flush=True)
";

const CHECK: &str = "
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
print(db.execute('pragma integrity_check').fetchone()[0])
print(db.execute('select count(*), coalesce(max(number), -1) from t').fetchone())
";

/// Whether a database is whole, how many rows it has, and the number of the last.
fn check(path: &Path) -> (String, usize, usize) {
    let output = Command::new("python3")
        .args(["-c", CHECK])
        .arg(path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let digits = |text: &str| {
        text.chars()
            .filter(char::is_ascii_digit)
            .collect::<String>()
    };
    let mut lines = said.lines();
    let whole = lines.next().unwrap_or_default().to_owned();
    let mut numbers = lines.next().unwrap_or_default().split(',').map(digits);
    let mut number = || {
        numbers
            .next()
            .and_then(|text| text.parse().ok())
            .unwrap_or(usize::MAX)
    };
    (whole, number(), number())
}

#[test]
fn a_database_is_whole_and_has_all_that_was_committed_when_its_machine_is_killed() {
    const ENOUGH: usize = 10;
    if !has_python("a_database_is_whole_…_when_its_machine_is_killed") {
        return;
    }
    let machines = Machines::new();
    for (mode, options) in [("delete", ""), ("wal", ":cache=private")] {
        let dir = tempfile::tempdir().unwrap();
        let machine = machines.idle(with_python(&dir, options));
        let writer = machine.start(&["python3", "-c", WRITER, "/project/db", mode]);
        eventually("some rows are committed", || {
            (writer.stdout_lines() > ENOUGH).then_some(())
        });
        machine.kill_supervisor();
        let committed = writer.wait().text().lines().count();
        let (whole, rows, last) = check(&dir.path().join("db"));
        assert_eq!(whole, "ok", "{mode}{options}");
        assert_eq!(rows, last + 1, "{mode}{options}");
        // The last commit may have been done and not said.
        assert!(
            rows >= committed && committed > ENOUGH,
            "{mode}{options}: {rows} rows, {committed} said"
        );
    }
}

#[test]
fn what_was_synced_is_there_when_the_machine_is_killed() {
    let machines = Machines::new();
    for options in ["", ":cache=strict", ":cache=private"] {
        let dir = tempfile::tempdir().unwrap();
        let folder = format!("{}:/project{options}", dir.path().display());
        let machine = machines.idle(Guest::new().option("-v", folder));
        let writer = machine.start(&[
            "sh",
            "-c",
            "mkdir /project/dir; n=0; while :; do
                # The folder may end a moment before this does.
                seq $n 20000 | dd of=/project/dir/$n bs=64k conv=fsync 2>/dev/null || exit
                echo $n; n=$((n + 1))
            done",
        ]);
        eventually("some files are synced", || {
            (writer.stdout_lines() > 5).then_some(())
        });
        machine.kill_supervisor();
        let said = writer.wait().text();
        for number in said.lines() {
            let content = fs::read_to_string(dir.path().join("dir").join(number)).unwrap();
            let first: usize = number.parse().unwrap();
            assert!(
                content.lines().eq((first..=20000).map(|n| n.to_string())),
                "{options}: {number}"
            );
        }
        assert!(said.lines().count() > 5);
    }
}

/// Adds rows, one transaction each, and looks at how many there are meanwhile.
const COUNTER: &str = "
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=170, isolation_level=None)
for number in range(int(sys.argv[3])):
    db.execute('begin immediate')
    total = db.execute('select count(*) from t').fetchone()[0]
    assert db.execute('select coalesce(max(number), -1) from t').fetchone()[0] == total - 1
    db.execute('insert into t values (?, ?)', (total, sys.argv[2]))
    db.execute('commit')
print('done')
";

#[test]
fn two_machines_and_the_host_write_one_database_at_the_same_time() {
    const ROWS: usize = 5;
    if !has_python("two_machines_and_the_host_write_one_database_at_the_same_time") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let create = "import sqlite3, sys
sqlite3.connect(sys.argv[1]).execute('create table t (number integer, writer text)')";
    let mut python = Command::new("python3");
    python.args(["-c", create]).arg(&path);
    host::must_succeed(python);
    let machines = Machines::new();
    let guests = [(); 2].map(|()| machines.idle(with_python(&dir, ":locks=host")));
    let rows = ROWS.to_string();
    let writers = ["one", "two"];
    let writers: Vec<_> = guests
        .iter()
        .zip(writers)
        .map(|(guest, name)| guest.start(&["python3", "-c", COUNTER, "/project/db", name, &rows]))
        .collect();
    let mut host = Command::new("python3");
    host.args(["-c", COUNTER]).arg(&path).args(["host", &rows]);
    host::must_succeed(host);
    for writer in writers {
        writer.wait().expect_code(0).expect_stdout("done\n");
    }
    assert_eq!(check(&path), ("ok".into(), 3 * ROWS, 3 * ROWS - 1));
}
