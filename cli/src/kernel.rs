//! Which kernel a machine boots, and getting one where there is none yet.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use kernels::busybox;
use kernels::cache::Cache;
use kernels::fetch::{self, Kind};
use kernels::modules::Module;
use kernels::package::Consent;
use kernels::progress::Progress;
use kernels::select::{self, Kernel, Places, Role};

/// The kernel for `role`: `named`, else what [`select::select`] finds; None where there is nothing to boot.
pub fn find(cache: &Cache, named: Option<&Path>, role: Role) -> Result<Option<Kernel>> {
    Ok(select::select(cache, &Places::of_user()?, named, role)?)
}

/// Fetches a kernel for `role` where there is none yet.
pub fn ensure(cache: &Cache, role: Role, consent: Consent, progress: &dyn Progress) -> Result<()> {
    if find(cache, None, role)?.is_some() {
        return Ok(());
    }
    let kind = match role {
        Role::Machine => Kind::Cloud,
        Role::Outer => Kind::Generic,
    };
    fetch::fetch(cache, &kind, consent, progress)
        .context("there is no kernel yet, and none can be fetched")?;
    Ok(())
}

/// The modules of `kernel` to load for `required` and, as far as they are there, for `optional`.
///
/// A kernel without a module tree is taken to have what it needs built in.
pub fn modules(kernel: &Kernel, required: &[&str], optional: &[&str]) -> Result<Vec<Module>> {
    match &kernel.modules {
        None => Ok(Vec::new()),
        Some(tree) => tree
            .resolve(required, optional)
            .context("this kernel's modules do not do for the machine"),
    }
}

/// The static busybox of the built-in root.
pub fn busybox(cache: &Cache, consent: Consent, progress: &dyn Progress) -> Result<Vec<u8>> {
    let path = busybox::fetch(cache, consent, progress)
        .context("the built-in root needs a static busybox, and none can be fetched")?;
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}
