//! Compiles the kernel that `config/x86_64.config` describes from the distribution's source
//! package.
//!
//! Everything happens in a staging directory of the cache, which vanishes when a step fails. The
//! compiler's output goes to `build.log` in the cache. The kernel's time stamp, user and host are
//! fixed, so that the same source and the same compiler give the same kernel.

mod source;
mod tools;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use thiserror::Error;

use crate::cache::{self, Cache, CacheError, CachedKernel, Description, Source};
use crate::check::{self, Purpose};
use crate::config::Config;
use crate::deb::DebError;
use crate::elf::{self, ElfError};
use crate::package::{Client, Consent, PackageError, Packages, Wanted};
use crate::progress::{Progress, Unit};
use crate::version;

/// What is on beyond `make tinyconfig`, and why.
pub const FRAGMENT: &str = include_str!("../../config/x86_64.config");

const SOURCE_PREFIX: &str = "linux-source-";
/// Bytes that the unpacked source and the objects take.
const SPACE: u64 = 2 << 30;
/// Commands that `make` announces for this configuration, which only the progress bar needs.
const COMMANDS: u64 = 2593;
/// Lines of the compiler's output that an error shows.
const SHOWN_LINES: usize = 12;
const LOG: &str = "build.log";

/// Why no kernel was built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// Programs or headers are missing.
    #[error("a kernel build needs {missing}; install with: {command}")]
    Tools {
        /// What is missing.
        missing: String,
        /// What installs it.
        command: String,
    },
    /// There is not enough room.
    #[error("a kernel build needs {needed} MiB in {path}, where {free} MiB are free")]
    Space {
        /// MiB needed.
        needed: u64,
        /// MiB free.
        free: u64,
        /// The cache.
        path: PathBuf,
    },
    /// The source package could not be had.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The source package could not be unpacked.
    #[error("the package {name} could not be unpacked: {source}")]
    Deb {
        /// The package.
        name: String,
        /// Why.
        #[source]
        source: DebError,
    },
    /// There is no kernel source in the package.
    #[error("the package {0} holds no kernel source")]
    NoSource(String),
    /// A step of the build failed.
    #[error("`{command}` failed ({status}); the whole output is in {log}:\n{output}")]
    Make {
        /// What was run.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines of its output.
        output: String,
        /// The file with all of it.
        log: PathBuf,
    },
    /// The kernel's configuration tool dropped options.
    #[error("this kernel's source does not accept: {0}")]
    Options(String),
    /// The kernel that came out lacks something.
    #[error("the kernel that was built lacks: {0}")]
    Lacks(String),
    /// The kernel that came out is none.
    #[error("the kernel that was built cannot be booted: {0}")]
    Elf(#[from] ElfError),
    /// A file could not be used.
    #[error("{path} could not be used")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The cache could not be written.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    let path = path.to_owned();
    move |source| BuildError::Io { path, source }
}

/// What to build.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// The source package; by default the `linux-source-VERSION` with the highest version.
    pub package: Option<String>,
    /// Options beyond [`FRAGMENT`], in the form of a `.config`; they win over it.
    pub extra: String,
    /// Compilers at a time; by default one for each CPU.
    pub jobs: Option<usize>,
}

/// Builds a kernel and puts it into the cache. Takes minutes.
///
/// # Errors
/// When something that is needed is missing, or a step fails; nothing but the log is left behind.
pub fn build(
    cache: &Cache,
    options: &Options,
    consent: Consent,
    progress: &dyn Progress,
) -> Result<CachedKernel, BuildError> {
    build_with(Client::find()?, cache, options, consent, progress)
}

