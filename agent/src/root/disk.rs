//! A root on a block device: mounted as it is, or read-only below a tmpfs that takes the writes.

use std::ffi::CStr;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use super::LOWER;

/// The tmpfs that takes the writes.
const UPPER: &str = "/mvm/upper";

const OVERLAY_OPTIONS: &CStr =
    c"lowerdir=/mvm/lower,upperdir=/mvm/upper/upper,workdir=/mvm/upper/work";

/// Mounts the filesystem of `device` at `target`, writable either way.
pub fn mount_root(device: &Path, filesystem: &str, read_only: bool, target: &str) -> Result<()> {
    fs::create_dir_all(target)?;
    if !read_only {
        return mount_device(device, filesystem, MountFlags::empty(), target);
    }
    fs::create_dir_all(LOWER)?;
    mount_device(device, filesystem, MountFlags::RDONLY, LOWER)?;
    lay_over(target)
}

/// Shows at `target` what is mounted at [`LOWER`], with a tmpfs that takes the writes.
pub fn lay_over(target: &str) -> Result<()> {
    fs::create_dir_all(target)?;
    fs::create_dir_all(UPPER)?;
    mount("tmpfs", UPPER, "tmpfs", MountFlags::empty(), c"mode=0755")
        .context("the tmpfs for the root's changes cannot be mounted")?;
    fs::create_dir(format!("{UPPER}/upper"))?;
    fs::create_dir(format!("{UPPER}/work"))?;
    match mount(
        "overlay",
        target,
        "overlay",
        MountFlags::empty(),
        OVERLAY_OPTIONS,
    ) {
        Err(Errno::NODEV) => Err(anyhow!(
            "a read-only root needs overlayfs to be writable in the machine, and this kernel has none"
        )),
        mounted => mounted.context("the tmpfs cannot be laid over the read-only root"),
    }
}

fn mount_device(device: &Path, filesystem: &str, flags: MountFlags, target: &str) -> Result<()> {
    let try_with = |options: &CStr| mount(device, target, filesystem, flags, options);
    let mounted = match try_with(c"") {
        // A journal that was not replayed, on a device that cannot be written: as it is, then.
        Err(Errno::ROFS) if flags.contains(MountFlags::RDONLY) && filesystem == "ext4" => {
            try_with(c"noload")
        }
        mounted => mounted,
    };
    mounted.map_err(|errno| {
        let why = match errno {
            Errno::NODEV => format!("this kernel has no {filesystem} filesystem"),
            Errno::INVAL | Errno::UCLEAN | Errno::BADMSG | Errno::ILSEQ => {
                format!("the {filesystem} filesystem is damaged or of a kind that this kernel does not know ({errno})")
            }
            Errno::IO => "reading it failed (input/output error)".to_owned(),
            Errno::ROFS | Errno::ACCESS => "the disk can only be read; ask for it read-only".to_owned(),
            _ => errno.to_string(),
        };
        anyhow!("the root filesystem on {} cannot be mounted: {why}", device.display())
    })
}
