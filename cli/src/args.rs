//! What was typed: the command line, before anything is made of it.
//!
//! `resolve` turns this into what it means. Only syntax is refused here, with exit code 2.

pub mod folder;
pub mod forward;
pub mod machine;
pub mod root;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::store::Name;

/// Runs programs in micro-VMs: a kernel of their own, in about a second, without root.
#[derive(Debug, Parser)]
#[command(
    name = "mvm",
    version,
    max_term_width = 100,
    subcommand_required = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a machine, run a command in it, and exit with the command's exit code
    Run(Box<RunArgs>),
    /// Those for machines that exist.
    #[command(flatten)]
    Machine(machine::MachineCommand),
    /// Own a machine in the background (started by mvm itself)
    #[command(hide = true)]
    Supervise {
        /// The machine
        name: Name,
    },
    /// Own the VMM of a machine for an mvm on the host (started by mvm itself)
    #[command(hide = true)]
    Runner(Box<RunArgs>),
    /// Copy files between the host and a machine
    Cp(CpArgs),
    /// Manage the kernels that machines boot
    #[command(subcommand)]
    Kernel(KernelCommand),
    /// Look after the emulated outer Linux that is used where KVM cannot run a guest
    #[command(subcommand)]
    Accel(AccelCommand),
    /// Show what this host offers to machines, and how to mend what is missing
    Doctor(DoctorArgs),
}

/// `mvm run`.
#[derive(Debug, Clone, Args)]
#[command(
    args_override_self = true,
    after_help = "\
Exit code: the command's own; 128+N when signal N killed it; 124 when --timeout ended it; \
125 when the machine failed; 126 when the command cannot be executed; 127 when it is not found; \
2 for a wrong command line.

Without a command an interactive shell is opened."
)]
pub struct RunArgs {
    /// Kernel to boot: an ELF vmlinux, a bzImage, or a name of `mvm kernel ls` [default: its first]
    #[arg(long, value_name = "KERNEL")]
    pub kernel: Option<PathBuf>,

    /// Boot this initramfs and nothing else; the serial console is then the interface
    #[arg(long, value_name = "FILE", conflicts_with_all = ["rootfs", "command"])]
    pub initrd: Option<PathBuf>,

    /// Root filesystem: a disk image (ext4, squashfs, erofs; whole or partitioned), which `:ro` keeps unchanged;
    /// a directory, which `:rw` lets the guest change; or `none` for a small one of mvm's own [default: the
    /// host's own, read-only, with the working directory shared; see --explain]
    #[arg(long, value_name = "IMAGE[:ro]|DIR[:rw]|none")]
    pub rootfs: Option<OsString>,

    /// Attach another disk image, unmounted
    #[arg(long, value_name = "IMAGE[:ro]")]
    pub disk: Vec<OsString>,

    /// Run this program of the root as PID 1, the agent beside it
    #[arg(long, value_name = "PROGRAM", requires = "rootfs")]
    pub init: Option<String>,

    /// Name of the machine, and its host name
    #[arg(long)]
    pub name: Option<Name>,

    /// Leave the machine running in the background, and print its name
    #[arg(short, long, conflicts_with_all = ["console", "initrd", "timing"])]
    pub detach: bool,

    /// Remove the machine when it has ended
    #[arg(long, requires = "detach")]
    pub rm: bool,

    /// Number of virtual CPUs
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=255))]
    pub cpus: u8,

    /// Memory, with a unit: 512M, 2G
    #[arg(short, long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub memory: u64,

    /// More words for the kernel's command line
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        allow_hyphen_values = true
    )]
    pub append: String,

    /// Network: an existing TAP interface, or none
    #[arg(long, value_name = "tap=IF|none", default_value = "none", value_parser = parse_net)]
    pub net: Net,

    /// Set an environment variable of the command; without a value, pass on the caller's
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<OsString>,

    /// Working directory of the command in the guest
    #[arg(short, long, value_name = "DIR", value_parser = parse_workdir)]
    pub workdir: Option<OsString>,

    /// User (name or number, optionally `:group`) that the command runs as
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,

    /// Pass standard input on even where it would not be
    #[arg(short, long)]
    pub interactive: bool,

    /// Run the command on a terminal
    #[arg(short, long)]
    pub tty: bool,

    /// End the machine after this time, with exit code 124 (30s, 5m)
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,

    /// Give up when the guest is not up after this time
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    pub boot_timeout: Duration,

    /// Be connected to the kernel's serial console instead of a command
    #[arg(long, conflicts_with_all = ["command", "tty"])]
    pub console: bool,

    /// Offer the guest's vsock ports at this Unix socket (`CONNECT <port>`)
    #[arg(long, value_name = "PATH")]
    pub vsock_uds: Option<PathBuf>,

    /// Show the kernel's boot messages and what mvm does on standard error
    #[arg(long)]
    pub verbose: bool,

    /// Show on standard error where the time went
    #[arg(long)]
    pub timing: bool,

    /// What of the host's root there is.
    #[command(flatten)]
    pub root: root::HostRootArgs,

    /// What is shared.
    #[command(flatten)]
    pub folder: folder::FolderArgs,

    /// What is forwarded.
    #[command(flatten)]
    pub forward: forward::ForwardArgs,

    /// How machines are run, and what may be done for that.
    #[command(flatten)]
    pub host: HostArgs,

    /// The command and its arguments
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// Options of every verb that runs or prepares machines.
#[derive(Debug, Args, Clone)]
pub struct HostArgs {
    /// How to run machines: KVM, an outer Linux emulated by QEMU, or whichever works
    #[arg(long, value_enum, default_value_t = Accel::Auto, env = "MVM_ACCEL")]
    pub accel: Accel,

