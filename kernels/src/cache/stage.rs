//! A kernel that is being put together: all of it gets its name at once, or nothing is left.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{
    Cache, CacheError, CachedKernel, METADATA, Metadata, Source, VMLINUX, digest, read_metadata,
    walk,
};

/// A kernel in the making. Dropped, it takes all its files along.
#[derive(Debug)]
pub struct Stage {
    cache: Cache,
    dir: PathBuf,
    /// Tells other processes that somebody is at work here.
    _lock: File,
}

/// What [`Stage::publish`] cannot see in the files.
#[derive(Debug, Clone)]
pub struct Description {
    /// The release that `uname -r` prints; see [`crate::version::release`].
    pub version: String,
    /// How the kernel came here.
    pub source: Source,
    /// The package that it was taken or built from.
    pub package: Option<String>,
    /// That package's version.
    pub package_version: Option<String>,
}

impl Stage {
    /// A stage in `dir`, whose lock is held through `lock`.
    pub(super) fn new(cache: Cache, dir: PathBuf, lock: File) -> Self {
        Self {
            cache,
            dir,
            _lock: lock,
        }
    }

    /// The directory to put files into.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Makes a kernel of what is in the directory, which must hold at least [`VMLINUX`].
    ///
    /// Where the same kernel is there already, that one is returned.
    ///
    /// # Errors
    /// When a file cannot be read or written; nothing is left behind then.
    pub fn publish(self, description: Description) -> Result<CachedKernel, CacheError> {
        let sha256 = digest(&self.dir.join(VMLINUX))?;
        let short: String = sha256.chars().take(12).collect();
        let id = format!("{}-{short}", description.version);
        let metadata = Metadata {
            version: description.version,
            sha256,
            source: description.source,
            package: description.package,
            package_version: description.package_version,
            created: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
        };
        let path = self.dir.join(METADATA);
        let text = serde_json::to_vec_pretty(&metadata).map_err(|source| CacheError::Metadata {
            path: path.clone(),
            source,
        })?;
        fs::write(&path, text).map_err(CacheError::io("writing", &path))?;
        // All of it has to be on the disk before the name says that it is.
        walk(&self.dir, &mut |path, _| {
            fs::set_permissions(path, fs::Permissions::from_mode(0o444))
                .and_then(|()| File::open(path)?.sync_all())
                .map_err(CacheError::io("writing out", path))
        })?;
        let target = self.cache.root.join(&id);
        let _guard = self.cache.exclusive("cache")?;
        if let Ok(metadata) = read_metadata(&target) {
            return Ok(CachedKernel {
                id,
                dir: target,
                metadata,
            });
        }
        fs::rename(&self.dir, &target).map_err(CacheError::io("making", &target))?;
        File::open(&self.cache.root)
            .and_then(|root| root.sync_all())
            .map_err(CacheError::io("writing out", &self.cache.root))?;
        Ok(CachedKernel {
            id,
            dir: target,
            metadata,
        })
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.dir) {
            Ok(()) => {}
            // It was published.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!("{} is left behind: {error}", self.dir.display()),
        }
    }
}
