//! Fetches a distribution's packaged kernel with its modules, by package name and without root.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::archive::{self, Limits, Member};
use crate::cache::{self, Cache, CacheError, CachedKernel, Description, Source, Stage};
use crate::deb::{self, DebError};
use crate::image::{self, ImageError};
use crate::modules::{self, ModulesError};
use crate::package::{Client, Consent, Package, PackageError, Packages, Wanted};
use crate::progress::{Counted, Progress, Unit};
use crate::version;

/// A kernel package holds 5,000 files in 500 MiB today.
const LIMITS: Limits = Limits {
    bytes: 8 << 30,
    entries: 200_000,
};
const IMAGE_PREFIX: &str = "linux-image-";
/// Where a distribution ships modules apart from the kernel (Ubuntu).
const MODULES_PREFIX: &str = "linux-modules-";

/// Why a kernel could not be fetched.
#[derive(Debug, Error)]
pub enum FetchError {
    /// The package could not be had.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The package could not be unpacked.
    #[error("the package {name} could not be unpacked: {source}")]
    Deb {
        /// The package.
        name: String,
        /// Why.
        #[source]
        source: DebError,
    },
    /// There is no kernel in the package.
    #[error("the package {0} holds no boot/vmlinuz")]
    NoKernel(String),
    /// The kernel in the package cannot be booted.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The modules in the package cannot be read.
    #[error(transparent)]
    Modules(#[from] ModulesError),
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

/// Which packaged kernel to fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// The distribution's kernel for virtual machines.
    Cloud,
    /// The distribution's kernel for any machine: more drivers, more modules.
    Generic,
    /// A package or metapackage by its name.
    Package(String),
}

impl Kind {
    fn wanted(&self) -> Wanted {
        let names: &[&str] = match self {
            // Debian's name, then Ubuntu's.
            Self::Cloud => &["linux-image-cloud-amd64", "linux-image-virtual"],
            Self::Generic => &["linux-image-amd64", "linux-image-generic"],
            Self::Package(name) => &[name],
        };
        Wanted::Named {
            names: names.iter().map(|&name| name.to_owned()).collect(),
            prefix: IMAGE_PREFIX,
        }
    }
}

/// Fetches a packaged kernel into the cache. One that is there already is returned as it is.
///
/// # Errors
/// When the package cannot be had or holds no usable kernel; nothing is left behind then.
pub fn fetch(
    cache: &Cache,
    kind: &Kind,
    consent: Consent,
    progress: &dyn Progress,
) -> Result<CachedKernel, FetchError> {
    fetch_with(Client::find()?, cache, kind, consent, progress)
}

/// As [`fetch`], through the package client `client`.
///
/// # Errors
/// As [`fetch`].
pub fn fetch_with(
    client: Client,
    cache: &Cache,
    kind: &Kind,
    consent: Consent,
    progress: &dyn Progress,
) -> Result<CachedKernel, FetchError> {
    let packages = Packages::new(client, cache, consent);
    // A second process that wants the same waits, and then finds it in the cache.
    let _lock = cache.exclusive("fetch")?;
    let stage = cache.stage()?;
    let download = stage.path().join("download");
    fs::create_dir(&download).map_err(io_error(&download))?;
    let cached = cache.kernels()?;
    let mut present = None;
    let files = packages.obtain(
        &kind.wanted(),
        Some(MODULES_PREFIX),
        &download,
        &mut |name, version| {
            present = cached
                .iter()
                .map(|kernel| (kernel, &kernel.metadata))
                .find(|(_, metadata)| {
                    metadata.package.as_deref() == Some(name)
                        && metadata.package_version.as_deref() == Some(version)
                })
                .map(|(kernel, _)| kernel.clone());
            present.is_some()
        },
        progress,
    )?;
    if let Some(kernel) = present {
        progress.finish();
        return Ok(kernel);
    }
    let kernel = unpack(stage, &files, progress)?;
    progress.finish();
    Ok(kernel)
}

/// Makes a kernel of downloaded packages, the first of which holds the kernel itself.
fn unpack(
    stage: Stage,
    packages: &[Package],
    progress: &dyn Progress,
) -> Result<CachedKernel, FetchError> {
    let mut parts = Parts::new(stage.path());
    for package in packages {
        parts.unpack(package, progress)?;
    }
    let first = packages.first();
    let name = first.map_or_else(String::new, |package| package.name.clone());
    let Some(release) = parts.release.take() else {
        return Err(FetchError::NoKernel(name));
    };
    progress.step("Unpacking the kernel", None, Unit::Items);
    let dir = stage.path();
    let vmlinuz = dir.join(VMLINUZ);
    image::extract(&vmlinuz, &dir.join(cache::VMLINUX))?;
    fs::remove_file(&vmlinuz).map_err(io_error(&vmlinuz))?;
    let download = dir.join("download");
    fs::remove_dir_all(&download).map_err(io_error(&download))?;
    let tree = dir.join(cache::MODULES);
    if tree.is_dir() {
        progress.step("Indexing the modules", None, Unit::Items);
        modules::index(&tree)?;
    }
    Ok(stage.publish(Description {
        version: release,
        source: Source::Fetched,
        package: Some(name),
        package_version: first.map(|package| package.version.clone()),
    })?)
}

const VMLINUZ: &str = "vmlinuz";

/// The parts of a kernel as they come out of packages.
struct Parts<'a> {
    dir: &'a Path,
    /// The release that the first file of the kernel is for; files for another are passed over.
    release: Option<String>,
}

