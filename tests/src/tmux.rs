//! A program under tmux: keys go in, and the screen that comes of it is read.

use std::process::Command;

use tempfile::TempDir;

use crate::host::{self, tool};
use crate::process::{Output, Running};

/// A tmux server with one window, which ends with it.
#[derive(Debug)]
pub struct Tmux {
    dir: TempDir,
}

impl Tmux {
    /// Starts `command` in a window of this size. When it has ended, the screen says `ended with` and its exit
    /// code.
    pub fn start(command: &Command, columns: u16, rows: u16) -> Self {
        let tmux = Self {
            dir: tempfile::tempdir().expect("a temporary directory can be made"),
        };
        let mut server = tmux.tmux();
        server.args(["set-option", "-g", "default-terminal", "screen-256color"]);
        server.args([";", "new-session", "-d", "-s", "test"]);
        server.args(["-x", &columns.to_string(), "-y", &rows.to_string()]);
        for (name, value) in command.get_envs() {
            if let (Some(name), Some(value)) = (name.to_str(), value.and_then(|v| v.to_str())) {
                server.arg("-e").arg(format!("{name}={value}"));
            }
        }
        // What tmux itself says of a program that has ended does not come every time: a shell says it.
        server.args(["sh", "-c", r#""$@"; echo "ended with $?"; read -r _"#, "sh"]);
        server.arg(command.get_program()).args(command.get_args());
        Running::start(server, Vec::new()).wait().expect_code(0);
        tmux
    }

    fn tmux(&self) -> Command {
        let mut command = Command::new(tool("tmux", "tmux"));
        command.env_remove("TMUX").env("LC_ALL", "C.UTF-8");
        command.args(["-u", "-f", "/dev/null", "-S"]);
        command.arg(self.dir.path().join("socket"));
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        let mut command = self.tmux();
        command.args(words);
        let output = Running::start(command, Vec::new()).wait();
        output.expect_code(0);
        output
    }

    /// Types text as it is.
    pub fn type_text(&self, text: &str) {
        self.run(&["send-keys", "-t", "test", "-l", text]);
    }

    /// Presses a key that has a name in tmux: `Enter`, `Escape`, `C-z`.
    pub fn press(&self, key: &str) {
        self.run(&["send-keys", "-t", "test", key]);
    }

    /// Gives the window another size.
    pub fn resize(&self, columns: u16, rows: u16) {
        let (columns, rows) = (columns.to_string(), rows.to_string());
        self.run(&["resize-window", "-t", "test", "-x", &columns, "-y", &rows]);
    }

    /// The lines on the screen.
    pub fn screen(&self) -> Vec<String> {
        let output = self.run(&["capture-pane", "-t", "test", "-p"]);
        output.text().lines().map(str::to_owned).collect()
    }

    /// The same with the escape sequences of its colours.
    pub fn coloured_screen(&self) -> String {
        self.run(&["capture-pane", "-t", "test", "-p", "-e"]).text()
    }

    /// Waits until the screen is as `condition` wants it, which `what` says in words.
    #[track_caller]
    pub fn expect(&self, what: &str, condition: impl Fn(&[String]) -> bool) -> Vec<String> {
        let found = host::poll(|| Some(self.screen()).filter(|lines| condition(lines)));
        found.unwrap_or_else(|| panic!("{what}: not on the screen\n{}", self.screen().join("\n")))
    }

    /// Waits until a line of the screen has `text` in it.
    #[track_caller]
    pub fn expect_text(&self, text: &str) {
        self.expect(text, |lines| lines.iter().any(|line| line.contains(text)));
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        // The test may have ended it already.
        let _ = self.tmux().arg("kill-server").output();
    }
}
