//! Puts a kernel file of the user's into the cache.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::cache::{self, Cache, CacheError, CachedKernel, Description, Source};
use crate::config;
use crate::image::{self, ImageError};
use crate::modules::{self, ModulesError};

/// Why a kernel could not be added.
#[derive(Debug, Error)]
pub enum AddError {
    /// The file is no kernel.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The kernel does not say its version.
    #[error("the kernel {0} names no version, so no modules could be matched to it")]
    NoVersion(PathBuf),
    /// Its modules could not be copied.
    #[error("the modules in {path} could not be copied")]
    Copy {
        /// The module tree.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Its modules are no module tree.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// The cache could not be written.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// Adds the kernel in `file`, with the modules in the directory `modules` where one is given
/// (what `/lib/modules/VERSION` is elsewhere).
///
/// # Errors
/// When the file is no kernel, or cannot be put into the cache; nothing is left behind then.
pub fn add(cache: &Cache, file: &Path, modules: Option<&Path>) -> Result<CachedKernel, AddError> {
    let stage = cache.stage()?;
    let vmlinux = stage.path().join(cache::VMLINUX);
    let version =
        image::extract(file, &vmlinux)?.ok_or_else(|| AddError::NoVersion(file.to_owned()))?;
    if let Some(text) = config::of_file(file) {
        let target = stage.path().join(cache::CONFIG);
        fs::write(&target, text.as_bytes()).map_err(|source| CacheError::Io {
            action: "writing",
            path: target,
            source,
        })?;
    }
    if let Some(tree) = modules {
        let target = stage.path().join(cache::MODULES);
        modules::copy(tree, &target).map_err(|source| AddError::Copy {
            path: tree.to_owned(),
            source,
        })?;
        modules::index(&target)?;
    }
    Ok(stage.publish(Description {
        version,
        source: Source::Added,
        package: None,
        package_version: None,
    })?)
}
