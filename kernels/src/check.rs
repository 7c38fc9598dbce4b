//! What a kernel lacks for a purpose, read from its configuration.
//!
//! What containers need was taken from the checks that Docker (moby's `check-config.sh`) and k3s
//! (`k3s check-config`) come with.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::{self, Config, Setting};

/// What a kernel is to be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Booting in a machine: devices, the agent, a root filesystem.
    Boot,
    /// Folders shared with the host.
    Share,
    /// Docker, Kubernetes and other container runtimes in the guest.
    Docker,
    /// Being the Linux that QEMU emulates where the host has no usable KVM.
    Outer,
}

impl Purpose {
    /// All purposes.
    pub const ALL: [Self; 4] = [Self::Boot, Self::Share, Self::Docker, Self::Outer];

    /// The purpose's name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Share => "share",
            Self::Docker => "docker",
            Self::Outer => "outer",
        }
    }

    fn options(self) -> &'static [Requirement] {
        match self {
            Self::Boot => BOOT,
            Self::Share => SHARE,
            Self::Docker => DOCKER,
            Self::Outer => OUTER,
        }
    }
}

/// An option that a kernel lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing {
    /// The option, without its `CONFIG_`. Where one of several will do, they are joined by "or".
    pub option: &'static str,
    /// What it is needed for.
    pub needed_for: &'static str,
    /// Whether the purpose fails without it; otherwise it only loses a feature.
    pub is_required: bool,
}

/// Why a kernel could not be checked.
#[derive(Debug, Error)]
pub enum CheckError {
    /// No configuration was found.
    #[error(
        "the configuration of {0} is not known: it was built without CONFIG_IKCONFIG, and no \
         config-VERSION is beside it or in /boot"
    )]
    NoConfig(PathBuf),
}

/// Names what the kernel in `path` lacks for `purpose`.
///
/// # Errors
/// When its configuration cannot be found.
pub fn check(path: &Path, purpose: Purpose) -> Result<Vec<Missing>, CheckError> {
    let text = config::of_file(path).ok_or_else(|| CheckError::NoConfig(path.to_owned()))?;
    Ok(missing(&Config::parse(&text), purpose))
}

