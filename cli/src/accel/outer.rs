//! What the outer Linux is made of: its kernel, its initramfs with this program in it, its size.

use std::path::PathBuf;
use std::{env, fs, thread};

use agent::guest::{Mount, Root, Setting};
use anyhow::{Context, Result};
use kernels::cache::Cache;
use kernels::select::Role;

use super::ON_EMULATED_CPU;
use super::qemu::{self, CACHE_TAG, HOST_TAG};
use crate::{dirs, guest, kernel};

/// Where this program is in the initramfs.
const PROGRAM_FILE: &str = "/mvm/bin/mvm";

/// Where the agent shows it, whatever root the outer Linux has.
pub const PROGRAM: &str = "/dev/mvm/mvm";

/// Modules of the outer Linux: how the host's files and its agent are reached.
const REQUIRED: &[&str] = &[
    "virtio_pci",
    "vmw_vsock_virtio_transport",
    "9pnet_virtio",
    "9p",
];

/// More of them, as far as the kernel has them: KVM for the emulated CPU, and what machines use.
const OPTIONAL: &[&str] = &["kvm_amd", "ccp", "tun", "bridge", "veth"];

/// Messages of the kernel only when it fails.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 kvm_amd.nested=0 tsc=reliable no_timer_check i8042.noaux i8042.nomux";

/// The share of the host's memory that the outer Linux may use: most of it, as it takes what it
/// touches and no more.
const MEMORY_SHARE: (u64, u64) = (3, 4);

/// The outer Linux, ready to be emulated.
#[derive(Debug)]
pub struct Outer {
    /// The kernel: an ELF with a PVH note.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: Vec<u8>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Bytes of memory.
    pub memory: u64,
    /// Virtual CPUs.
    pub cpus: usize,
    /// mvm's cache directory, which is shown with its contents cached.
    pub cache: PathBuf,
}

/// Puts the outer Linux together.
pub fn compose() -> Result<Outer> {
    let kernels = Cache::open()?;
    let kernel = kernel::find(&kernels, None, Role::Outer)?.context(
        "there is no kernel for the outer Linux: fetch one with `mvm kernel fetch generic`",
    )?;
    let program = env::current_exe().context("mvm cannot find its own file")?;
    let program =
        fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    let cache = dirs::cache()?;
    let mut description = guest::describe(
        "mvm-outer",
        Root::NineP {
            tag: HOST_TAG.to_owned(),
        },
    )?;
    description.mounts.push(Mount {
        source: CACHE_TAG.to_owned(),
        target: cache.display().to_string(),
        filesystem: "9p".to_owned(),
        // Files of the cache never change once they have their name.
        options: "trans=virtio,version=9p2000.L,msize=1048576,cache=loose".to_owned(),
    });
    // A page fault of a nested guest is dear under emulation: machines' memory comes in huge pages.
    description.settings.push(Setting {
        path: "/sys/kernel/mm/transparent_hugepage/shmem_enabled".to_owned(),
        value: "advise".to_owned(),
    });
    // The emulated TSC is first measured on a busy host, and then better. Where the two differ by more
    // than this many millionths, KVM gives its vCPUs no TSC rate, and their timers never fire.
    description.settings.push(Setting {
        path: "/sys/module/kvm/parameters/tsc_tolerance_ppm".to_owned(),
        value: "100000".to_owned(),
    });
    // Thousands of connections may come to a machine at once.
    description.settings.push(Setting {
        path: "/proc/sys/net/core/somaxconn".to_owned(),
        value: "16384".to_owned(),
    });
    let modules = kernel::modules(&kernel, REQUIRED, OPTIONAL)?;
    let initramfs = guest::initramfs(description, &modules, &[(PROGRAM_FILE, 0o755, &program)])?;
    let (part, whole) = MEMORY_SHARE;
    let memory = total_memory()? / whole * part;
    Ok(Outer {
        kernel: kernel.vmlinux,
        initramfs,
        cmdline: cmdline(),
        memory: memory & !((2 << 20) - 1),
        cpus: qemu::reliable_cpus(thread::available_parallelism().map_or(1, usize::from)),
        cache,
    })
}

/// The kernel's command line. The emulated TSC is the host's: a kernel that measures it while the host is busy can be
/// off by a factor, and so can all clocks of the machines in it.
fn cmdline() -> String {
    let cmdline = format!("{CMDLINE} {ON_EMULATED_CPU}");
    match vmm::tsc_khz() {
        Some(khz) => format!("{cmdline} tsc_early_khz={khz}"),
        None => cmdline,
    }
}

/// The host's memory in bytes.
fn total_memory() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB"))
        .and_then(|number| number.trim().parse::<u64>().ok())
        .map(|kib| kib << 10)
        .context("/proc/meminfo does not say how much memory there is")
}