/// As [`build`], through the package client `client`.
///
/// # Errors
/// As [`build`].
pub fn build_with(
    client: Client,
    cache: &Cache,
    options: &Options,
    consent: Consent,
    progress: &dyn Progress,
) -> Result<CachedKernel, BuildError> {
    let packages = Packages::new(client, cache, consent);
    require_space(cache)?;
    tools::require(&packages, consent, progress)?;
    let _lock = cache.exclusive("build")?;
    let stage = cache.stage()?;
    let work = stage.path().join("work");
    fs::create_dir(&work).map_err(io_error(&work))?;

    let wanted = match &options.package {
        Some(name) => Wanted::Named {
            names: vec![name.clone()],
            prefix: SOURCE_PREFIX,
        },
        None => Wanted::Newest(SOURCE_PREFIX),
    };
    let found = packages.obtain(&wanted, None, &work, &mut |_, _| false, progress)?;
    let Some(package) = found.into_iter().next() else {
        return Err(BuildError::NoSource(SOURCE_PREFIX.to_owned()));
    };
    let tree = source::unpack(&package, &work.join("linux"), progress)?;
    let log = cache.root().join(LOG);
    let make = Make::new(&tree, log, options.jobs)?;
    let config = configure(&make, &options.extra, progress)?;
    compile(&make, stage.path(), progress)?;
    verify(&config, &stage.path().join(cache::VMLINUX))?;
    let release = release(&make)?;
    let target = stage.path().join(cache::CONFIG);
    fs::copy(make.dir.join(".config"), &target).map_err(io_error(&target))?;
    fs::remove_dir_all(&work).map_err(io_error(&work))?;
    let kernel = stage.publish(Description {
        version: release,
        source: Source::Built,
        package: Some(package.name),
        package_version: Some(package.version),
    })?;
    progress.finish();
    Ok(kernel)
}

fn require_space(cache: &Cache) -> Result<(), BuildError> {
    let path = cache.root();
    let stat = rustix::fs::statvfs(path)
        .map_err(io::Error::from)
        .map_err(io_error(path))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free >= SPACE {
        return Ok(());
    }
    Err(BuildError::Space {
        needed: SPACE >> 20,
        free: free >> 20,
        path: path.to_owned(),
    })
}

/// Writes `.config` and makes sure that every option that was asked for took.
fn configure(make: &Make, extra: &str, progress: &dyn Progress) -> Result<Config, BuildError> {
    progress.step("Configuring the kernel", None, Unit::Items);
    make.run(&["tinyconfig"], &mut || {})?;
    let path = make.dir.join(".config");
    let mut file = File::options()
        .append(true)
        .open(&path)
        .map_err(io_error(&path))?;
    write!(file, "\n{FRAGMENT}\n{extra}\n").map_err(io_error(&path))?;
    make.run(&["olddefconfig"], &mut || {})?;
    let text = fs::read_to_string(&path).map_err(io_error(&path))?;
    let config = Config::parse(&text);
    let dropped = config.differences(&Config::parse(&format!("{FRAGMENT}\n{extra}")));
    if dropped.is_empty() {
        Ok(config)
    } else {
        Err(BuildError::Options(dropped.join(", ")))
    }
}

/// Compiles, and puts the stripped kernel into `dir`.
fn compile(make: &Make, dir: &Path, progress: &dyn Progress) -> Result<(), BuildError> {
    progress.step("Compiling the kernel", Some(COMMANDS), Unit::Items);
    let mut commands = 0;
    make.run(&["vmlinux"], &mut || {
        commands += 1;
        progress.position(commands.min(COMMANDS));
    })?;
    progress.step("Stripping the kernel", None, Unit::Items);
    let mut objcopy = Command::new("objcopy");
    objcopy
        .arg("--strip-all")
        .arg(make.dir.join("vmlinux"))
        .arg(dir.join(cache::VMLINUX));
    make.run_command(objcopy, &mut || {})
}

/// Makes sure that the kernel has what it was built for.
fn verify(config: &Config, vmlinux: &Path) -> Result<(), BuildError> {
    let file = File::open(vmlinux).map_err(io_error(vmlinux))?;
    let len = file.metadata().map_err(io_error(vmlinux))?.len();
    elf::check_kernel(&file, len)?;
    let mut lacks: Vec<String> = Purpose::ALL
        .iter()
        .flat_map(|&purpose| check::missing(config, purpose))
        .filter(|missing| missing.is_required)
        .map(|missing| missing.option.to_owned())
        .collect();
    lacks.dedup();
    if lacks.is_empty() {
        Ok(())
    } else {
        Err(BuildError::Lacks(lacks.join(", ")))
    }
}

