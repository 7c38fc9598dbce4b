//! Which kernel a run boots: the one that was named, the configured one, a built one, the newest
//! one fetched, the host's own.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::cache::{Cache, CacheError, CachedKernel, Source};
use crate::check::{self, Purpose};
use crate::config::Config;
use crate::image::{self, ImageError};
use crate::modules::{ModuleTree, ModulesError};
use crate::version;

/// Where distributions put their kernels.
const BOOT_DIR: &str = "/boot";
const MODULES_DIR: &str = "/lib/modules";

/// Why no kernel could be chosen.
#[derive(Debug, Error)]
pub enum SelectError {
    /// The kernel that was named cannot be booted.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its modules cannot be read.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// No cached kernel of that name.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The configured kernel is gone.
    #[error(
        "the kernel that is configured in {path} cannot be used: {source}; \
         choose another with `mvm kernel use`"
    )]
    Configured {
        /// The setting's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<SelectError>,
    },
    /// The setting could not be used.
    #[error("the setting {path} could not be {action}")]
    Setting {
        /// What was tried.
        action: &'static str,
        /// The setting's file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no place for settings.
    #[error("no place for settings: neither XDG_CONFIG_HOME nor HOME is an absolute path")]
    NoPlace,
}

/// What the kernel is chosen for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A machine.
    Machine,
    /// The outer Linux, which QEMU emulates where the host has no usable KVM.
    Outer,
}

/// Where a chosen kernel is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It was named for this run.
    Named,
    /// It is the configured one.
    Configured,
    /// It was built here.
    Built,
    /// It is the newest one fetched.
    Fetched,
    /// It is the host's own.
    Host,
}

/// A kernel that was chosen.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The uncompressed ELF kernel.
    pub vmlinux: PathBuf,
    /// The release that `uname -r` will print, where it is known.
    pub version: Option<String>,
    /// Its modules; None where it has none, as a kernel of `mvm kernel build`.
    pub modules: Option<ModuleTree>,
    /// Where it is from.
    pub origin: Origin,
}

/// The places that kernels are chosen from. Tests choose others.
#[derive(Debug, Clone)]
pub struct Places {
    /// The setting of the user's preferred kernel.
    pub preference: Preference,
    /// The host's kernels.
    pub boot: PathBuf,
    /// The host's modules.
    pub modules: PathBuf,
}

impl Places {
    /// The places of this user on this host.
    ///
    /// # Errors
    /// When there is no place for settings.
    pub fn of_user() -> Result<Self, SelectError> {
        Ok(Self {
            preference: Preference::open()?,
            boot: BOOT_DIR.into(),
            modules: MODULES_DIR.into(),
        })
    }
}

/// Chooses the kernel for a run. `named` is what the user gave: a file, or the name of a kernel in
/// the cache. None is returned where nothing was named and there is no kernel at all.
///
/// # Errors
/// When the named or configured kernel cannot be used. Others that cannot are passed over.
pub fn select(
    cache: &Cache,
    places: &Places,
    named: Option<&Path>,
    role: Role,
) -> Result<Option<Kernel>, SelectError> {
    if let Some(name) = named {
        return by_name(cache, places, name, Origin::Named).map(Some);
    }
    if role == Role::Machine
        && let Some(name) = places.preference.get()?
    {
        return by_name(cache, places, Path::new(&name), Origin::Configured)
            .map(Some)
            .map_err(|source| SelectError::Configured {
                path: places.preference.path.clone(),
                source: Box::new(source),
            });
    }
    let kernels = cache.kernels()?;
    for (source, origin) in [
        (Source::Built, Origin::Built),
        (Source::Fetched, Origin::Fetched),
    ] {
        let found = kernels
            .iter()
            .filter(|kernel| kernel.metadata.source == source)
            .find(|kernel| fits(kernel, role));
        if let Some(kernel) = found {
            return of_cache(cache, kernel, origin).map(Some);
        }
    }
    match role {
        Role::Machine => Ok(of_host(cache, places)),
        // Its modules would have to be checked too, and 9p and KVM are rarely all there.
        Role::Outer => Ok(None),
    }
}

/// The kernels in /boot, the newest first, and why those that cannot be used cannot.
pub fn host_kernels(
    cache: &Cache,
    places: &Places,
) -> Vec<(PathBuf, Result<image::Bootable, ImageError>)> {
    let Ok(entries) = fs::read_dir(&places.boot) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("vmlinuz"))
        .collect();
    names.sort_by(|a, b| version::compare(b, a));
    names
        .into_iter()
        .map(|name| {
            let path = places.boot.join(name);
            let bootable = image::bootable(cache, &path);
            (path, bootable)
        })
        .collect()
}

fn of_host(cache: &Cache, places: &Places) -> Option<Kernel> {
    for (path, bootable) in host_kernels(cache, places) {
        let found = bootable.map_err(SelectError::from).and_then(|bootable| {
            let modules = match &bootable.version {
                Some(version) => find_modules(cache, places, &path, version)?,
                None => None,
            };
            Ok((bootable, modules))
        });
        match found {
            // A distribution's kernel does not get far without its modules.
            Ok((bootable, modules)) if modules.is_some() => {
                return Some(Kernel {
                    vmlinux: bootable.vmlinux,
                    version: bootable.version,
                    modules,
                    origin: Origin::Host,
                });
            }
            Ok(_) => tracing::info!("{} is passed over: it has no modules", path.display()),
            Err(error) => tracing::info!("{} is passed over: {error}", path.display()),
        }
    }
    None
}

