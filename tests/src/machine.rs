//! Machines that live on: `mvm run -d`, and the verbs that reach them.
//!
//! Each test has a state directory of its own, so that it sees no machines but its own, and every
//! machine in it is removed when the test ends, however it ends. Names are unique for all tests that
//! run, as sockets and locks are in one directory with those of the outer Linux.

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::guest::Guest;
use crate::host;
use crate::process::{Input, Output, Running};

/// A state directory, and the machines in it.
#[derive(Debug)]
pub struct Machines {
    state: TempDir,
}

impl Default for Machines {
    fn default() -> Self {
        Self::new()
    }
}

impl Machines {
    /// None yet.
    pub fn new() -> Self {
        host::is_emulated();
        Self {
            state: tempfile::tempdir().expect("a temporary directory can be made"),
        }
    }

    /// A name that no other machine has.
    pub fn fresh_name(&self, stem: &str) -> String {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        format!("{stem}-{}-{count}", std::process::id())
    }

    /// `mvm` with these words, for these machines.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(host::mvm());
        command
            .args(words)
            .env("XDG_STATE_HOME", self.state.path())
            .env_remove("SSH_AUTH_SOCK");
        command
    }

    /// Runs `mvm` with these words to its end.
    pub fn mvm(&self, words: &[&str]) -> Output {
        Running::start(self.command(words), Vec::new()).wait()
    }

    /// Runs `mvm` with these words, which must succeed, and reads what it prints as JSON.
    pub fn json(&self, words: &[&str]) -> Value {
        let output = self.mvm(words);
        output.expect_code(0);
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{words:?} does not print JSON: {error}\n{output}"))
    }

    /// The same guest as one of these machines, in the background.
    pub fn guest(&self, guest: Guest) -> Guest {
        let state = self.state.path().to_str().expect("the path is text");
        guest.flag("-d").environment("XDG_STATE_HOME", state)
    }

    /// Starts a machine in the background; its command runs when this returns.
    #[track_caller]
    pub fn run(&self, guest: Guest, command: &[&str]) -> Machine<'_> {
        let name = self.fresh_name("e2e");
        let output = self.guest(guest).option("--name", &name).exec(command);
        output.expect_code(0).expect_stdout(&format!("{name}\n"));
        Machine {
            machines: self,
            name,
        }
    }

    /// Starts a machine in the background that does nothing.
    #[track_caller]
    pub fn idle(&self, guest: Guest) -> Machine<'_> {
        self.run(guest, &["sleep", "1000000"])
    }

    /// One of them, by its name.
    pub fn named(&self, name: &str) -> Machine<'_> {
        Machine {
            machines: self,
            name: name.to_owned(),
        }
    }

    /// The names and states that `mvm ps` lists, all or only those that run.
    pub fn listed(&self, all: bool) -> Vec<(String, String)> {
        let mut words = vec!["ps", "--format", "json"];
        if all {
            words.push("-a");
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let list = self.json(&words);
        let list = list.as_array().expect("machines are listed in an array");
        list.iter()
            .map(|machine| (text(&machine["name"]), text(&machine["status"])))
            .collect()
    }

    /// The directory of what is kept of them.
    pub fn state_dir(&self) -> &Path {
        self.state.path()
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        let machines = self.state.path().join("mvm/machines");
        let entries = fs::read_dir(machines).into_iter().flatten().flatten();
        let names: Vec<_> = entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| !name.starts_with('.'))
            .collect();
        if names.is_empty() {
            return;
        }
        let mut words = vec!["rm", "-f"];
        words.extend(names.iter().map(String::as_str));
        // A test that failed must not fail again in here, and one that did not has said what it wanted.
        match self.command(&words).output() {
            Ok(output) if output.status.success() => {}
            other => host::warn(&format!("machines {names:?} are left: {other:?}")),
        }
    }
}

/// A machine in the background.
#[derive(Debug, Clone)]
pub struct Machine<'a> {
    machines: &'a Machines,
    name: String,
}

