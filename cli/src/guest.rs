//! What a machine's guest is made of: the initramfs with the agent, and the modules it needs.

use std::time::{SystemTime, UNIX_EPOCH};

use agent::guest::{GUEST_PATH, Guest, Root};
use anyhow::{Context, Result};
use kernels::modules::Module;
use vmm::boot::initramfs::Builder;

/// The agent that belongs to this mvm.
const AGENT: &[u8] = include_bytes!(env!("MVM_AGENT"));

/// Modules of every machine: how the host is reached, and entropy.
pub const MACHINE_MODULES: &[&str] = &["virtio_mmio", "vmw_vsock_virtio_transport"];

/// Modules that every machine takes where its kernel has them.
pub const OPTIONAL_MODULES: &[&str] = &[
    "virtio_rng",
    "virtio_balloon",
    "button",
    "evdev",
    // How the agent learns which ports are listened at.
    "inet_diag",
    "tcp_diag",
    // Folders may be shared at any time.
    "fuse",
];

/// A [`Guest`] with what every machine has; `root` is where commands run.
pub fn describe(hostname: &str, root: Root) -> Result<Guest> {
    let mut entropy = vec![0u8; 64];
    rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())
        .context("the host gives no random bytes")?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .context("the host's clock is before 1970")?;
    Ok(Guest {
        hostname: hostname.to_owned(),
        modules: Vec::new(),
        root,
        init: None,
        epoch_ns: u64::try_from(now.as_nanos()).unwrap_or(0),
        entropy,
        mounts: Vec::new(),
        settings: Vec::new(),
    })
}

/// Packs the initramfs: the agent as /init, `guest`, its modules, and `files` (path, mode, content).
pub fn initramfs(
    mut guest: Guest,
    modules: &[Module],
    files: &[(&str, u32, &[u8])],
) -> Result<Vec<u8>> {
    let mut builder = Builder::new();
    builder.file("/init", 0o755, AGENT)?;
    for dir in ["/dev", "/proc", "/sys", "/run", "/tmp", "/root", "/mnt"] {
        builder.dir(dir, 0o755)?;
    }
    for (path, mode, content) in files {
        builder.file(path, *mode, content)?;
    }
    for (index, module) in modules.iter().enumerate() {
        let path = format!("/mvm/modules/{index:03}-{}.ko", module.name);
        builder.file(&path, 0o644, &module.read()?)?;
        guest.modules.push(path);
    }
    let description =
        postcard::to_stdvec(&guest).context("the guest's description cannot be encoded")?;
    builder.file(GUEST_PATH, 0o600, &description)?;
    Ok(builder.finish()?)
}