/// Names what a kernel with this configuration lacks for `purpose`.
pub fn missing(config: &Config, purpose: Purpose) -> Vec<Missing> {
    let has_modules = config.setting("MODULES") != Setting::Off;
    purpose
        .options()
        .iter()
        .filter(|requirement| !requirement.is_met(config, has_modules))
        .map(|requirement| Missing {
            option: requirement.option,
            needed_for: requirement.needed_for,
            is_required: requirement.strength != Strength::Optional,
        })
        .collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strength {
    /// Has to be in the kernel itself.
    BuiltIn,
    /// May be a module.
    Required,
    /// Only a feature is lost without it.
    Optional,
}

struct Requirement {
    option: &'static str,
    needed_for: &'static str,
    strength: Strength,
}

impl Requirement {
    fn is_met(&self, config: &Config, has_modules: bool) -> bool {
        self.option
            .split(" or ")
            .any(|option| match config.setting(option) {
                Setting::BuiltIn => true,
                Setting::Module => has_modules && self.strength != Strength::BuiltIn,
                Setting::Off => false,
            })
    }
}

const fn built_in(option: &'static str, needed_for: &'static str) -> Requirement {
    Requirement {
        option,
        needed_for,
        strength: Strength::BuiltIn,
    }
}

const fn required(option: &'static str, needed_for: &'static str) -> Requirement {
    Requirement {
        option,
        needed_for,
        strength: Strength::Required,
    }
}

const fn optional(option: &'static str, needed_for: &'static str) -> Requirement {
    Requirement {
        option,
        needed_for,
        strength: Strength::Optional,
    }
}

const BOOT: &[Requirement] = &[
    built_in("64BIT", "running in an x86_64 machine"),
    built_in("BLK_DEV_INITRD", "the initramfs with the agent"),
    built_in("BINFMT_ELF", "starting the agent"),
    built_in("ACPI", "finding the machine's devices, and powering off"),
    built_in("PRINTK", "the boot log"),
    built_in("SERIAL_8250_CONSOLE", "the console"),
    built_in("PROC_FS", "the agent"),
    built_in("SYSFS", "the agent, which finds disks there"),
    built_in("DEVTMPFS", "device nodes"),
    built_in("TMPFS or SHMEM", "a writable layer over a read-only root"),
    built_in("UNIX98_PTYS", "interactive shells"),
    built_in("FUTEX", "threads"),
    built_in("EPOLL", "the agent"),
    built_in("SIGNALFD", "the agent"),
    required("VIRTIO_MMIO", "every virtio device of a machine"),
    required("VIRTIO_BLK", "disks"),
    required("VSOCKETS", "running commands in the machine"),
    required("VIRTIO_VSOCKETS", "running commands in the machine"),
    required("EXT4_FS or SQUASHFS or EROFS_FS", "a root filesystem"),
    required("OVERLAY_FS", "a writable layer over a read-only root"),
    optional("SMP", "more than one CPU"),
    optional("X86_X2APIC", "255 CPUs"),
    optional("KVM_GUEST", "the paravirtual clock and spinlocks"),
    optional("PVH", "the PVH entry"),
    optional("VIRTIO_NET", "networks"),
    optional("VIRTIO_BALLOON", "giving unused memory back to the host"),
    optional("PAGE_REPORTING", "giving unused memory back to the host"),
    optional("HW_RANDOM_VIRTIO", "randomness from the host"),
    optional("ACPI_BUTTON", "shutting down by the power button"),
    optional("INPUT_EVDEV", "shutting down by the power button"),
    optional("EXT4_FS", "ext4 roots"),
    optional("SQUASHFS", "squashfs roots"),
    optional("EROFS_FS", "EROFS roots"),
    optional("EFI_PARTITION", "disks with a GPT partition table"),
    optional("MSDOS_PARTITION", "disks with an MBR partition table"),
    optional("RD_GZIP", "gzip-compressed initrds"),
    optional("RD_ZSTD", "zstd-compressed initrds"),
];

const SHARE: &[Requirement] = &[
    required("FUSE_FS", "shared folders"),
    required("VSOCKETS", "shared folders over vsock"),
    required("VIRTIO_VSOCKETS", "shared folders over vsock"),
    optional("INOTIFY_USER", "programs that watch files"),
    optional("FHANDLE", "telling those programs of the host's changes"),
    optional("FANOTIFY", "programs that watch whole filesystems"),
    optional("IO_URING", "shared folders at full speed"),
    optional("X86_IOPL_IOPERM", "shared folders at full speed"),
    optional("VIRTIO_FS", "shared folders over virtiofs"),
    optional("NET_9P_VIRTIO", "shared folders over 9p"),
    optional("9P_FS", "shared folders over 9p"),
];

const DOCKER: &[Requirement] = &[
    built_in("NAMESPACES", "containers"),
    built_in("NET_NS", "containers"),
    built_in("PID_NS", "containers"),
    built_in("IPC_NS", "containers"),
    built_in("UTS_NS", "containers"),
    built_in("CGROUPS", "containers"),
    built_in("CGROUP_CPUACCT", "limits on CPU time"),
    built_in("CGROUP_DEVICE", "access to devices"),
    built_in("CGROUP_FREEZER", "pausing containers"),
    built_in("CGROUP_SCHED", "limits on CPU time"),
    built_in("CPUSETS", "limits on CPUs"),
    built_in("MEMCG", "limits on memory"),
    built_in("CGROUP_PIDS", "limits on processes"),
    built_in("CGROUP_BPF", "access to devices (cgroup version 2)"),
    built_in("BPF_SYSCALL", "access to devices (cgroup version 2)"),
    built_in("KEYS", "containers' key rings"),
    built_in("SECCOMP", "seccomp profiles"),
    built_in("SECCOMP_FILTER", "seccomp profiles"),
    built_in("POSIX_MQUEUE", "mounting /dev/mqueue"),
    required("OVERLAY_FS", "images"),
    required("VETH", "networks of containers"),
    required("BRIDGE", "networks of containers"),
    required("BRIDGE_NETFILTER", "traffic between containers"),
    required("NF_NAT", "published ports"),
    required("NF_CONNTRACK", "published ports"),
    required("IP_NF_FILTER or NF_TABLES", "packet filters"),
    required("IP_NF_MANGLE or NF_TABLES", "packet filters"),
    required(
        "IP_NF_TARGET_MASQUERADE or NETFILTER_XT_TARGET_MASQUERADE",
        "the way out of containers",
    ),
    required("NETFILTER_XT_MATCH_ADDRTYPE", "published ports"),
    required("NETFILTER_XT_MATCH_CONNTRACK", "packet filters"),
    required("NETFILTER_XT_MARK", "published ports, Kubernetes services"),
    optional("NETFILTER_XT_MATCH_COMMENT", "Kubernetes services"),
    optional("NETFILTER_XT_MATCH_MULTIPORT", "Kubernetes services"),
    optional("NETFILTER_XT_MATCH_STATISTIC", "Kubernetes services"),
    optional("NETFILTER_XT_MATCH_LIMIT", "Kubernetes network policies"),
    optional("NETFILTER_XT_MATCH_PHYSDEV", "Kubernetes network policies"),
    optional("NETFILTER_XT_TARGET_NFLOG", "Kubernetes network policies"),
    optional("NETFILTER_XT_SET", "Kubernetes network policies"),
    optional("IP_SET", "Kubernetes network policies"),
    optional("IP_SET_HASH_IP", "Kubernetes network policies"),
    optional("IP_SET_HASH_NET", "Kubernetes network policies"),
    optional("NETFILTER_XT_MATCH_IPVS", "Docker swarm, IPVS services"),
    optional("NETFILTER_XT_MATCH_BPF", "Docker swarm"),
    optional("IP_VS", "Docker swarm, IPVS services"),
    optional("IP_VS_NFCT", "Docker swarm, IPVS services"),
    optional("IP_VS_RR", "Docker swarm, IPVS services"),
    optional("IP_NF_NAT or NF_TABLES", "iptables"),
    optional(
        "IP_NF_TARGET_REDIRECT or NETFILTER_XT_TARGET_REDIRECT",
        "iptables",
    ),
    optional("NFT_COMPAT", "iptables over nftables"),
    optional("NF_TABLES", "nftables"),
    optional("NFT_NAT", "nftables"),
    optional("NFT_MASQ", "nftables"),
    optional("IP6_NF_FILTER or NF_TABLES", "IPv6 packet filters"),
    optional("USER_NS", "rootless containers"),
    optional("FUSE_FS", "rootless containers"),
    optional("TUN", "rootless containers, VPNs"),
    optional("BLK_CGROUP", "limits on disk traffic"),
    optional("BLK_DEV_THROTTLING", "limits on disk traffic"),
    optional("CGROUP_PERF", "performance counters of containers"),
    optional("CGROUP_HUGETLB", "limits on huge pages"),
    optional("CGROUP_NET_PRIO", "network priorities (cgroup version 1)"),
    optional("NET_CLS_CGROUP", "network classes (cgroup version 1)"),
    optional("CFS_BANDWIDTH", "limits on CPU time"),
    optional("FAIR_GROUP_SCHED", "limits on CPU time"),
    optional("EXT4_FS_POSIX_ACL", "images with access control lists"),
    optional("EXT4_FS_SECURITY", "images with file capabilities"),
    optional("VXLAN", "overlay networks"),
    optional("BRIDGE_VLAN_FILTERING", "overlay networks"),
    optional("IPVLAN", "ipvlan networks"),
    optional("MACVLAN", "macvlan networks"),
    optional("DUMMY", "macvlan networks"),
    optional("WIREGUARD", "encrypted networks (flannel, VPNs)"),
    optional("NF_NAT_FTP", "FTP from containers"),
    optional("NF_NAT_TFTP", "TFTP from containers"),
    optional("INET_ESP", "Docker swarm's encrypted overlay networks"),
];

const OUTER: &[Requirement] = &[
    built_in("64BIT", "running in an emulated x86_64 machine"),
    built_in("BLK_DEV_INITRD", "the initramfs with the agent"),
    built_in("SERIAL_8250_CONSOLE", "the console"),
    built_in("DEVTMPFS", "device nodes"),
    built_in("PCI", "QEMU's devices"),
    required("VIRTIO_PCI", "QEMU's devices"),
    required("KVM_AMD", "machines inside of it"),
    required("NET_9P_VIRTIO", "the host's files"),
    required("9P_FS", "the host's files"),
    optional("PVH", "starting without QEMU's firmware unpacking it"),
    optional("TUN", "machines with a network inside of it"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn options(config: &str, purpose: Purpose) -> Vec<&'static str> {
        missing(&Config::parse(config), purpose)
            .into_iter()
            .filter(|missing| missing.is_required)
            .map(|missing| missing.option)
            .collect()
    }

    #[test]
    fn the_fragment_has_all_that_every_purpose_requires() {
        // What tinyconfig or other options bring.
        let implied = "CONFIG_NF_NAT=y\nCONFIG_SHMEM=y\n";
        let text = format!("{}\n{implied}", crate::build::FRAGMENT);
        for purpose in Purpose::ALL {
            assert_eq!(options(&text, purpose), [""; 0], "{}", purpose.name());
        }
    }

    #[test]
    fn the_fragment_has_every_feature_but_ipsec() {
        let config = Config::parse(crate::build::FRAGMENT);
        let lost: Vec<&str> = Purpose::ALL
            .iter()
            .flat_map(|&purpose| missing(&config, purpose))
            .map(|missing| missing.option)
            // Selected by options of the fragment.
            .filter(|option| !["PAGE_REPORTING", "NF_NAT_FTP", "NF_NAT_TFTP"].contains(option))
            .collect();
        assert_eq!(lost, ["INET_ESP"]);
    }

    #[test]
    fn a_module_does_only_where_it_can_be_loaded() {
        let share = "CONFIG_FUSE_FS=m\nCONFIG_VSOCKETS=m\nCONFIG_VIRTIO_VSOCKETS=m\n";
        assert_eq!(
            options(share, Purpose::Share),
            ["FUSE_FS", "VSOCKETS", "VIRTIO_VSOCKETS"]
        );
        let with_modules = format!("CONFIG_MODULES=y\n{share}");
        assert_eq!(options(&with_modules, Purpose::Share), [""; 0]);
    }

    #[test]
    fn what_boots_the_machine_cannot_be_a_module() {
        let config = "CONFIG_MODULES=y\nCONFIG_DEVTMPFS=m\nCONFIG_ACPI=m\n";
        let missing = options(config, Purpose::Boot);
        assert!(missing.contains(&"DEVTMPFS"), "{missing:?}");
        assert!(missing.contains(&"ACPI"), "{missing:?}");
    }

    #[test]
    fn one_of_several_options_is_enough() {
        let has = |config: &str| {
            !options(config, Purpose::Boot).contains(&"EXT4_FS or SQUASHFS or EROFS_FS")
        };
        assert!(has("CONFIG_EROFS_FS=y"));
        assert!(!has("CONFIG_XFS_FS=y"));
    }
}