impl<'a> Parts<'a> {
    fn new(dir: &'a Path) -> Self {
        Self { dir, release: None }
    }

    fn unpack(&mut self, package: &Package, progress: &dyn Progress) -> Result<(), FetchError> {
        let path = &package.file;
        let file = File::open(path).map_err(io_error(path))?;
        let len = file.metadata().map_err(io_error(path))?.len();
        let message = format!("Unpacking {}", package.name);
        progress.step(&message, Some(len), Unit::Bytes);
        let counted = Counted::new(file, progress);
        deb::for_each_file(counted, LIMITS, &mut |member, contents| {
            self.take(member, contents)
        })
        .map_err(|source| FetchError::Deb {
            name: package.name.clone(),
            source,
        })
    }

    /// Writes a file of the package that belongs to the kernel to its place.
    fn take(&mut self, member: &Member, contents: &mut dyn Read) -> io::Result<()> {
        let Some((release, target)) = place(&member.path) else {
            return Ok(());
        };
        match &self.release {
            None => self.release = Some(release),
            Some(known) if *known == release => {}
            Some(_) => return Ok(()),
        }
        archive::write_file(&self.dir.join(target), member, contents)
    }
}

/// The release that a package's file belongs to, and where it goes in a kernel's directory; None
/// for what is not needed.
fn place(path: &Path) -> Option<(String, PathBuf)> {
    let path = path.strip_prefix("usr").unwrap_or(path);
    if let Ok(name) = path.strip_prefix("boot") {
        let name = name.to_str()?;
        for (prefix, target) in [("vmlinuz-", VMLINUZ), ("config-", cache::CONFIG)] {
            if let Some(rest) = name.strip_prefix(prefix) {
                return Some((version::release(rest.as_bytes())?, target.into()));
            }
        }
        return None;
    }
    let below = path.strip_prefix("lib/modules").ok()?;
    let mut parts = below.components();
    let release = parts.next()?.as_os_str().to_str()?;
    let release = version::release(release.as_bytes())?;
    let rest = parts.as_path();
    (rest.file_name().is_some()).then(|| (release, Path::new(cache::MODULES).join(rest)))
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> FetchError {
    let path = path.to_owned();
    move |source| FetchError::Io { path, source }
}

#[cfg(test)]
#[path = "fetch_tests.rs"]
mod tests;
