//! Running a process with everything bounded and nothing lost: its output is collected as it comes,
//! it is killed by its id when it takes too long, and a failed expectation shows all it said.

use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::host::{self, LIMIT};

/// How often a condition without a notification is looked at.
pub const POLL: Duration = Duration::from_millis(50);

/// In the environment of every process that a test starts, and so of all that those start.
const MARK_VARIABLE: &str = "MVM_TEST_MARK";

/// What a process writes, as far as it has come.
#[derive(Debug, Clone, Default)]
pub struct Capture(Arc<(Mutex<Captured>, Condvar)>);

#[derive(Debug, Default)]
struct Captured {
    bytes: Vec<u8>,
    ended: bool,
}

impl Capture {
    /// Takes more of it.
    pub fn push(&self, bytes: &[u8]) {
        let (captured, changed) = &*self.0;
        let mut captured = captured.lock().unwrap_or_else(PoisonError::into_inner);
        captured.bytes.extend_from_slice(bytes);
        changed.notify_all();
    }

    /// There is no more to come.
    pub fn end(&self) {
        let (captured, changed) = &*self.0;
        let mut captured = captured.lock().unwrap_or_else(PoisonError::into_inner);
        captured.ended = true;
        changed.notify_all();
    }

    /// All of it so far.
    pub fn bytes(&self) -> Vec<u8> {
        let captured = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        captured.bytes.clone()
    }

