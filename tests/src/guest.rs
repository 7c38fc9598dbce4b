//! `mvm run` as a builder: what the machine is made of, then what runs in it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::host;
use crate::process::{Input, Output, Running};
use crate::user::User;

/// A machine that is yet to be started.
#[derive(Debug)]
pub struct Guest {
    program: Command,
    options: Vec<OsString>,
    has_host_root: bool,
    directory: Option<PathBuf>,
    boot_timeout: OsString,
    environment: Vec<(OsString, OsString)>,
    input: Input,
    output: Option<File>,
}

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}

impl Guest {
    /// A machine with the default kernel and, unless another one is asked for, the built-in root.
    pub fn new() -> Self {
        host::is_emulated();
        Self {
            program: Command::new(host::mvm()),
            options: Vec::new(),
            has_host_root: false,
            directory: None,
            // A busy machine that emulates takes its time; only a guest that hangs needs longer.
            boot_timeout: "170s".into(),
            environment: Vec::new(),
            input: Input::Bytes(Vec::new()),
            output: None,
        }
    }

    /// Adds an option without a value.
    pub fn flag(mut self, name: &str) -> Self {
        self.options.push(name.into());
        self
    }

    /// Adds an option with a value.
    pub fn option(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.options.push(name.into());
        self.options.push(value.as_ref().into());
        self
    }

    /// Boots this kernel.
    pub fn kernel(self, kernel: impl AsRef<OsStr>) -> Self {
        self.option("--kernel", kernel)
    }

    /// What `mvm run` makes by itself, where it is typed in `directory`: the host's own root.
    pub fn of_host(directory: &Path) -> Self {
        Self {
            has_host_root: true,
            directory: Some(directory.to_owned()),
            ..Self::new()
        }
    }

    /// Has `user` run it, whose environment is empty but for what is asked for.
    pub fn by(mut self, user: &User) -> Self {
        self.program = user.mvm();
        self.environment("XDG_CACHE_HOME", user.cache())
    }

    /// Takes this image for the root.
    pub fn rootfs(self, image: &Path) -> Self {
        self.option("--rootfs", image)
    }

    /// Takes this image for the root and leaves it as it is.
    pub fn rootfs_read_only(self, image: &Path) -> Self {
        self.option("--rootfs", read_only(image))
    }

    /// Attaches this image.
    pub fn disk(self, image: &Path) -> Self {
        self.option("--disk", image)
    }

    /// Attaches this image for reading.
    pub fn disk_read_only(self, image: &Path) -> Self {
        self.option("--disk", read_only(image))
    }

    /// Gives it so many CPUs.
    pub fn cpus(self, count: u32) -> Self {
        self.option("--cpus", count.to_string())
    }

    /// Gives it this much memory (`1G`).
    pub fn memory(self, size: &str) -> Self {
        self.option("--memory", size)
    }

    /// Adds to the kernel's command line.
    pub fn append(self, words: &str) -> Self {
        self.option("--append", words)
    }

    /// Gives up on the boot after this time (`8s`).
    pub fn boot_timeout(mut self, time: &str) -> Self {
        self.boot_timeout = time.into();
        self
    }

    /// Sets a variable in the environment of `mvm` itself.
    pub fn environment(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((name.into(), value.as_ref().into()));
        self
    }

    /// What `mvm` reads from its standard input; nothing, where this is not called.
    pub fn input(mut self, input: impl Into<Input>) -> Self {
        self.input = input.into();
        self
    }

    /// Where `mvm`'s standard output goes, instead of being collected.
    pub fn output(mut self, output: File) -> Self {
        self.output = Some(output);
        self
    }

    /// Runs a shell script in the machine.
    pub fn run(self, script: &str) -> Output {
        self.exec(&["sh", "-c", script])
    }

    /// Runs a command in the machine.
    pub fn exec(self, command: &[&str]) -> Output {
        self.start(command).wait()
    }

    /// Boots the machine without a command, and waits for its end.
    pub fn boot(self) -> Output {
        self.start(&[]).wait()
    }

    /// Starts the machine with a command, and does not wait.
    pub fn start(self, command: &[&str]) -> Running {
        let (process, input, output) = self.into_command(command);
        Running::start_to(process, input, output)
    }

    /// The words of `mvm run` for a machine with this command.
    pub fn arguments(&self, command: &[&str]) -> Vec<OsString> {
        let mut words = vec![
            "run".into(),
            "--boot-timeout".into(),
            self.boot_timeout.clone(),
        ];
        // Another one that is named later counts.
        let has_own = |option: &OsString| option == "--initrd" || option == "--console";
        if !self.has_host_root && !self.options.iter().any(has_own) {
            words.extend(["--rootfs", "none"].map(OsString::from));
        }
        words.extend_from_slice(&self.options);
        if !command.is_empty() {
            words.push("--".into());
            words.extend(command.iter().map(OsString::from));
        }
        words
    }

    fn into_command(self, command: &[&str]) -> (Command, Input, Option<File>) {
        let words = self.arguments(command);
        let mut process = self.program;
        process.args(words);
        if let Some(directory) = &self.directory {
            process.current_dir(directory);
        }
        process.envs(self.environment);
        (process, self.input, self.output)
    }
}

fn read_only(image: &Path) -> OsString {
    let mut value = image.as_os_str().to_owned();
    value.push(":ro");
    value
}