fn by_name(
    cache: &Cache,
    places: &Places,
    name: &Path,
    origin: Origin,
) -> Result<Kernel, SelectError> {
    // A kernel's name in the cache has no directory in it; a file of that name wins.
    if !name.exists()
        && name.components().count() == 1
        && let Some(text) = name.to_str()
        && let Ok(kernel) = cache.find(text)
    {
        return of_cache(cache, &kernel, origin);
    }
    let bootable = image::bootable(cache, name)?;
    let modules = match &bootable.version {
        Some(version) => find_modules(cache, places, name, version)?,
        None => None,
    };
    Ok(Kernel {
        vmlinux: bootable.vmlinux,
        version: bootable.version,
        modules,
        origin,
    })
}

fn of_cache(cache: &Cache, kernel: &CachedKernel, origin: Origin) -> Result<Kernel, SelectError> {
    let modules = match kernel.modules() {
        Some(dir) => Some(ModuleTree::open_indexed(cache, &dir)?),
        None => None,
    };
    Ok(Kernel {
        vmlinux: kernel.vmlinux(),
        version: Some(kernel.metadata.version.clone()),
        modules,
        origin,
    })
}

/// The module tree for a kernel file: beside it, as in an unpacked package; the cache's for that
/// version; the host's.
fn find_modules(
    cache: &Cache,
    places: &Places,
    kernel: &Path,
    version: &str,
) -> Result<Option<ModuleTree>, SelectError> {
    let file = fs::canonicalize(kernel).unwrap_or_else(|_| kernel.to_owned());
    let beside = file.parent().map(Path::to_owned).unwrap_or_default();
    let package = beside.parent().map(Path::to_owned).unwrap_or_default();
    let cached = cache
        .kernels()?
        .into_iter()
        .filter(|kernel| kernel.metadata.version == version)
        .find_map(|kernel| kernel.modules());
    let found = [
        beside.join("modules"),
        beside.join("lib/modules").join(version),
        package.join("lib/modules").join(version),
        package.join("usr/lib/modules").join(version),
    ]
    .into_iter()
    .chain(cached)
    .chain([places.modules.join(version)])
    .find(|dir| dir.join("modules.dep").is_file() || dir.join("kernel").is_dir());
    match found {
        Some(dir) => Ok(Some(ModuleTree::open_indexed(cache, &dir)?)),
        None => Ok(None),
    }
}

/// Whether a cached kernel can play the role.
fn fits(kernel: &CachedKernel, role: Role) -> bool {
    if role == Role::Machine {
        return true;
    }
    // Without its configuration it cannot be known, and is rather not tried.
    let text = kernel
        .config()
        .and_then(|path| fs::read_to_string(path).ok())
        .unwrap_or_default();
    !check::missing(&Config::parse(&text), Purpose::Outer)
        .iter()
        .any(|missing| missing.is_required)
}

/// The setting of the kernel that is used where none is named: one line in
/// `$XDG_CONFIG_HOME/mvm/kernel`, a file's path or the name of a kernel in the cache.
#[derive(Debug, Clone)]
pub struct Preference {
    path: PathBuf,
}

impl Preference {
    /// The setting of this user, by default below `~/.config`.
    ///
    /// # Errors
    /// When there is no place for it.
    pub fn open() -> Result<Self, SelectError> {
        let absolute = |name: &str| {
            let path = PathBuf::from(std::env::var_os(name)?);
            path.is_absolute().then_some(path)
        };
        let base = absolute("XDG_CONFIG_HOME")
            .or_else(|| Some(absolute("HOME")?.join(".config")))
            .ok_or(SelectError::NoPlace)?;
        Ok(Self::at(&base.join("mvm/kernel")))
    }

    /// The setting in the file `path`, which need not exist.
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// The preferred kernel, where there is one.
    ///
    /// # Errors
    /// When the setting cannot be read.
    pub fn get(&self) -> Result<Option<String>, SelectError> {
        match fs::read_to_string(&self.path) {
            Ok(text) => {
                let name = text.lines().next().unwrap_or_default().trim();
                Ok((!name.is_empty()).then(|| name.to_owned()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.error("read")(error)),
        }
    }

    /// Prefers `name` from now on; None prefers nothing.
    ///
    /// # Errors
    /// When the setting cannot be written.
    pub fn set(&self, name: Option<&str>) -> Result<(), SelectError> {
        let Some(name) = name else {
            return match fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(self.error("removed")(error))
                }
                _ => Ok(()),
            };
        };
        if let Some(parent) = self.path.parent() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)
                .map_err(self.error("written"))?;
        }
        // Renamed into place, so that no other process reads half a line.
        let temporary = self.path.with_extension(format!("{}", std::process::id()));
        fs::write(&temporary, format!("{name}\n"))
            .and_then(|()| fs::rename(&temporary, &self.path))
            .map_err(self.error("written"))
    }

    fn error(&self, action: &'static str) -> impl FnOnce(io::Error) -> SelectError {
        let path = self.path.clone();
        move |source| SelectError::Setting {
            action,
            path,
            source,
        }
    }
}

#[cfg(test)]
#[path = "select_tests.rs"]
mod tests;
