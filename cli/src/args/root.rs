//! What is typed about the host's root as the machine's.

use std::ffi::OsString;

use clap::Args;

use super::Format;

/// What of the host a machine has that is given no root of its own.
#[derive(Debug, Clone, Args)]
pub struct HostRootArgs {
    /// Show this path of the host too, read-only; `:rw` shares it, to be written
    #[arg(long, value_name = "PATH[:ro|rw]", conflicts_with_all = ["rootfs", "initrd"])]
    pub host_path: Vec<OsString>,

    /// Hide this path of the host
    #[arg(long, value_name = "PATH", conflicts_with_all = ["rootfs", "initrd"])]
    pub no_host_path: Vec<OsString>,

    /// List what of the host the machine would have, and start nothing
    #[arg(long, conflicts_with_all = ["rootfs", "initrd", "detach"])]
    pub explain: bool,

    /// How to print that
    #[arg(long, value_enum, default_value_t = Format::Table, requires = "explain")]
    pub format: Format,
}
