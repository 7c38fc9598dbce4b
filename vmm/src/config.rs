//! The description of a machine: plain data, and what is checked of it before anything is opened.

use std::fmt;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use thiserror::Error;

/// The least memory a machine is given; below it no kernel gets as far as saying why it cannot boot.
pub const MIN_MEMORY: u64 = 32 << 20;

/// The unit of [`MachineConfig::memory`]: memory is given in whole pages of 2 MiB.
pub const MEMORY_GRANULE: u64 = 2 << 20;

/// The context ids of vsock that are taken: hypervisor, loopback and host.
const RESERVED_CIDS: std::ops::RangeInclusive<u64> = 0..=2;

/// All that [`crate::launch`] needs to know of a machine.
///
/// Paths are opened once, at launch. The default has one vCPU, 512 MiB and no kernel.
pub struct MachineConfig {
    /// Number of vCPUs, 1 to 255.
    pub cpus: u8,
    /// Guest memory in bytes: a multiple of 2 MiB, at least 32 MiB.
    pub memory: u64,
    /// An ELF vmlinux with a PVH note or a 64-bit entry, or a bzImage.
    ///
    /// An ELF is mapped copy-on-write, so the file must not change while the machine runs.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<Initrd>,
    /// The kernel's command line; see [`crate::boot::cmdline`].
    pub cmdline: String,
    /// Block devices in the order in which the guest sees them.
    pub disks: Vec<DiskConfig>,
    /// A network card.
    pub net: Option<NetConfig>,
    /// A vsock device.
    pub vsock: Option<VsockConfig>,
    /// A source of entropy (virtio-rng).
    pub rng: bool,
    /// A memory balloon with free page reporting (virtio-balloon).
    pub balloon: bool,
    /// Where the serial console's output goes; None discards it.
    pub console: Option<Box<dyn Write + Send>>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory: 512 << 20,
            kernel: PathBuf::new(),
            initrd: None,
            cmdline: String::new(),
            disks: Vec::new(),
            net: None,
            vsock: None,
            rng: false,
            balloon: false,
            console: None,
        }
    }
}

impl fmt::Debug for MachineConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineConfig")
            .field("cpus", &self.cpus)
            .field("memory", &self.memory)
            .field("kernel", &self.kernel)
            .field("initrd", &self.initrd)
            .field("cmdline", &self.cmdline)
            .field("disks", &self.disks)
            .field("net", &self.net)
            .field("vsock", &self.vsock)
            .field("rng", &self.rng)
            .field("balloon", &self.balloon)
            .finish_non_exhaustive()
    }
}

/// An initial RAM disk.
pub enum Initrd {
    /// A file, mapped copy-on-write: it must not change while the machine runs.
    File(PathBuf),
    /// An archive in memory, as [`crate::boot::initramfs::Builder`] makes.
    Bytes(Vec<u8>),
}

impl fmt::Debug for Initrd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
        }
    }
}

/// A block device backed by a file or a host block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// The image.
    pub path: PathBuf,
    /// The guest cannot write to it.
    pub read_only: bool,
    /// What the guest reads from `/sys/block/*/serial`: at most 20 bytes.
    pub serial: String,
}

/// A network card on a TAP interface.
#[derive(Debug)]
pub struct NetConfig {
    /// The TAP interface.
    pub tap: TapSource,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// Pairs of receive and transmit queues, at least 1.
    pub queue_pairs: u16,
}

/// Where a network card's TAP interface is.
#[derive(Debug)]
pub enum TapSource {
    /// On this host, by its name.
    Interface(String),
    /// Elsewhere, behind a socket that carries its frames one message each; it serves one pair of
    /// queues. See [`devices::virtio::net::Tap::from_sockets`].
    Socket {
        /// Connected and non-blocking.
        socket: OwnedFd,
        /// The interface's MTU in bytes, where it is known.
        mtu: Option<u16>,
    },
}

/// A vsock device whose host end is this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's context id, 3 or above.
    pub cid: u64,
    /// A Unix socket with the CONNECT-line convention, made at launch.
    pub uds: Option<PathBuf>,
}

/// What is wrong with a [`MachineConfig`].
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// No vCPU.
    #[error("a machine needs at least one CPU")]
    NoCpus,
    /// Too little memory.
    #[error(
        "{memory} bytes of memory are too few for a kernel: give at least {} MiB",
        MIN_MEMORY >> 20
    )]
    TooLittleMemory {
        /// What was asked for, in bytes.
        memory: u64,
    },
    /// Memory in odd pieces.
    #[error("memory of {memory} bytes is not a multiple of 2 MiB")]
    MemoryGranule {
        /// What was asked for, in bytes.
        memory: u64,
    },
    /// A reserved vsock context id.
    #[error("the vsock context id {0} is reserved or too large: take one from 3 to 4294967294")]
    BadCid(u64),
    /// A network card without queues.
    #[error("a network card needs at least one pair of queues")]
    NoQueues,
}

impl MachineConfig {
    /// Checks what can be checked without opening anything.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.cpus == 0 {
            return Err(ConfigError::NoCpus);
        }
        let memory = self.memory;
        if memory < MIN_MEMORY {
            return Err(ConfigError::TooLittleMemory { memory });
        }
        if !memory.is_multiple_of(MEMORY_GRANULE) {
            return Err(ConfigError::MemoryGranule { memory });
        }
        if let Some(vsock) = &self.vsock
            && (RESERVED_CIDS.contains(&vsock.cid) || vsock.cid >= u64::from(u32::MAX))
        {
            return Err(ConfigError::BadCid(vsock.cid));
        }
        if self.net.as_ref().is_some_and(|net| net.queue_pairs == 0) {
            return Err(ConfigError::NoQueues);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_machine_is_valid() {
        assert_eq!(MachineConfig::default().validate(), Ok(()));
    }

    #[test]
    fn impossible_machines_are_refused() {
        let refused = |change: fn(&mut MachineConfig)| {
            let mut config = MachineConfig::default();
            change(&mut config);
            config.validate().unwrap_err()
        };
        assert_eq!(refused(|c| c.cpus = 0), ConfigError::NoCpus);
        for memory in [0, 1 << 20, MIN_MEMORY - 1] {
            let config = MachineConfig {
                memory,
                ..Default::default()
            };
            assert_eq!(
                config.validate(),
                Err(ConfigError::TooLittleMemory { memory })
            );
        }
        assert_eq!(
            refused(|c| c.memory = MIN_MEMORY + 4096),
            ConfigError::MemoryGranule {
                memory: MIN_MEMORY + 4096
            }
        );
        for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
            let config = MachineConfig {
                vsock: Some(VsockConfig { cid, uds: None }),
                ..Default::default()
            };
            assert_eq!(config.validate(), Err(ConfigError::BadCid(cid)));
        }
    }
}