    /// Install missing packages of the host where that needs no question (as root)
    #[arg(long, env = "MVM_YES", value_parser = clap::builder::FalseyValueParser::new())]
    pub yes: bool,
}

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// KVM where it can run a stock guest, else TCG
    Auto,
    /// The host's KVM
    Kvm,
    /// An outer Linux that QEMU emulates, with a KVM of its own: slow
    Tcg,
}

/// What `--net` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Net {
    /// No network device.
    None,
    /// The TAP interface of this name.
    Tap(String),
}

/// `mvm kernel`.
#[derive(Debug, Subcommand)]
pub enum KernelCommand {
    /// List the kernels that machines can boot, the default first
    Ls {
        /// How to print the list
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Download a kernel and its modules through the distribution's package client
    Fetch {
        /// `cloud`, `generic`, or a package name
        #[arg(default_value = "cloud")]
        package: String,
        /// Allow the package client to be run as root for what it lacks
        #[arg(long, env = "MVM_YES", value_parser = clap::builder::FalseyValueParser::new())]
        yes: bool,
    },
    /// Compile a small, fast-booting kernel from the distribution's kernel source
    Build {
        /// Install missing build tools (as root)
        #[arg(long, env = "MVM_YES", value_parser = clap::builder::FalseyValueParser::new())]
        yes: bool,
        /// Parallel compiler processes [default: one a CPU]
        #[arg(short, long, value_name = "N")]
        jobs: Option<usize>,
    },
    /// Add a kernel file of your own
    Add {
        /// An ELF vmlinux or a bzImage
        file: PathBuf,
        /// Its module tree (`…/lib/modules/VERSION`)
        #[arg(long, value_name = "DIR")]
        modules: Option<PathBuf>,
    },
    /// Boot this kernel where none is named
    Use {
        /// A name of `mvm kernel ls`, or a file; without one, mvm chooses again by itself
        kernel: Option<PathBuf>,
    },
    /// Remove a kernel
    Rm {
        /// Names of `mvm kernel ls`
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Name the options that a kernel lacks
    Check {
        /// An ELF vmlinux or a bzImage
        file: PathBuf,
        /// What it is to be fit for
        #[arg(long = "for", value_enum)]
        purpose: Vec<Purpose>,
        /// How to print the result
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
}

/// What a kernel is to be fit for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Purpose {
    /// Booting as a machine of mvm
    Boot,
    /// Mounting shared folders
    Share,
    /// Running Docker
    Docker,
}

/// `mvm accel`.
#[derive(Debug, Subcommand)]
pub enum AccelCommand {
    /// Say what would run machines here, and whether the outer Linux is up
    Status {
        /// How to print it
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Start the outer Linux ahead of the first machine
    Start {
        /// Install missing packages (as root)
        #[arg(long, env = "MVM_YES", value_parser = clap::builder::FalseyValueParser::new())]
        yes: bool,
    },
    /// Power the outer Linux off
    Stop,
    /// Run a command in the outer Linux, on the host's files
    Exec {
        /// The command and its arguments
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Own the outer Linux (started by mvm itself)
    #[command(hide = true)]
    Supervise,
}

/// `mvm cp`.
#[derive(Debug, Args)]
#[command(after_help = "\
A path in a machine is NAME:PATH, seen from its root directory; `-` is a tar archive on standard input \
or output. A host path with a colon is written ./with:colon.

A directory is copied with all that is in it: into the destination where that is a directory, else \
it becomes the destination. DIRECTORY/. is its content without itself. Permissions and times \
are kept; files are the caller's on the host and root's in the machine, without set-id bits, unless \
--archive is given. Symlinks are copied as such. Sockets are left out, and devices do not come to the host.

Exit code: 0 when everything was copied; 1 when not; 125 when the machine was not reached.")]
pub struct CpArgs {
    /// Keep user and group ids, set-id bits and extended attributes, as far as the receiving side may
    #[arg(short, long)]
    pub archive: bool,

    /// Copy what a symlink leads to, where FROM is one
    #[arg(short = 'L', long)]
    pub follow_link: bool,

    /// Show no progress
    #[arg(short, long)]
    pub quiet: bool,

    /// What to copy
    #[arg(value_name = "FROM", value_hint = clap::ValueHint::AnyPath)]
    pub from: OsString,

    /// Where to
    #[arg(value_name = "TO", value_hint = clap::ValueHint::AnyPath)]
    pub to: OsString,
}

/// `mvm doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// How to print the findings
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
}

/// Output for people or for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Aligned columns
    Table,
    /// One JSON document
    Json,
}

/// Parses a memory size: a whole number and a unit (K, M, G, T, also as KiB or KB; powers of 1024).
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| "a size is a whole number and a unit, such as 512M or 2G".to_owned())?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "" => return Err(format!("the unit is missing: write {number}M or {number}G")),
        _ => return Err(format!("`{unit}` is no unit: write K, M, G or T")),
    };
    let bytes = number
        .checked_mul(1 << shift)
        .ok_or_else(|| "that is more than 16 EiB".to_owned())?;
    if bytes < vmm::config::MIN_MEMORY {
        return Err(format!(
            "a machine needs at least {}M",
            vmm::config::MIN_MEMORY >> 20
        ));
    }
    Ok(bytes)
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("it has to be longer than nothing".to_owned()),
        Ok(duration) => Ok(duration),
        Err(error) => Err(format!("{error}; write 30s, 5m or 1h")),
    }
}

