//! The distribution's package client, asked for packages by name, without root.
//!
//! Only apt is known. Where the system's package lists are missing, out of date or do not know a
//! package, private ones are kept in the cache, so that any user can fetch on any machine.

mod client;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use thiserror::Error;

use crate::cache::{Cache, CacheError};
use crate::progress::{Progress, Unit};

pub use client::Client;

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
    /// `dir`. `known` is told the name and the version beforehand; where it returns true, nothing is
    /// downloaded.
    ///
    /// # Errors
    /// When the package is nowhere to be had; the error is that of the last attempt.
    pub fn obtain(
        &self,
        wanted: &Wanted,
        companion: Option<&str>,
        dir: &Path,
        known: &mut dyn FnMut(&str, &str) -> bool,
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
        progress.step(
            &format!("Installing {}", names.join(" ")),
            None,
            Unit::Items,
        );
        if self.system.install(names).is_ok() {
            return Ok(());
        }
        // Perhaps the lists are missing or too old.
        let updated = self.system.update();
        self.system
            .install(names)
            .map_err(|error| updated.err().unwrap_or(error))
    }
}

fn obtain_from(
    client: &Client,
    wanted: &Wanted,
    companion: Option<&str>,
    dir: &Path,
    known: &mut dyn FnMut(&str, &str) -> bool,
    progress: &dyn Progress,
) -> Result<Vec<Package>, PackageError> {
    let name = wanted.resolve(client)?;
    let version = client.candidate(&name)?;
    if known(&name, &version) {
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

/// The program `name` on the PATH.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}
