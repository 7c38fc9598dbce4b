//! apt's programs, run for one answer each.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Package, PackageError, check_name, on_path};
use crate::progress::{Progress, Unit};
use crate::version;

/// How many metapackages may lead to one package.
const MAX_HOPS: usize = 4;
/// How much of a client's messages is kept for an error, in bytes.
const MAX_MESSAGES: u64 = 4 << 10;

/// A package client's programs and the options they get.
#[derive(Debug, Clone)]
pub struct Client {
    apt_get: PathBuf,
    apt_cache: PathBuf,
    options: Vec<String>,
}

impl Client {
    /// The client that is on the PATH.
    ///
    /// # Errors
    /// When there is none.
    pub fn find() -> Result<Self, PackageError> {
        Ok(Self {
            apt_get: on_path("apt-get").ok_or(PackageError::NoClient("apt-get"))?,
            apt_cache: on_path("apt-cache").ok_or(PackageError::NoClient("apt-cache"))?,
            options: Vec::new(),
        })
    }

    /// The client whose programs are in the directory `dir`.
    pub fn in_dir(dir: &Path) -> Self {
        Self {
            apt_get: dir.join("apt-get"),
            apt_cache: dir.join("apt-cache"),
            options: Vec::new(),
        }
    }

    /// This client with package lists of its own in `dir`.
    pub(super) fn with_private_lists(&self, dir: &Path) -> Result<Self, PackageError> {
        for sub in ["state", "lists/partial", "cache/archives/partial"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).map_err(|source| PackageError::Io { path, source })?;
        }
        let at = |name: &str, sub: &str| {
            [
                "-o".to_owned(),
                format!("{name}={}/", dir.join(sub).display()),
            ]
        };
        let mut client = self.clone();
        client.options.extend(at("Dir::State", "state"));
        client.options.extend(at("Dir::State::lists", "lists"));
        client.options.extend(at("Dir::Cache", "cache"));
        // apt's download user could not write below the user's cache.
        client
            .options
            .extend(["-o".to_owned(), "APT::Sandbox::User=root".to_owned()]);
        Ok(client)
    }

    /// Brings the package lists up to date.
    pub(super) fn update(&self) -> Result<(), PackageError> {
        let mut command = self.command(&self.apt_get);
        command.args(["-q", "update"]);
        self.run(command).map(drop)
    }

    /// Follows metapackages from `name` to the package with the files: the dependency that
    /// begins with `prefix`, as long as there is one.
    pub(super) fn resolve(&self, name: &str, prefix: &str) -> Result<String, PackageError> {
        let mut current = name.to_owned();
        for _ in 0..MAX_HOPS {
            let next = self
                .depends(&current)?
                .into_iter()
                .find(|dependency| dependency.starts_with(prefix) && *dependency != current);
            match next {
                Some(next) => current = next,
                None => break,
            }
        }
        Ok(current)
    }

    /// The real packages that `name` depends on.
    pub(super) fn depends(&self, name: &str) -> Result<Vec<String>, PackageError> {
        check_name(name)?;
        let mut command = self.command(&self.apt_cache);
        command.args(["depends", "--important", name]);
        let text = match self.run(command) {
            Ok(text) => text,
            Err(PackageError::Failed { .. }) => {
                return Err(PackageError::Unknown(name.to_owned()));
            }
            Err(error) => return Err(error),
        };
        Ok(text
            .lines()
            .filter_map(|line| {
                let dependency = line.trim_start_matches([' ', '|']);
                let name = dependency.strip_prefix("Depends: ")?.trim();
                check_name(name).ok()?;
                Some(name.to_owned())
            })
            .collect())
    }

    /// The version that [`Client::download`] would bring.
    pub(super) fn candidate(&self, name: &str) -> Result<String, PackageError> {
        check_name(name)?;
        let mut command = self.command(&self.apt_cache);
        command.args(["show", "--no-all-versions", name]);
        self.run(command)?
            .lines()
            .find_map(|line| Some(line.strip_prefix("Version: ")?.trim().to_owned()))
            .ok_or_else(|| PackageError::Unknown(name.to_owned()))
    }

    /// The names of all packages that begin with `prefix`, the newest version last.
    pub(super) fn names(&self, prefix: &str) -> Result<Vec<String>, PackageError> {
        check_name(prefix)?;
        let mut command = self.command(&self.apt_cache);
        command.args(["pkgnames", prefix]);
        let text = self.run(command)?;
        let mut names: Vec<String> = text
            .lines()
            .filter(|name| name.starts_with(prefix) && check_name(name).is_ok())
            .map(str::to_owned)
            .collect();
        names.sort_by(|a, b| version::compare(a, b));
        Ok(names)
    }

    /// Downloads the package `name` into the directory `dir`, which holds no package yet.
    pub(super) fn download(
        &self,
        name: &str,
        dir: &Path,
        progress: &dyn Progress,
    ) -> Result<Package, PackageError> {
        check_name(name)?;
        progress.step(&format!("Downloading {name}"), Some(100), Unit::Items);
        let mut command = self.command(&self.apt_get);
        command
            .args(["-q", "-o", "APT::Status-Fd=1", "download", name])
            .current_dir(dir);
        self.run_lines(command, &mut |line| {
            // dlstatus:FILE:PERCENT:TEXT
            let mut fields = line.split(':');
            if fields.next() == Some("dlstatus")
                && let Some(percent) = fields.nth(1).and_then(|text| text.parse::<f64>().ok())
            {
                progress.position(percent.clamp(0.0, 100.0) as u64);
            }
        })?;
        downloaded(name, dir)
    }

    /// Installs packages on the system.
    pub(super) fn install(&self, names: &[&str]) -> Result<(), PackageError> {
        let mut command = self.command(&self.apt_get);
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-q", "-y", "install", "--no-install-recommends"])
            .args(names);
        self.run(command).map(drop)
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C").args(&self.options);
        command
    }

    /// Runs a command and returns what it wrote to stdout.
    fn run(&self, command: Command) -> Result<String, PackageError> {
        let mut text = String::new();
        self.run_lines(command, &mut |line| {
            text.push_str(line);
            text.push('\n');
        })?;
        Ok(text)
    }

    /// Runs a command and passes on each line of its stdout.
    fn run_lines(
        &self,
        mut command: Command,
        line: &mut dyn FnMut(&str),
    ) -> Result<(), PackageError> {
        let program = PathBuf::from(command.get_program());
        let failed = |source| PackageError::Run {
            program: program.clone(),
            source,
        };
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let stderr = child.stderr.take();
        let stdout = child.stdout.take();
        let messages = std::thread::scope(|scope| {
            let messages = scope.spawn(move || messages_of(stderr));
            for text in stdout
                .into_iter()
                .flat_map(|out| BufReader::new(out).lines())
            {
                // What is no text is no answer of the client.
                let Ok(text) = text else { break };
                line(&text);
            }
            messages.join().unwrap_or_default()
        });
        let status = child.wait().map_err(failed)?;
        if status.success() {
            return Ok(());
        }
        let words: Vec<_> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(OsStr::to_string_lossy)
            .collect();
        Err(PackageError::Failed {
            command: words.join(" "),
            status,
            messages,
        })
    }
}

