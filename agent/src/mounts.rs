//! The kernel's own filesystems: /dev, /proc, /sys and what belongs below them.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;

use agent::guest::Mount;
use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind_recursive};

use crate::tree::{Tree, path_of};

/// A filesystem that has no device.
struct Virtual {
    target: &'static str,
    filesystem: &'static str,
    flags: MountFlags,
    options: &'static str,
    /// Whether a machine can do without it, where its kernel does not have it.
    optional: bool,
}

const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const DATA: MountFlags = SAFE.union(MountFlags::NOEXEC);

/// In this order: later ones are below earlier ones.
const VIRTUAL: [Virtual; 6] = [
    Virtual {
        target: "/dev",
        filesystem: "devtmpfs",
        flags: MountFlags::NOSUID,
        options: "mode=0755",
        optional: false,
    },
    Virtual {
        target: "/proc",
        filesystem: "proc",
        flags: DATA,
        options: "",
        optional: false,
    },
    Virtual {
        target: "/sys",
        filesystem: "sysfs",
        flags: DATA,
        options: "",
        optional: false,
    },
    Virtual {
        target: "/dev/pts",
        filesystem: "devpts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        options: "gid=5,mode=0620,ptmxmode=0666",
        optional: true,
    },
    Virtual {
        target: "/dev/shm",
        filesystem: "tmpfs",
        flags: SAFE,
        options: "mode=1777",
        optional: true,
    },
    Virtual {
        target: "/sys/fs/cgroup",
        filesystem: "cgroup2",
        flags: DATA,
        options: "nsdelegate",
        optional: true,
    },
];

/// The names below /dev that programs expect and devtmpfs does not have.
const DEV_LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts them in the initramfs.
pub fn mount_virtual() -> Result<()> {
    for Virtual {
        target,
        filesystem,
        flags,
        options,
        optional,
    } in VIRTUAL
    {
        // sysfs makes its own mount points; where cgroups are missing there is none.
        if !target.starts_with("/sys/") {
            fs::create_dir_all(target)
                .with_context(|| format!("{target} cannot be made in the initramfs"))?;
        }
        let options = std::ffi::CString::new(options)?;
        match mount(filesystem, target, filesystem, flags, options.as_c_str()) {
            Ok(()) | Err(Errno::BUSY) => {}
            Err(Errno::NODEV | Errno::NOENT) if optional => {}
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("{filesystem} cannot be mounted at {target}"));
            }
        }
    }
    for (target, link) in DEV_LINKS {
        match symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("{link} cannot be made"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Shows the initramfs's /dev, /proc and /sys, with all that is mounted below them, in `tree` too.
pub fn share_virtual(tree: &Tree) -> Result<()> {
    for target in ["/dev", "/proc", "/sys"] {
        let directory = tree.make_directory(target, 0o755).with_context(|| {
            format!("the root filesystem has no directory {target} and none can be made")
        })?;
        mount_bind_recursive(target, path_of(&directory))
            .with_context(|| format!("{target} cannot be mounted in the root filesystem"))?;
    }
    Ok(())
}

/// Mounts a fresh tmpfs at `target` of `tree`.
pub fn mount_tmpfs(tree: &Tree, target: &str, options: &str) -> Result<()> {
    mount_in(
        tree,
        &Mount {
            source: "tmpfs".to_owned(),
            target: target.to_owned(),
            filesystem: "tmpfs".to_owned(),
            options: options.to_owned(),
        },
        SAFE,
    )
}

/// Mounts what the host asked for below the machine's root.
pub fn mount_requested(tree: &Tree, mounts: &[Mount]) -> Result<()> {
    mounts
        .iter()
        .try_for_each(|mount| mount_in(tree, mount, MountFlags::empty()))
}

fn mount_in(tree: &Tree, request: &Mount, flags: MountFlags) -> Result<()> {
    let Mount {
        source,
        target,
        filesystem,
        options,
    } = request;
    let directory = tree.make_directory(target, 0o755).with_context(|| {
        format!("the mount point {target} cannot be made in the machine's root")
    })?;
    let options = std::ffi::CString::new(options.as_str())?;
    mount(
        source.as_str(),
        path_of(&directory),
        filesystem.as_str(),
        flags,
        options.as_c_str(),
    )
    .with_context(|| format!("{source} cannot be mounted at {target} as {filesystem}"))
}