impl fmt::Display for Machine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Machine<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `mvm VERB NAME WORDS…`, where VERB may be two words.
    pub fn command(&self, verb: &str, words: &[&str]) -> Command {
        let verbs: Vec<_> = verb.split(' ').collect();
        let mut command = self.machines.command(&verbs);
        command.arg(&self.name).args(words);
        command
    }

    /// Runs `mvm VERB NAME WORDS…` to its end.
    pub fn mvm(&self, verb: &str, words: &[&str]) -> Output {
        Running::start(self.command(verb, words), Vec::new()).wait()
    }

    /// A shell script in it.
    pub fn exec_command(&self, options: &[&str], words: &[&str]) -> Command {
        let mut command = self.machines.command(&["exec"]);
        command.args(options).arg(&self.name).arg("--").args(words);
        command
    }

    /// Runs a shell script in it to its end.
    pub fn exec(&self, script: &str) -> Output {
        let command = self.exec_command(&[], &["sh", "-c", script]);
        Running::start(command, Vec::new()).wait()
    }

    /// Starts a command in it.
    pub fn start(&self, words: &[&str]) -> Running {
        Running::start(self.exec_command(&[], words), Vec::new())
    }

    /// Runs a command in it with this input to its end.
    pub fn feed(&self, words: &[&str], input: impl Into<Input>) -> Output {
        Running::start(self.exec_command(&["-i"], words), input).wait()
    }

    /// Puts a file of this content into it, executable.
    pub fn plant(&self, path: &str, content: Vec<u8>) {
        let script = "cat >\"$0\" && chmod +x \"$0\"";
        self.feed(&["sh", "-c", script, path], content)
            .expect_code(0);
    }

    /// Puts the tests' own server into it, at `/tmp/peer`.
    pub fn plant_peer(&self) {
        let peer = fs::read(host::peer()).expect("the peer can be read");
        self.plant("/tmp/peer", peer);
    }

    /// Starts the tests' own server in it, and waits until it listens.
    #[track_caller]
    pub fn peer(&self, mode: &str, at: &str) -> Running {
        let running = self.start(&["/tmp/peer", mode, at]);
        running.expect_stdout("listening\n");
        running
    }

    /// What `mvm inspect` tells of it.
    pub fn inspect(&self) -> Value {
        let told = self
            .machines
            .json(&["inspect", "--format", "json", &self.name]);
        match told {
            Value::Array(mut list) if list.len() == 1 => list.remove(0),
            other => other,
        }
    }

    /// What `mvm ps -a` calls its state; empty where it does not list it.
    pub fn state(&self) -> String {
        let list = self.machines.listed(true);
        let found = list.into_iter().find(|(name, _)| *name == self.name);
        found.map(|(_, state)| state).unwrap_or_default()
    }

    /// The process that owns it.
    #[track_caller]
    pub fn supervisor(&self) -> Pid {
        let told = self.inspect();
        let pid = told["owner"]["pid"]
            .as_i64()
            .and_then(|pid| pid.try_into().ok());
        pid.and_then(Pid::from_raw)
            .unwrap_or_else(|| panic!("no process owns {}: {told}", self.name))
    }

    /// Kills the process that owns it, and waits until that is gone.
    pub fn kill_supervisor(&self) {
        let pid = self.supervisor();
        kill_process(pid, Signal::KILL).expect("the supervisor can be killed");
        host::eventually("the supervisor is gone", || {
            let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_pid()));
            let runs = status.is_ok_and(|status| !status.contains("State:\tZ"));
            (!runs).then_some(())
        });
    }

    /// Its control socket.
    pub fn control_socket(&self) -> PathBuf {
        let dir = match env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
            Some(dir) if dir.is_absolute() && dir.is_dir() => dir.join("mvm"),
            _ => PathBuf::from(format!("/tmp/mvm-{}", rustix::process::getuid().as_raw())),
        };
        dir.join("machines").join(format!("{}.sock", self.name))
    }

    /// What `mvm port ls` lists.
    pub fn ports(&self) -> Vec<Value> {
        let list = self.mvm("port ls", &["--format", "json"]);
        list.expect_code(0);
        let list: Value = serde_json::from_slice(&list.stdout)
            .unwrap_or_else(|error| panic!("port ls does not print JSON: {error}\n{list}"));
        list.as_array().expect("forwards are an array").clone()
    }

    /// The host's port at which this port of the guest is published.
    #[track_caller]
    pub fn port_of(&self, guest: &str) -> u16 {
        self.find_port_of(guest)
            .unwrap_or_else(|| panic!("{guest} is not published: {:?}", self.ports()))
    }

    /// As [`Machine::port_of`]; None where it is not published.
    pub fn find_port_of(&self, guest: &str) -> Option<u16> {
        let ports = self.ports();
        let forward = ports.iter().find(|forward| {
            forward["direction"] == "to-guest" && forward["guest"].as_str() == Some(guest)
        })?;
        let host = forward["host"].as_str()?;
        host.rsplit(':').next()?.parse().ok()
    }

    /// Waits until `mvm ps` says that it is in this state.
    #[track_caller]
    pub fn expect_state(&self, state: &str) {
        let mut is = String::new();
        let reached = host::poll(|| {
            is = self.state();
            (is == state).then_some(())
        });
        assert!(reached.is_some(), "{} is {is:?}, not {state:?}", self.name);
    }
}