fn parse_net(text: &str) -> Result<Net, String> {
    match text.split_once('=') {
        None if text == "none" => Ok(Net::None),
        Some(("tap", name)) if !name.is_empty() => Ok(Net::Tap(name.to_owned())),
        _ => Err("write tap=INTERFACE or none".to_owned()),
    }
}

fn parse_workdir(text: &str) -> Result<OsString, String> {
    if text.starts_with('/') {
        Ok(text.into())
    } else {
        Err("it has to be an absolute path in the guest".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn run(words: &[&str]) -> Result<RunArgs, clap::Error> {
        let words = ["mvm", "run"].iter().chain(words);
        Cli::try_parse_from(words).map(|cli| match cli.command {
            Command::Run(args) => *args,
            other => panic!("parsed as {other:?}"),
        })
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn nothing_after_the_dashes_is_an_option() {
        let args = run(&["--verbose", "--", "ls", "--cpus", "9", "--", "-t"]).unwrap();
        assert_eq!(args.command, ["ls", "--cpus", "9", "--", "-t"]);
        assert_eq!((args.cpus, args.tty, args.verbose), (1, false, true));
    }

    #[test]
    fn the_last_of_a_repeated_option_counts() {
        let args = run(&[
            "--cpus", "2", "-m", "1G", "--cpus", "4", "--disk", "a", "--disk", "b",
        ]);
        let args = args.unwrap();
        assert_eq!((args.cpus, args.disk.len()), (4, 2));
    }

    #[test]
    fn sizes_need_a_unit_and_room_for_a_kernel() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        for bad in [
            "",
            "0",
            "0M",
            "1M",
            "12X",
            "512",
            "-1G",
            "1.5G",
            "99999999999T",
            "M",
        ] {
            assert!(parse_size(bad).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn wrong_values_are_usage_errors() {
        for bad in [
            &["--cpus", "0"][..],
            &["--cpus", "5000"],
            &["--net", "tap="],
            &["--net", "bridge"],
            &["--name", "a/b"],
            &["--name", ""],
            &["--timeout", "0s"],
            &["--timeout", "soon"],
            &["-w", "relative"],
            &["--initrd", "x", "--", "ls"],
            &["--frobnicate"],
            &["ls"],
        ] {
            assert_eq!(run(bad).unwrap_err().exit_code(), 2, "{bad:?}");
        }
        assert!(run(&["--name", &"n".repeat(300)]).is_err());
    }
}
