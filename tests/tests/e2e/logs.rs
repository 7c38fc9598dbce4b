//! What a machine's command wrote: kept byte for byte, followed, cut by time and by size.

use std::fs;
use std::io;
use std::path::Path;

use tests::host::eventually;
use tests::{Guest, Machines, Running};

#[test]
fn output_is_kept_byte_for_byte_each_stream_apart() {
    let machines = Machines::new();
    let script = "printf 'no newline'; printf 'a\\0b\\377\\r\\n'; echo err >&2; \
                  for i in 1 2 3; do echo out $i; echo err $i >&2; done; exec sleep 1000000";
    let guest = Guest::new().option("--append", "loglevel=7");
    let machine = machines.run(guest, &["sh", "-c", script]);
    let wanted = b"no newlinea\0b\xff\r\nout 1\nout 2\nout 3\n";
    let output = eventually("all of it is in the log", || {
        let output = machine.mvm("logs", &[]);
        output.expect_code(0);
        (output.stdout.len() >= wanted.len() && output.errors().ends_with("err 3\n"))
            .then_some(output)
    });
    assert_eq!(output.stdout, wanted, "{output}");
    assert_eq!(output.errors(), "err\nerr 1\nerr 2\nerr 3\n", "{output}");
    // What a command of `exec` writes is its caller's.
    machine.exec("echo not for the log").expect_code(0);
    assert_eq!(machine.mvm("logs", &[]).stdout, wanted);

    let console = machine.mvm("logs", &["--console"]);
    console.expect_code(0).expect_in_stdout("Linux version");
}

#[test]
fn a_log_is_followed_until_the_machine_ends() {
    let machines = Machines::new();
    let script = "echo first; until [ -e /tmp/go ]; do sleep 1; done; echo second; \
                  until [ -e /tmp/end ]; do sleep 1; done; echo third";
    let machine = machines.run(Guest::new(), &["sh", "-c", script]);
    let follower = Running::start(machine.command("logs", &["-f"]), Vec::new());
    follower.expect_stdout("first\n");
    machine.exec("touch /tmp/go").expect_code(0);
    follower.expect_stdout("second\n");
    machine.exec("touch /tmp/end").expect_code(0);
    follower
        .wait()
        .expect_code(0)
        .expect_stdout("first\nsecond\nthird\n");
    machine.expect_state("exited");
    // It is there after the machine, and `-f` has nothing to wait for.
    machine
        .mvm("logs", &["-f"])
        .expect_stdout("first\nsecond\nthird\n");
}

#[test]
fn a_log_can_be_cut_by_time() {
    let machines = Machines::new();
    let script =
        "echo before; until [ -e /tmp/go ]; do sleep 1; done; echo after; exec sleep 1000000";
    let machine = machines.run(Guest::new(), &["sh", "-c", script]);
    eventually("the first line is there", || {
        (machine.mvm("logs", &[]).text() == "before\n").then_some(())
    });
    // The record is stamped to less than a second, and so is this.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let now = Running::start(
        {
            let mut command = std::process::Command::new("date");
            command.args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]);
            command
        },
        Vec::new(),
    )
    .wait();
    let now = now.text().trim().to_owned();
    machine.exec("touch /tmp/go").expect_code(0);
    eventually("the second line is there", || {
        machine
            .mvm("logs", &[])
            .text()
            .ends_with("after\n")
            .then_some(())
    });
    machine
        .mvm("logs", &["--since", &now])
        .expect_code(0)
        .expect_stdout("after\n");
    machine
        .mvm("logs", &["--since", "1h"])
        .expect_stdout("before\nafter\n");
    machine
        .mvm("logs", &["--since", "yesterday-ish"])
        .expect_code(2)
        .expect_in_stderr("--since");
}

#[test]
fn a_log_that_grows_is_rotated_and_loses_only_its_beginning() {
    let machines = Machines::new();
    // 45 MB: more than the three files of 10 MB that are kept.
    let script = "seq 10000000000001 10000003000000; echo done; exec sleep 1000000";
    let machine = machines.run(Guest::new(), &["sh", "-c", script]);
    let log = eventually("the last line is there", || {
        let tail = machine.mvm("logs", &["--since", "5s"]);
        let all = || machine.mvm("logs", &[]);
        (tail.text().ends_with("done\n") || tail.text().is_empty())
            .then(all)
            .filter(|output| output.text().ends_with("done\n"))
    });
    let text = log.text();
    assert!(text.len() > 15_000_000, "{} bytes are kept", text.len());
    let lines: Vec<&str> = text.lines().collect();
    let (last, lines) = lines.split_last().unwrap();
    assert_eq!(*last, "done");
    // The first line may be cut; all others follow each other without a gap up to the end.
    let numbers: Vec<u64> = lines[1..]
        .iter()
        .map(|line| line.parse().unwrap())
        .collect();
    assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]));
    assert_eq!(numbers.last(), Some(&10_000_003_000_000));
    let kept = size(
        &machines
            .state_dir()
            .join("mvm/machines")
            .join(machine.name()),
    )
    .unwrap();
    assert!(kept < 45 << 20, "{kept} bytes are kept on disk");
}

/// The size of all files below `path`.
fn size(path: &Path) -> io::Result<u64> {
    let meta = fs::symlink_metadata(path)?;
    if !meta.is_dir() {
        return Ok(meta.len());
    }
    fs::read_dir(path)?.map(|entry| size(&entry?.path())).sum()
}
