//! A machine, and what it has, as its owner tells of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Forward, State};
use crate::store::{Bytes, Name, Timestamp};

/// A machine as its owner sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inspection {
    /// Its name.
    pub name: Name,
    /// What it does.
    pub state: State,
    /// The process that owns it.
    pub pid: u32,
    /// The version of that process's mvm.
    pub mvm: String,
    /// When it was started.
    pub started: Timestamp,
    /// What runs its guest: `kvm` or `tcg`.
    pub accel: String,
    /// `uname -r` of the guest; None until it is up.
    #[serde(default)]
    pub kernel: Option<String>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// What runs in it; empty is a shell.
    pub command: Vec<Bytes>,
    /// Whether that is on a terminal.
    pub terminal: bool,
    /// Who commands run as that do not say; None is root.
    #[serde(default)]
    pub user: Option<String>,
    /// Variables that they have, each `NAME=VALUE`.
    #[serde(default)]
    pub env: Vec<Bytes>,
    /// Where they run; None is the user's home.
    #[serde(default)]
    pub workdir: Option<Bytes>,
    /// Disk images, the root first.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// The TAP interface, where there is one.
    #[serde(default)]
    pub tap: Option<String>,
    /// Folders of the host that the guest has.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// All forwards.
    #[serde(default)]
    pub forwards: Vec<Forward>,
    /// Whether ports are published as they appear.
    #[serde(default)]
    pub auto: bool,
    /// Ports that are not.
    #[serde(default)]
    pub exclude: Vec<u16>,
    /// The port of the SOCKS proxy, where there is one.
    #[serde(default)]
    pub socks: Option<u16>,
    /// Where commands in the guest find the caller's SSH agent, where they may use it.
    #[serde(default)]
    pub ssh_agent: Option<Bytes>,
    /// Anything else, for people.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub notes: BTreeMap<String, String>,
}

/// A disk of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The image's path on the host.
    pub path: Bytes,
    /// Whether the guest cannot change it.
    pub read_only: bool,
}

/// A folder, or a file, of the host that a guest has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Its path on the host.
    pub host: Bytes,
    /// Where the guest has it.
    pub guest: Bytes,
    /// Whether the guest cannot change it.
    pub read_only: bool,
    /// Who the user that shares it is in the guest.
    pub uid: u32,
    /// The same of its group.
    pub gid: u32,
    /// What the guest may believe: `auto`, `strict` or `private`.
    pub cache: String,
    /// Where its locks hold: in the `guest`, or on the `host` too.
    #[serde(default = "locks_of_the_guest")]
    pub locks: String,
}

fn locks_of_the_guest() -> String {
    "guest".to_owned()
}