/// The package's file in `dir`: NAME_VERSION_ARCHITECTURE.deb, the version's colon escaped.
fn downloaded(name: &str, dir: &Path) -> Result<Package, PackageError> {
    let io_error = |source| PackageError::Io {
        path: dir.to_owned(),
        source,
    };
    for entry in fs::read_dir(dir).map_err(io_error)? {
        let entry = entry.map_err(io_error)?;
        let file = entry.file_name();
        let Some(stem) = file.to_str().and_then(|file| file.strip_suffix(".deb")) else {
            continue;
        };
        let mut parts = stem.split('_');
        if parts.next() == Some(name)
            && let Some(version) = parts.next()
        {
            return Ok(Package {
                name: name.to_owned(),
                version: version.replace("%3a", ":"),
                file: entry.path(),
            });
        }
    }
    Err(PackageError::NothingDownloaded(name.to_owned()))
}

/// What a client wrote to stderr, on one line; the part beyond a limit is read and dropped.
fn messages_of(stderr: Option<impl Read>) -> String {
    let Some(mut stderr) = stderr else {
        return String::new();
    };
    let mut bytes = Vec::new();
    let kept = (&mut stderr).take(MAX_MESSAGES).read_to_end(&mut bytes);
    // Read to the end, or the client would block on a full pipe.
    let rest = io::copy(&mut stderr, &mut io::sink());
    if let Err(error) = kept.and(rest.map(|_| 0)) {
        tracing::debug!("reading the package client's messages: {error}");
    }
    let text = String::from_utf8_lossy(&bytes);
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}
