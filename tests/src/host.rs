//! The host that the tests run on: the binary under test, the tools, and what can be skipped.

use std::env;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::process::{Output, POLL, Running};

/// The longest that any one step may take: an emulator on a busy machine is slow.
pub const LIMIT: Duration = Duration::from_secs(400);

/// The binary under test.
pub fn mvm() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let path = env::var_os("MVM_TEST_BINARY").map_or_else(
            || workspace().join("target/x86_64-unknown-linux-gnu/release/mvm"),
            PathBuf::from,
        );
        assert!(
            path.is_file(),
            "{} is not there: build it with `cargo build --release`, or name another in MVM_TEST_BINARY",
            path.display()
        );
        path
    })
}

/// The checkout.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests are a directory of the workspace")
}

/// Where the caller's caches are, and mvm keeps its kernels below, whatever HOME is for `mvm` itself.
pub fn cache() -> PathBuf {
    let typed = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    typed.unwrap_or_else(|| {
        let home = env::var_os("HOME").expect("there is a home");
        Path::new(&home).join(".cache")
    })
}

/// Runs a shell's commands in a directory of the host, which must succeed.
#[track_caller]
pub fn run_in(dir: &Path, script: &str) {
    let mut shell = Command::new("sh");
    shell.args(["-ec", script]).current_dir(dir);
    must_succeed(shell);
}

/// Runs `mvm` with `arguments` to its end.
pub fn run_mvm(arguments: &[&str]) -> Output {
    let mut command = Command::new(mvm());
    command.args(arguments);
    Running::start(command, Vec::new()).wait()
}

/// Runs `mvm` with `arguments`, which must succeed, and reads what it prints as JSON.
pub fn mvm_json(arguments: &[&str]) -> Value {
    let output = run_mvm(arguments);
    output.expect_code(0);
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{arguments:?} does not print JSON: {error}\n{output}"))
}

/// Whether machines run in the emulated outer Linux here; starts it, so that no test waits for it.
pub fn is_emulated() -> bool {
    static EMULATED: OnceLock<bool> = OnceLock::new();
    *EMULATED.get_or_init(|| {
        let emulated = env::var("MVM_ACCEL").is_ok_and(|accel| accel == "tcg")
            || mvm_json(&["accel", "status", "--format", "json"])["machines_run_by"] == "tcg";
        if emulated {
            run_mvm(&["accel", "start", "--yes"]).expect_code(0);
        }
        emulated
    })
}

/// Runs a shell script where machines run: in the outer Linux, or on the host itself.
pub fn run_beside_machines(script: &str) -> Output {
    Running::start(command_beside_machines(script), Vec::new()).wait()
}

/// A shell script that is to be run where machines run.
pub fn command_beside_machines(script: &str) -> Command {
    let mut command;
    if is_emulated() {
        command = Command::new(mvm());
        command.args(["accel", "exec", "--"]);
        command.args(["/bin/sh", "-c", script]);
    } else {
        command = Command::new("/bin/sh");
        command.args(["-c", script]);
    }
    command
}

/// `mvm` for a script of [`run_beside_machines`].
pub fn mvm_beside_machines() -> &'static str {
    if is_emulated() {
        "/dev/mvm/mvm"
    } else {
        mvm().to_str().expect("the binary's path is text")
    }
}

/// The tests' own server for guests, built beside the tests.
pub fn peer() -> PathBuf {
    let test = env::current_exe().expect("a test knows its own file");
    let dirs = test.ancestors().skip(1).take(2);
    let mut places = dirs.map(|dir| dir.join("peer"));
    places
        .find(|path| path.is_file())
        .expect("`peer` is built with the tests")
}

/// Polls `condition` until it gives something; `what` is said where it never does.
#[track_caller]
pub fn eventually<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    poll(condition).unwrap_or_else(|| panic!("never: {what}"))
}

/// Polls `condition` until it gives something, but no longer than any one step may take.
pub fn poll<T>(mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let found = condition();
        if found.is_some() || Instant::now() > deadline {
            return found;
        }
        thread::sleep(POLL);
    }
}

/// The path of a tool of the host; without it the test fails and names the package.
pub fn tool(name: &str, package: &str) -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .unwrap_or_else(|| panic!("{name} is missing: `apt-get install {package}`"))
}

/// A command of a tool of the host.
pub fn tool_command(name: &str, package: &str) -> Command {
    Command::new(tool(name, package))
}

/// Runs a tool of the host, which must succeed.
pub fn must_succeed(command: Command) {
    Running::start(command, Vec::new()).wait().expect_code(0);
}

/// Whether this process may do what root may.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Says that a test does not run here, and why, where the test harness does not hide it.
pub fn skipped(test: &str, reason: &str) {
    warn(&format!("SKIPPED {test}: {reason}"));
}

/// Says something where the test harness does not hide it.
pub fn warn(line: &str) {
    // Not eprintln: its output is shown of failing tests only.
    let _ = writeln!(std::io::stderr(), "{line}");
}