    /// Waits for `text` at or after the byte `from`; the byte after it, or None where it does not come.
    pub fn wait_for(&self, from: usize, text: &str, limit: Duration) -> Option<usize> {
        let deadline = Instant::now() + limit;
        let (captured, changed) = &*self.0;
        let mut captured = captured.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let rest = captured.bytes.get(from..).unwrap_or_default();
            if let Some(at) = find(rest, text.as_bytes()) {
                return Some(from + at + text.len());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if captured.ended || left.is_zero() {
                return None;
            }
            captured = changed
                .wait_timeout(captured, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn collect(&self, mut from: impl Read + Send + 'static) -> JoinHandle<()> {
        let capture = self.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(len @ 1..) = from.read(&mut buffer) {
                capture.push(&buffer[..len]);
            }
            capture.end();
        })
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}

/// What a process is given to read.
#[derive(Debug)]
pub enum Input {
    /// These bytes, then the end.
    Bytes(Vec<u8>),
    /// A file.
    File(File),
    /// Nothing, and no end until the process does.
    Open,
}

impl From<File> for Input {
    fn from(file: File) -> Self {
        Self::File(file)
    }
}

impl From<Vec<u8>> for Input {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}

/// A process that runs.
#[derive(Debug)]
pub struct Running {
    shown: String,
    child: Child,
    mark: Mark,
    stdout: Capture,
    stderr: Capture,
    readers: Vec<JoinHandle<()>>,
    /// The process's own directory for temporary files.
    temporary: TempDir,
    /// Kept open where the process is to find no end of its input.
    input: Option<std::process::ChildStdin>,
}

impl Running {
    /// Starts `command` with `input`; its output is collected, or goes where `command` says it goes.
    pub fn start(command: Command, input: impl Into<Input>) -> Self {
        Self::start_to(command, input.into(), None)
    }

    /// As [`Running::start`], with standard output going to `stdout`.
    pub fn start_to(mut command: Command, input: Input, stdout: Option<File>) -> Self {
        let temporary = tempfile::tempdir().expect("a temporary directory can be made");
        let mark = Mark::fresh();
        mark.put_on(&mut command);
        command.env("TMPDIR", temporary.path());
        command.stderr(Stdio::piped());
        command.stdout(stdout.map_or_else(Stdio::piped, Stdio::from));
        let (stdin, bytes) = match input {
            Input::Bytes(bytes) => (Stdio::piped(), Some(bytes)),
            Input::File(file) => (file.into(), None),
            Input::Open => (Stdio::piped(), None),
        };
        command.stdin(stdin);
        let shown = format!("{command:?}");
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{shown} cannot be started: {error}"));
        let (stdout, stderr) = (Capture::default(), Capture::default());
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            readers.push(stdout.collect(pipe));
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(stderr.collect(pipe));
        }
        let mut input = child.stdin.take();
        if let Some(bytes) = bytes
            && let Some(mut pipe) = input.take()
        {
            // A process that reads nothing must not hold up the test.
            thread::spawn(move || drop(pipe.write_all(&bytes)));
        }
        Self {
            shown,
            child,
            mark,
            stdout,
            stderr,
            readers,
            temporary,
            input,
        }
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// What its processes can be told by.
    pub fn mark(&self) -> &Mark {
        &self.mark
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal)
            .unwrap_or_else(|error| panic!("{} cannot be signalled: {error}", self.shown));
    }

    /// Writes to its standard input, which has to be [`Input::Open`].
    pub fn write(&mut self, bytes: &[u8]) {
        let input = self.input.as_mut().expect("the input was left open");
        input.write_all(bytes).expect("the process reads its input");
    }

    /// Waits until it has written `text` to standard output.
    pub fn expect_stdout(&self, text: &str) {
        self.expect_in(&self.stdout, "standard output", text);
    }

    /// Waits until it has written `text` to standard error.
    pub fn expect_stderr(&self, text: &str) {
        self.expect_in(&self.stderr, "standard error", text);
    }

    /// What it has written to standard output so far.
    pub fn said_so_far(&self) -> String {
        String::from_utf8_lossy(&self.stdout.bytes()).into_owned()
    }

    /// What it has written to standard error so far.
    pub fn errors_so_far(&self) -> String {
        String::from_utf8_lossy(&self.stderr.bytes()).into_owned()
    }

    /// How many whole lines it has written to standard output.
    pub fn stdout_lines(&self) -> usize {
        let bytes = self.stdout.bytes();
        bytes.iter().filter(|&&byte| byte == b'\n').count()
    }

    /// Waits until it has written more than `before` lines to standard output; the one after those.
    pub fn expect_line(&self, before: usize) -> String {
        self.expect_line_within(before, LIMIT)
    }

    /// As [`Running::expect_line`], where a line may take so long.
    pub fn expect_line_within(&self, before: usize, limit: Duration) -> String {
        let mut from = 0;
        for _ in 0..=before {
            match self.stdout.wait_for(from, "\n", limit) {
                Some(after) => from = after,
                None => panic!("no line {before} comes from {}", self.so_far()),
            }
        }
        let text = String::from_utf8_lossy(&self.stdout.bytes()[..from]).into_owned();
        text.lines().next_back().unwrap_or_default().to_owned()
    }

    fn expect_in(&self, capture: &Capture, name: &str, text: &str) {
        if capture.wait_for(0, text, LIMIT).is_none() {
            panic!("{text:?} does not appear on {name} of {}", self.so_far());
        }
    }

    fn so_far(&self) -> String {
        show(
            &self.shown,
            None,
            &self.stdout.bytes(),
            &self.stderr.bytes(),
        )
    }

    /// Waits for its end and collects what it said.
    pub fn wait(self) -> Output {
        self.wait_at_most(LIMIT)
    }

    /// As [`Running::wait`], for what is known to take longer.
    pub fn wait_at_most(mut self, limit: Duration) -> Output {
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            if Instant::now() > deadline {
                let so_far = self.so_far();
                panic!("no end after {} s: {so_far}", limit.as_secs());
            }
            thread::sleep(POLL);
        };
        for reader in std::mem::take(&mut self.readers) {
            reader.join().expect("readers do not panic");
        }
        Output {
            shown: self.shown.clone(),
            status,
            stdout: self.stdout.bytes(),
            stderr: self.stderr.bytes(),
            mark: self.mark.clone(),
            temporary: files_in(self.temporary.path()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Where the test failed. Both fail only where it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a process left when it ended.
#[derive(Debug)]
pub struct Output {
    shown: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
    mark: Mark,
    temporary: Vec<String>,
}

impl Output {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The exit code, or 128+N after signal N, as a shell has it.
    pub fn code(&self) -> i32 {
        let signal = self.status.signal().unwrap_or(0);
        self.status.code().unwrap_or(128 + signal)
    }

    /// The exit code must be this.
    #[track_caller]
    pub fn expect_code(&self, code: i32) -> &Self {
        assert_eq!(self.code(), code, "the exit code of {self}");
        self
    }

    /// Standard output must be exactly this.
    #[track_caller]
    pub fn expect_stdout(&self, text: &str) -> &Self {
        assert_eq!(self.text(), text, "the standard output of {self}");
        self
    }

    /// Standard error must be exactly this, besides mvm's line about starting an outer Linux.
    #[track_caller]
    pub fn expect_stderr(&self, text: &str) -> &Self {
        let errors = self.errors();
        let own: Vec<&str> = errors
            .split_inclusive('\n')
            .filter(|line| !line.contains("(starting it once)"))
            .collect();
        assert_eq!(own.concat(), text, "the standard error of {self}");
        self
    }

    /// Standard output must have this in it.
    #[track_caller]
    pub fn expect_in_stdout(&self, text: &str) -> &Self {
        assert!(
            self.text().contains(text),
            "no {text:?} on the standard output of {self}"
        );
        self
    }

    /// Standard error must have this in it.
    #[track_caller]
    pub fn expect_in_stderr(&self, text: &str) -> &Self {
        assert!(
            self.errors().contains(text),
            "no {text:?} on the standard error of {self}"
        );
        self
    }

    /// No process of it may remain, here or beside the machines, and no temporary file.
    #[track_caller]
    pub fn expect_nothing_left(&self) -> &Self {
        let left = self.mark.left_over();
        assert!(left.is_empty(), "processes {left:?} are left of {self}");
        assert!(
            self.temporary.is_empty(),
            "temporary files {:?} are left of {self}",
            self.temporary
        );
        self
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&show(
            &self.shown,
            Some(self.status),
            &self.stdout,
            &self.stderr,
        ))
    }
}

fn show(command: &str, status: Option<ExitStatus>, stdout: &[u8], stderr: &[u8]) -> String {
    /// A test's report is read by people.
    const SHOWN: usize = 16 << 10;
    let part = |bytes: &[u8]| {
        let from = bytes.len().saturating_sub(SHOWN);
        String::from_utf8_lossy(&bytes[from..]).into_owned()
    };
    let status = match status {
        None => "still running".to_owned(),
        Some(status) => match status.signal() {
            Some(signal) => format!("killed by signal {signal}"),
            None => status.to_string(),
        },
    };
    format!(
        "{command} ({status})\n--- standard output\n{}\n--- standard error\n{}\n---",
        part(stdout),
        part(stderr)
    )
}

/// What tells the processes of one command from all others: a variable in their environment.
#[derive(Debug, Clone)]
pub struct Mark(String);

impl Mark {
    /// A mark that no other process has.
    pub fn fresh() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self(format!("{}-{count}", std::process::id()))
    }

    /// Marks what `command` will start.
    pub fn put_on(&self, command: &mut Command) {
        command.env(MARK_VARIABLE, &self.0);
    }

    /// The processes with this mark that still run, here or beside the machines; waits for their end.
    pub fn left_over(&self) -> Vec<String> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let mut left = marked_here(&self.0);
            if host::is_emulated() {
                left.extend(self.beside_machines());
            }
            if left.is_empty() || Instant::now() > deadline {
                return left;
            }
            thread::sleep(POLL);
        }
    }

