//! From what was typed to a machine that only has to be let run.

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result};
use kernels::cache::Cache;
use kernels::select::Role;
use vmm::{Initrd, Machine};

use super::SetUp;
use crate::args::RunArgs;
use crate::rootfs::Rootfs;
use crate::{kernel, resolve};

/// A machine whose vCPUs are paused before their first instruction.
pub struct Built {
    pub machine: Machine,
    pub set_up: SetUp,
    /// Whether it has a disk that its guest may write to.
    pub writes: bool,
}

/// Builds the machine that `args` describe, in this process.
pub fn build(args: &RunArgs, cache: &Cache, console: Box<dyn Write + Send>) -> Result<Built> {
    let started = Instant::now();
    let kernel = kernel::find(cache, args.kernel.as_deref(), Role::Machine)?
        .context("there is no kernel to boot: fetch one with `mvm kernel fetch`")?;
    let root = Rootfs::of(args).root(args)?;
    let mut config = resolve::machine(args, &kernel, &root)?;
    if config.initrd.is_none() {
        let initramfs = resolve::initramfs(args, &kernel, &root, cache)?;
        config.initrd = Some(Initrd::Bytes(initramfs));
    }
    config.console = Some(console);
    let writes = config.disks.iter().any(|disk| !disk.read_only);
    let preparation = started.elapsed();
    let machine = vmm::prepare(config)?;
    let launch = machine.timings();
    let set_up = SetUp {
        preparation,
        vm: launch.vm,
        devices: launch.devices,
        kernel: launch.kernel,
        vcpus: launch.vcpus,
    };
    Ok(Built {
        machine,
        set_up,
        writes,
    })
}