/// The release that the kernel names itself by.
fn release(make: &Make) -> Result<String, BuildError> {
    let path = make.dir.join("include/config/kernel.release");
    let text = fs::read_to_string(&path).map_err(io_error(&path))?;
    version::release(text.trim().as_bytes()).ok_or_else(|| BuildError::Io {
        path,
        source: io::ErrorKind::InvalidData.into(),
    })
}

/// Runs commands in the source tree with a fixed environment and a log.
struct Make {
    dir: PathBuf,
    log: PathBuf,
    jobs: usize,
    time_stamp: String,
}

impl Make {
    fn new(tree: &source::Tree, log: PathBuf, jobs: Option<usize>) -> Result<Self, BuildError> {
        File::create(&log).map_err(io_error(&log))?;
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            dir: tree.dir.clone(),
            log,
            jobs: jobs.unwrap_or(cpus).max(1),
            time_stamp: time_stamp(tree.modified)?,
        })
    }

    /// Runs `make`; `announced` is called for each command that it announces.
    fn run(&self, targets: &[&str], announced: &mut dyn FnMut()) -> Result<(), BuildError> {
        let mut command = Command::new("make");
        command.arg(format!("-j{}", self.jobs)).args(targets);
        self.run_command(command, announced)
    }

    fn run_command(
        &self,
        mut command: Command,
        announced: &mut dyn FnMut(),
    ) -> Result<(), BuildError> {
        let words: Vec<_> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let (reader, writer) = io::pipe().map_err(io_error(Path::new(&words.join(" "))))?;
        let errors = writer.try_clone().map_err(io_error(&self.log))?;
        // Nothing of the caller's environment (ARCH, KCFLAGS, MAKEFLAGS, …) changes the kernel.
        command
            .env_clear()
            .env("PATH", path)
            .env("LC_ALL", "C")
            .env("ARCH", "x86_64")
            .env("LOCALVERSION", "-mvm")
            .env("KBUILD_BUILD_TIMESTAMP", &self.time_stamp)
            .env("KBUILD_BUILD_VERSION", "1")
            .env("KBUILD_BUILD_USER", "mvm")
            .env("KBUILD_BUILD_HOST", "mvm")
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(errors);
        let name = PathBuf::from(command.get_program());
        let mut child = command.spawn().map_err(io_error(&name))?;
        // It holds the pipe's writing ends, which would keep the reading below from ending.
        drop(command);
        let last = self.follow(reader, announced);
        let status = child.wait().map_err(io_error(&name))?;
        let last = last?;
        if status.success() {
            return Ok(());
        }
        Err(BuildError::Make {
            command: words.join(" "),
            status,
            output: last.join("\n"),
            log: self.log.clone(),
        })
    }

    /// Copies the output to the log and returns its last lines.
    fn follow(
        &self,
        output: impl io::Read,
        announced: &mut dyn FnMut(),
    ) -> Result<Vec<String>, BuildError> {
        let mut log = File::options()
            .append(true)
            .open(&self.log)
            .map_err(io_error(&self.log))?;
        let mut last = std::collections::VecDeque::new();
        let mut reader = BufReader::new(output);
        let mut line = Vec::new();
        loop {
            line.clear();
            let n = reader
                .read_until(b'\n', &mut line)
                .map_err(io_error(&self.log))?;
            if n == 0 {
                return Ok(last.into());
            }
            log.write_all(&line).map_err(io_error(&self.log))?;
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            // "  CC      kernel/fork.o"
            if text.starts_with("  ") && text.trim_start().starts_with(char::is_uppercase) {
                announced();
            }
            last.push_back(text);
            if last.len() > SHOWN_LINES {
                last.pop_front();
            }
        }
    }
}

/// A time as `uname -v` shows it, from seconds since 1970-01-01 UTC.
fn time_stamp(seconds: u64) -> Result<String, BuildError> {
    let date = Path::new("date");
    let output = Command::new(date)
        .env("LC_ALL", "C")
        .args(["-u", "-d", &format!("@{seconds}")])
        .output()
        .map_err(io_error(date))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests;