    /// The processes with this mark in the outer Linux: their ids and command lines.
    pub fn beside_machines(&self) -> Vec<String> {
        // One process for all: where machines are emulated each costs time. It fails where none is found.
        let script = format!(
            "for environ in $(grep -lzx {MARK_VARIABLE}={} /proc/[0-9]*/environ 2>/dev/null); do \
               process=${{environ%/environ}}; \
               echo \"${{process#/proc/}} $(tr '\\0' ' ' <$process/cmdline)\"; \
             done; true",
            self.0
        );
        let output = host::run_beside_machines(&script);
        output.expect_code(0);
        output.text().lines().map(str::to_owned).collect()
    }
}

fn marked_here(mark: &str) -> Vec<String> {
    let wanted = format!("{MARK_VARIABLE}={mark}");
    let processes = fs::read_dir("/proc").expect("/proc can be read");
    processes
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|process| {
            // Most of what is under /proc is no process, or another user's.
            let environment = fs::read(process.join("environ")).unwrap_or_default();
            environment
                .split(|&byte| byte == 0)
                .any(|item| item == wanted.as_bytes())
        })
        .map(|process| {
            let command = fs::read(process.join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            format!("{} {command}", process.display())
        })
        // The outer Linux belongs to all; it came from whichever command was first.
        .filter(|process| !process.contains("accel supervise") && !process.contains("qemu"))
        .collect()
}

fn files_in(dir: &std::path::Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a temporary directory can be read");
    entries
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect()
}
