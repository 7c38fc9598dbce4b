//! Which kernel a machine boots, and getting one where there is none yet.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kernels::cache::{Cache, CachedKernel, Source};
use kernels::fetch::{self, Kind};
use kernels::modules::{Module, ModuleTree};
use kernels::package::Consent;
use kernels::progress::Progress;
use kernels::{busybox, image};

/// A kernel that was chosen.
#[derive(Debug)]
pub struct Kernel {
    /// The ELF to map.
    pub vmlinux: PathBuf,
    /// `uname -r`, where it is known.
    pub version: Option<String>,
    /// Its modules; None where it has none, as a kernel of `mvm kernel build`.
    pub modules: Option<ModuleTree>,
}

impl Kernel {
    /// The modules to load for `required` and, where there are any, `optional`.
    ///
    /// A kernel without a module tree is taken to have what it needs built in.
    pub fn modules(&self, required: &[&str], optional: &[&str]) -> Result<Vec<Module>> {
        match &self.modules {
            None => Ok(Vec::new()),
            Some(tree) => tree
                .resolve(required, optional)
                .context("this kernel's modules do not do for the machine"),
        }
    }

    fn cached(kernel: &CachedKernel) -> Result<Self> {
        let modules = match kernel.modules() {
            Some(dir) => Some(ModuleTree::open(&dir)?),
            None => None,
        };
        Ok(Self {
            vmlinux: kernel.vmlinux(),
            version: Some(kernel.metadata.version.clone()),
            modules,
        })
    }
}

/// What the kernel is chosen for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// A machine.
    Machine,
    /// The outer Linux of `--accel tcg`.
    Outer,
}

/// The kernel for `purpose`: `explicit`, else the default, else the one that was built, else the newest fetched; None where there is nothing to boot.
pub fn find(cache: &Cache, explicit: Option<&Path>, purpose: Use) -> Result<Option<Kernel>> {
    if let Some(path) = explicit {
        return from_file(cache, path).map(Some);
    }
    let kernels = cache.kernels()?;
    let built = |kernel: &&CachedKernel| kernel.metadata.source == Source::Built;
    let fetched = |kernel: &&CachedKernel| {
        kernel.metadata.source == Source::Fetched
            && (purpose == Use::Machine || !kernel.metadata.version.contains("cloud"))
    };
    match kernels
        .iter()
        .find(built)
        .or_else(|| kernels.iter().find(fetched))
    {
        Some(kernel) => Kernel::cached(kernel).map(Some),
        None => Ok(None),
    }
}

/// Fetches what `purpose` needs where it is not there yet.
pub fn ensure(
    cache: &Cache,
    purpose: Use,
    consent: Consent,
    progress: &dyn Progress,
) -> Result<Kernel> {
    if let Some(kernel) = find(cache, None, purpose)? {
        return Ok(kernel);
    }
    let kind = match purpose {
        Use::Machine => Kind::Cloud,
        Use::Outer => Kind::Generic,
    };
    let kernel = fetch::fetch(cache, &kind, consent, progress)
        .context("there is no kernel yet, and none can be fetched")?;
    Kernel::cached(&kernel)
}

/// The static busybox of the built-in root.
pub fn busybox(cache: &Cache, consent: Consent, progress: &dyn Progress) -> Result<Vec<u8>> {
    let path = busybox::fetch(cache, consent, progress)
        .context("the built-in root needs a static busybox, and none can be fetched")?;
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}

fn from_file(cache: &Cache, path: &Path) -> Result<Kernel> {
    let bootable = image::bootable(cache, path)?;
    let modules = match &bootable.version {
        Some(version) => modules_beside(cache, path, version)?,
        None => None,
    };
    Ok(Kernel {
        vmlinux: bootable.vmlinux,
        version: bootable.version,
        modules,
    })
}

/// The module tree of `version`: in the cache, beside the kernel (as in an unpacked package), or
/// the host's own.
fn modules_beside(cache: &Cache, kernel: &Path, version: &str) -> Result<Option<ModuleTree>> {
    let cached = cache
        .kernels()?
        .into_iter()
        .find(|kernel| kernel.metadata.version == version)
        .and_then(|kernel| kernel.modules());
    let beside = kernel
        .parent()
        .map(|dir| dir.join("../lib/modules").join(version));
    let host = Path::new("/lib/modules").join(version);
    match cached
        .into_iter()
        .chain(beside)
        .chain([host])
        .find(|dir| dir.is_dir())
    {
        Some(dir) => Ok(Some(ModuleTree::open(&dir)?)),
        None => Ok(None),
    }
}
