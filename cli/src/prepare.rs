//! What the host has to have before a machine runs: fetched on the first run, found on all later ones.

use anyhow::{Context, Result, bail};
use kernels::cache::Cache;
use kernels::package::{Client, Consent, Packages};
use kernels::progress::Stderr;
use kernels::select::Role;

use crate::accel::qemu;
use crate::args::RunArgs;
use crate::kernel;
use crate::rootfs::Rootfs;

/// What the caller of mvm allows to be done to the system.
pub fn consent(yes: bool) -> Consent {
    if yes { Consent::System } else { Consent::None }
}

/// Makes sure that the files of a machine as in `args` are in the cache.
pub fn machine(args: &RunArgs, cache: &Cache) -> Result<()> {
    let consent = consent(args.host.yes);
    let progress = Stderr::new();
    if args.kernel.is_none() {
        kernel::ensure(cache, Role::Machine, consent, &progress)?;
    }
    if args.initrd.is_none() && Rootfs::of(args) == Rootfs::BuiltIn {
        kernel::busybox(cache, consent, &progress)?;
    }
    Ok(())
}

/// Makes sure that the outer Linux can be started.
pub fn outer(yes: bool, cache: &Cache) -> Result<()> {
    let consent = consent(yes);
    let progress = Stderr::new();
    if qemu::find().is_none() {
        if !consent.covers_system() {
            bail!(
                "emulation needs {}, which is not installed: install it with `apt-get install {}`, \
                 or run mvm as root with --yes",
                qemu::PROGRAM,
                qemu::PACKAGE
            );
        }
        Packages::new(Client::find()?, cache, consent)
            .install(&[qemu::PACKAGE], &progress)
            .with_context(|| format!("{} could not be installed", qemu::PACKAGE))?;
    }
    kernel::ensure(cache, Role::Outer, consent, &progress)?;
    Ok(())
}
