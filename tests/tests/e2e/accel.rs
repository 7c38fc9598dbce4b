//! The outer Linux: started once, used by all, mended when it dies, gone when nobody uses it.
//!
//! Each test has a copy of the binary, and with it an outer Linux that no other test uses.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tests::host::{self, LIMIT};
use tests::process::POLL;
use tests::{Output, Running};

struct Copy {
    dir: TempDir,
    program: PathBuf,
}

impl Copy {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("mvm");
        fs::copy(host::mvm(), &program).unwrap();
        Self { dir, program }
    }

    fn start(&self, words: &[&str]) -> Running {
        let mut command = Command::new(&self.program);
        command
            .args(words)
            .current_dir(self.dir.path())
            .env("MVM_ACCEL", "tcg");
        Running::start(command, Vec::new())
    }

    fn mvm(&self, words: &[&str]) -> Output {
        self.start(words).wait()
    }

    fn outer(&self) -> Value {
        let output = self.mvm(&["accel", "status", "--format", "json"]);
        output.expect_code(0);
        let status: Value = serde_json::from_slice(&output.stdout).unwrap();
        status["outer"].clone()
    }

    fn supervisor(&self) -> Pid {
        let outer = self.outer();
        let pid = outer["pid"]
            .as_i64()
            .unwrap_or_else(|| panic!("no outer Linux runs: {outer}"));
        Pid::from_raw(pid.try_into().unwrap()).unwrap()
    }

    /// QEMU's process id: the supervisor's only child.
    fn qemu(&self) -> Pid {
        let supervisor = self.supervisor().as_raw_pid();
        let children = fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"));
        let children = children.expect("the supervisor's children are known");
        let pid = children
            .split_whitespace()
            .next()
            .expect("the supervisor has a child");
        Pid::from_raw(pid.parse().unwrap()).unwrap()
    }

    #[track_caller]
    fn expect_gone(&self, pid: Pid) {
        let deadline = Instant::now() + LIMIT;
        // A process that nobody has waited for yet has ended all the same.
        let runs = || {
            let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_pid()));
            status.is_ok_and(|status| !status.contains("State:\tZ"))
        };
        while runs() {
            assert!(Instant::now() < deadline, "process {pid:?} is left");
            thread::sleep(POLL);
        }
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // Where the test failed; it is not running where it did not.
        let _ = Command::new(&self.program).args(["accel", "stop"]).output();
    }
}

/// The words of a machine that says `word`.
fn echo(word: &str) -> [&str; 8] {
    [
        "run",
        "--rootfs",
        "none",
        "--boot-timeout",
        "170s",
        "--",
        "echo",
        word,
    ]
}

#[test]
fn the_outer_linux_is_started_once_and_stopped() {
    if !host::is_emulated() {
        host::skipped(
            "the_outer_linux_is_started_once_and_stopped",
            "KVM works here",
        );
        return;
    }
    let copy = Copy::new();
    assert!(
        copy.outer().is_null(),
        "an outer Linux runs before any was started"
    );
    let first = copy.mvm(&echo("first"));
    first
        .expect_code(0)
        .expect_stdout("first\n")
        .expect_in_stderr("slow");
    let (supervisor, qemu) = (copy.supervisor(), copy.qemu());
    let second = copy.mvm(&echo("second"));
    second
        .expect_code(0)
        .expect_stdout("second\n")
        .expect_stderr("");
    assert!(
        !second.errors().contains("starting"),
        "it was started again: {second}"
    );
    assert_eq!(
        copy.supervisor(),
        supervisor,
        "the supervisor after a second command"
    );

    copy.mvm(&["accel", "stop"]).expect_code(0);
    copy.expect_gone(supervisor);
    copy.expect_gone(qemu);
    assert!(
        copy.outer().is_null(),
        "an outer Linux runs after it was stopped"
    );
    copy.mvm(&["accel", "stop"])
        .expect_code(0)
        .expect_in_stdout("not running");
}

#[test]
fn a_command_in_the_outer_linux_finds_the_hosts_files_and_surroundings() {
    if !host::is_emulated() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "from the host\n").unwrap();
    let mut command = Command::new(host::mvm());
    command
        .current_dir(dir.path())
        .env("A_VARIABLE", "its value");
    command.args(["accel", "exec", "--", "sh", "-c"]);
    command.arg("cat file -; echo $A_VARIABLE; pwd; echo back >answer; echo err >&2; exit 9");
    let output = Running::start(command, b"input\n".to_vec()).wait();
    let expected = format!(
        "from the host\ninput\nits value\n{}\n",
        dir.path().display()
    );
    output
        .expect_code(9)
        .expect_stdout(&expected)
        .expect_stderr("err\n");
    assert_eq!(
        fs::read_to_string(dir.path().join("answer")).unwrap(),
        "back\n"
    );
}

#[test]
fn an_outer_linux_that_dies_is_told_and_replaced() {
    if !host::is_emulated() {
        host::skipped(
            "an_outer_linux_that_dies_is_told_and_replaced",
            "KVM works here",
        );
        return;
    }
    let copy = Copy::new();
    copy.mvm(&["accel", "start"]).expect_code(0);
    let (supervisor, qemu) = (copy.supervisor(), copy.qemu());
    let running = copy.start(&[
        "accel",
        "exec",
        "--",
        "sh",
        "-c",
        "echo up; exec sleep 1000",
    ]);
    running.expect_stdout("up");
    kill_process(qemu, Signal::KILL).unwrap();
    running
        .wait()
        .expect_code(125)
        .expect_in_stderr("outer Linux ended unexpectedly");
    copy.expect_gone(supervisor);

    copy.mvm(&["accel", "exec", "--", "echo", "again"])
        .expect_code(0)
        .expect_stdout("again\n");
    let (supervisor, qemu) = (copy.supervisor(), copy.qemu());
    kill_process(supervisor, Signal::KILL).unwrap();
    copy.expect_gone(qemu);
    assert!(
        copy.outer().is_null(),
        "an outer Linux is said to run without its supervisor"
    );
}

#[test]
fn an_outer_linux_that_nobody_uses_ends_by_itself() {
    if !host::is_emulated() {
        host::skipped(
            "an_outer_linux_that_nobody_uses_ends_by_itself",
            "KVM works here",
        );
        return;
    }
    let copy = Copy::new();
    copy.mvm(&["accel", "start"]).expect_code(0);
    let (supervisor, qemu) = (copy.supervisor(), copy.qemu());
    copy.expect_gone(supervisor);
    copy.expect_gone(qemu);
    assert!(
        copy.outer().is_null(),
        "an outer Linux is said to run after it has ended"
    );
}
