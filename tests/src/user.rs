//! Somebody on the host without privileges, and `mvm` as they run it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::host;

/// A user by number. What they run of the outer Linux ends with this.
#[derive(Debug)]
pub struct User {
    id: u32,
    /// Has the program and its kernels, where they may read them.
    place: TempDir,
}

impl User {
    /// The user with this number, which no other test uses; nobody where this takes privileges that `test` has not.
    pub fn new(test: &str, id: u32) -> Option<Self> {
        if !host::is_root() {
            host::skipped(test, "it takes root to be somebody else");
            return None;
        }
        let place = tempfile::tempdir().expect("a temporary directory can be made");
        let user = Self { id, place };
        fs::copy(host::mvm(), user.program()).expect("the program can be copied");
        fs::create_dir(user.cache()).expect("a directory can be made");
        let mut copy = Command::new("cp");
        copy.arg("-aL")
            .arg(host::cache().join("mvm"))
            .arg(user.cache());
        host::must_succeed(copy);
        user.give(user.place.path());
        Some(user)
    }

    /// Makes a file, or a directory with all in it, theirs.
    pub fn give(&self, path: &Path) {
        let mut own = Command::new("chown");
        own.args(["-R", &format!("{0}:{0}", self.id)]).arg(path);
        host::must_succeed(own);
    }

    /// `mvm` as this user runs it, with nothing of the caller's environment but PATH.
    pub fn mvm(&self) -> Command {
        let mut command = host::tool_command("setpriv", "util-linux");
        command
            .args([
                &format!("--reuid={}", self.id),
                &format!("--regid={}", self.id),
                "--clear-groups",
            ])
            .arg(self.program())
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.place.path())
            .env("XDG_CACHE_HOME", self.cache())
            .current_dir(self.place.path());
        command
    }

    fn program(&self) -> PathBuf {
        self.place.path().join("mvm")
    }

    /// Where this user's caches are.
    pub fn cache(&self) -> PathBuf {
        self.place.path().join("cache")
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut stop = self.mvm();
        stop.args(["accel", "stop"]);
        // Where it was never started there is nothing to stop.
        if let Err(error) = stop.output() {
            host::warn(&format!("the outer Linux of {} is left: {error}", self.id));
        }
    }
}
