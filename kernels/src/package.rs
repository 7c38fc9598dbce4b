//! The distribution's package client, asked for packages by name, without root.
//!
//! Only apt is known. Where the system's package lists are missing, out of date or do not know a
//! package, private ones are kept in the cache, so that any user can fetch on any machine.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use thiserror::Error;

use crate::cache::{Cache, CacheError};
use crate::progress::{Progress, Unit};
use crate::version;

/// How many metapackages may lead to one package.
const MAX_HOPS: usize = 4;
/// How much of a client's messages is kept for an error, in bytes.
const MAX_MESSAGES: u64 = 4 << 10;

/// Why a package could not be had.
#[derive(Debug, Error)]
pub enum PackageError {
    /// No known client is installed.
    #[error(
        "no package client is here: {0} is not on the PATH (only apt is known; \
         a kernel can also be given with --kernel FILE or `mvm kernel add FILE`)"
    )]
    NoClient(&'static str),
    /// The name could be taken for something else.
    #[error("{0:?} is not a package name")]
    BadName(String),
    /// The client does not know the package.
    #[error("the package lists know no {0}; if they are out of date, run `apt-get update` as root")]
    Unknown(String),
    /// The client could not be run.
    #[error("{program} could not be run")]
    Run {
        /// The client's program.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The client failed.
    #[error("`{command}` failed ({status}): {messages}")]
    Failed {
        /// What was run.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to stderr.
        messages: String,
    },
    /// The client ended well and left no package.
    #[error("`apt-get download {0}` left no package")]
    NothingDownloaded(String),
    /// A place for its files could not be made.
    #[error("{path} could not be used")]
    Io {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no place for private lists.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// What the caller allows to be done to the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consent {
    /// Nothing: only files of the user's own are written.
    None,
    /// Where the caller is root: system package lists are brought up to date, packages that are
    /// missing are installed.
    System,
}

impl Consent {
    /// Whether the system may be changed: it was allowed, and this is root.
    pub fn covers_system(self) -> bool {
        self == Self::System && rustix::process::geteuid().is_root()
    }
}

/// A package that was downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The package's file.
    pub file: PathBuf,
}

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
    fn with_private_lists(&self, dir: &Path) -> Result<Self, PackageError> {
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
    fn update(&self) -> Result<(), PackageError> {
        let mut command = self.command(&self.apt_get);
        command.args(["-q", "update"]);
        self.run(command).map(drop)
    }

    /// Follows metapackages from `name` to the package with the files: the dependency that
    /// begins with `prefix`, as long as there is one.
    fn resolve(&self, name: &str, prefix: &str) -> Result<String, PackageError> {
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
    fn depends(&self, name: &str) -> Result<Vec<String>, PackageError> {
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

    /// The names of all packages that begin with `prefix`, the newest version last.
    fn names(&self, prefix: &str) -> Result<Vec<String>, PackageError> {
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
    fn download(
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

/// Which package is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// The first of these names that is known. A metapackage stands for the package with
    /// `prefix` that it depends on.
    Named {
        /// Names in the order to try them.
        names: Vec<String>,
        /// What the names of the packages with the files begin with.
        prefix: &'static str,
    },
    /// The package with this prefix and the highest version.
    Newest(&'static str),
}

impl Wanted {
    fn text(&self) -> String {
        match self {
            Self::Named { names, .. } => names.join(" or "),
            Self::Newest(prefix) => format!("{prefix}*"),
        }
    }

    /// The name of the package with the files.
    fn resolve(&self, client: &Client) -> Result<String, PackageError> {
        match self {
            Self::Named { names, prefix } => {
                let mut result = Err(PackageError::Unknown(self.text()));
                for name in names {
                    result = client.resolve(name, prefix);
                    if !matches!(result, Err(PackageError::Unknown(_))) {
                        return result;
                    }
                }
                result
            }
            Self::Newest(prefix) => {
                let is_version = |name: &&String| {
                    name.strip_prefix(prefix).is_some_and(|rest| {
                        !rest.is_empty() && rest.chars().all(|c| c.is_ascii_digit() || c == '.')
                    })
                };
                let names = client.names(prefix)?;
                names
                    .iter()
                    .rfind(is_version)
                    .cloned()
                    .ok_or_else(|| PackageError::Unknown(self.text()))
            }
        }
    }
}

/// A source of packages: the client, and private lists for when the system's do not do.
#[derive(Debug)]
pub struct Packages<'a> {
    system: Client,
    cache: &'a Cache,
    consent: Consent,
}

impl<'a> Packages<'a> {
    /// Packages from `client`, with private lists in `cache` where they are needed.
    pub fn new(client: Client, cache: &'a Cache, consent: Consent) -> Self {
        Self {
            system: client,
            cache,
            consent,
        }
    }

    /// Downloads what is wanted, and the packages it depends on that begin with `companion`, into
    /// `dir`. `known` is told the name beforehand, and ends the work by returning false.
    ///
    /// # Errors
    /// When the package is nowhere to be had; the error is that of the last attempt.
    pub fn obtain(
        &self,
        wanted: &Wanted,
        companion: Option<&str>,
        dir: &Path,
        known: &mut dyn FnMut(&str) -> bool,
        progress: &dyn Progress,
    ) -> Result<Vec<Package>, PackageError> {
        let first = obtain_from(&self.system, wanted, companion, dir, known, progress);
        let error = match first {
            Ok(packages) => return Ok(packages),
            Err(error @ (PackageError::Unknown(_) | PackageError::Failed { .. })) => error,
            Err(error) => return Err(error),
        };
        tracing::info!("{error}; updating the package lists");
        progress.step("Updating the package lists", None, Unit::Items);
        let client = if self.consent.covers_system() {
            self.system.clone()
        } else {
            let lists = self.cache.side_dir("apt")?;
            self.system.with_private_lists(&lists)?
        };
        let _lock = self.cache.exclusive("apt")?;
        // A hook of the system's may fail for want of permission although the lists are there.
        let updated = client.update();
        obtain_from(&client, wanted, companion, dir, known, progress)
            .map_err(|error| updated.err().unwrap_or(error))
    }

    /// Installs packages on the system.
    ///
    /// # Errors
    /// When the client fails. The caller has made sure of [`Consent::covers_system`].
    pub fn install(&self, names: &[&str], progress: &dyn Progress) -> Result<(), PackageError> {
        for name in names {
            check_name(name)?;
        }
        let install = || {
            let mut command = self.system.command(&self.system.apt_get);
            command
                .env("DEBIAN_FRONTEND", "noninteractive")
                .args(["-q", "-y", "install", "--no-install-recommends"])
                .args(names);
            self.system.run(command).map(drop)
        };
        progress.step(
            &format!("Installing {}", names.join(" ")),
            None,
            Unit::Items,
        );
        if install().is_ok() {
            return Ok(());
        }
        let updated = self.system.update();
        install().map_err(|error| updated.err().unwrap_or(error))
    }
}

fn obtain_from(
    client: &Client,
    wanted: &Wanted,
    companion: Option<&str>,
    dir: &Path,
    known: &mut dyn FnMut(&str) -> bool,
    progress: &dyn Progress,
) -> Result<Vec<Package>, PackageError> {
    let name = wanted.resolve(client)?;
    if known(&name) {
        return Ok(Vec::new());
    }
    let mut packages = vec![client.download(&name, dir, progress)?];
    if let Some(prefix) = companion {
        for dependency in client.depends(&name)? {
            if dependency.starts_with(prefix) {
                packages.push(client.download(&dependency, dir, progress)?);
            }
        }
    }
    Ok(packages)
}

/// Refuses what is no package name (Debian policy 5.6.1), and so what could be an option.
fn check_name(name: &str) -> Result<(), PackageError> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+.-".contains(c);
    let begins = name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    if begins && name.chars().all(fits) {
        Ok(())
    } else {
        Err(PackageError::BadName(name.to_owned()))
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

/// The program `name` on the PATH.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}
