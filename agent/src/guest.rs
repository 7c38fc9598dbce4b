//! The description of a machine that the host writes into the initramfs for its agent.

use serde::{Deserialize, Serialize};

/// Where the host puts the encoded [`Guest`] (postcard) in the initramfs.
pub const GUEST_PATH: &str = "/mvm/guest";

/// All that the agent has to know to bring its machine up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// The machine's host name.
    pub hostname: String,
    /// Kernel modules to load, in this order: absolute paths of uncompressed files in the
    /// initramfs. One that the kernel says it has already (EEXIST) is fine.
    pub modules: Vec<String>,
    /// The root filesystem that commands see.
    pub root: Root,
    /// A program of the root to be PID 1 in place of the agent, which then runs beside it.
    pub init: Option<String>,
    /// The host's clock when it wrote this: nanoseconds since 1970-01-01 UTC.
    pub epoch_ns: u64,
    /// Fresh random bytes for the guest's entropy pool.
    pub entropy: Vec<u8>,
    /// More filesystems to mount below the root, in this order.
    pub mounts: Vec<Mount>,
    /// Settings of the kernel, for what its command line cannot say. One that the kernel does not
    /// know is passed over.
    pub settings: Vec<Setting>,
}

/// A setting of the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// A file below /proc/sys or /sys.
    pub path: String,
    /// What to write into it.
    pub value: String,
}

/// Where the root filesystem comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Root {
    /// The initramfs itself: the small built-in root.
    Initramfs,
    /// A virtio block device.
    Disk {
        /// The serial number that the device reports (`/sys/block/*/serial`).
        serial: String,
        /// The partition with the filesystem, from 1; None is the whole disk.
        partition: Option<u32>,
        /// The filesystem's name for mount(2): `ext4`, `squashfs`, `erofs`.
        filesystem: String,
        /// Mount it read-only and put a tmpfs over it, so that the root is writable all the same.
        read_only: bool,
    },
    /// A directory that the host serves. The agent says that the machine is ready before it is there, and makes it
    /// the root when the host asks for it to be mounted ([`MountPoint::Root`](crate::protocol::MountPoint)).
    /// What needs the root waits for it.
    Share {
        /// Put a tmpfs over it, so that the root is writable and the host's directory stays as it is.
        overlay: bool,
    },
    /// A 9p export of the outer Linux's host.
    NineP {
        /// The export's mount tag.
        tag: String,
    },
}

/// One filesystem below the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// What to mount: a device, a 9p tag, or the filesystem's own name.
    pub source: String,
    /// Absolute path in the root; made (as a directory) where it is missing.
    pub target: String,
    /// The filesystem's name for mount(2).
    pub filesystem: String,
    /// Comma-separated options for mount(2)'s data argument.
    pub options: String,
}
