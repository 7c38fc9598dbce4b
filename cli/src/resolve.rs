//! What the command line of `mvm run` means: everything decided before a machine is made.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use agent::guest::{Guest, Root};
use agent::protocol::Exec;
use anyhow::{Context, Result};
use kernels::cache::Cache;
use kernels::select::Kernel;
use vmm::boot::cmdline;
use vmm::{DiskConfig, Initrd, MachineConfig, NetConfig, VsockConfig};

use crate::args::{Net, RunArgs};
use crate::host_root::HostRoot;
use crate::rootfs::{self, Mode, Rootfs, split_mode};
use crate::store::Name;
use crate::{accel, guest, session, terminal};

/// Every machine's vsock context id: the device is in user space, so ids need not differ.
const GUEST_CID: u64 = 3;

/// The host name of a machine without a name.
const HOSTNAME: &str = "mvm";

/// An image that is attached, and whether it was asked to stay unchanged.
fn disk(text: &OsStr) -> (PathBuf, bool) {
    let (path, mode) = split_mode(text);
    (path.into(), mode == Some(Mode::ReadOnly))
}

/// The images of a machine's disks, the root first, and whether each was asked to stay unchanged.
pub fn disks(args: &RunArgs) -> Vec<(PathBuf, bool)> {
    let rootfs = Rootfs::of(args);
    let root = rootfs.image();
    let root = root.map(|(path, read_only)| (path.to_owned(), read_only));
    let others = args.disk.iter().map(|text| disk(text));
    root.into_iter().chain(others).collect()
}

/// The machine's own part of the configuration; the initial RAM disk is missing where `guest` has to be
/// packed into one.
pub fn machine(args: &RunArgs, kernel: &Kernel, root: &Root) -> Result<MachineConfig> {
    let mut disks = Vec::new();
    if let Some((path, as_asked)) = Rootfs::of(args).image() {
        // One that cannot be written to may be shared by many machines, `:ro` or not.
        let read_only = matches!(
            root,
            Root::Disk {
                read_only: true,
                ..
            }
        );
        disks.push(DiskConfig {
            path: path.to_owned(),
            read_only: as_asked || read_only,
            serial: rootfs::SERIAL.to_owned(),
        });
    }
    for (index, text) in args.disk.iter().enumerate() {
        let (path, read_only) = disk(text);
        disks.push(DiskConfig {
            path,
            read_only,
            serial: format!("mvm-disk{index}"),
        });
    }
    let net = match &args.net {
        Net::None => None,
        Net::Tap(tap) => Some(NetConfig {
            tap: accel::tap::source(tap)?,
            mac: mac_address()?,
            queue_pairs: 1,
        }),
    };
    // Without a watcher the console is only there to tell why a boot failed.
    let loglevel = if args.console || args.verbose || args.initrd.is_some() {
        ""
    } else {
        "quiet"
    };
    Ok(MachineConfig {
        cpus: args.cpus,
        memory: args.memory.next_multiple_of(vmm::config::MEMORY_GRANULE),
        kernel: kernel.vmlinux.clone(),
        initrd: args.initrd.clone().map(Initrd::File),
        cmdline: cmdline::join([
            cmdline::DEFAULT,
            cmdline::SERIAL_CONSOLE,
            loglevel,
            if accel::is_outer() {
                accel::ON_EMULATED_CPU
            } else {
                ""
            },
            &args.append,
        ]),
        disks,
        net,
        vsock: Some(VsockConfig {
            cid: GUEST_CID,
            uds: args.vsock_uds.clone(),
        }),
        rng: true,
        balloon: true,
        console: None,
    })
}

/// A locally administered address of this machine alone (IEEE 802: bit 1 of the first byte).
fn mac_address() -> Result<[u8; 6]> {
    let mut mac = [0u8; 6];
    rustix::rand::getrandom(&mut mac, rustix::rand::GetRandomFlags::empty())
        .context("the host gives no random bytes")?;
    mac[0] = mac[0] & 0xfc | 0x02;
    Ok(mac)
}

/// Modules for the disks that a machine without one as its root may be given, as far as the kernel has them.
const OF_DISKS: [&str; 4] = ["ext4", "squashfs", "erofs", "overlay"];

/// What the guest's agent is told, and the initial RAM disk that tells it.
pub fn initramfs(args: &RunArgs, kernel: &Kernel, root: &Root, cache: &Cache) -> Result<Vec<u8>> {
    let mut required = guest::MACHINE_MODULES.to_vec();
    let mut optional = guest::OPTIONAL_MODULES.to_vec();
    if !args.disk.is_empty() || matches!(root, Root::Disk { .. }) {
        required.push("virtio_blk");
    }
    if args.net != Net::None {
        required.push("virtio_net");
    }
    if !args.folder.volume.is_empty() {
        required.push("fuse");
    }
    let mut files = Vec::new();
    match root {
        Root::Disk {
            filesystem,
            read_only,
            ..
        } => {
            required.push(filesystem);
            if *read_only {
                required.push("overlay");
            }
        }
        Root::Share { overlay } => {
            required.push("fuse");
            if *overlay {
                required.push("overlay");
            }
            optional.extend(OF_DISKS);
        }
        _ => {
            optional.extend(OF_DISKS);
            files.push((
                "/bin/busybox",
                0o755,
                crate::kernel::busybox(
                    cache,
                    kernels::package::Consent::None,
                    &kernels::progress::Stderr::new(),
                )?,
            ));
        }
    }
    let modules = crate::kernel::modules(kernel, &required, &optional)?;
    let hostname = args.name.as_ref().map_or(HOSTNAME, Name::as_str);
    let mut description: Guest = guest::describe(hostname, root.clone())?;
    description.init = args.init.clone();
    let files: Vec<_> = files
        .iter()
        .map(|(path, mode, content)| (*path, *mode, content.as_slice()))
        .collect();
    guest::initramfs(description, &modules, &files)
}

/// What commands of a machine have, where they do not say otherwise.
#[derive(Debug)]
pub struct Surroundings {
    /// Who they run as; None is root.
    pub user: Option<String>,
    /// Their variables.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where they run; None is the user's home.
    pub workdir: Option<Vec<u8>>,
}

impl Surroundings {
    /// Those of a machine from `args`, which may have the host's root.
    pub fn of(args: &RunArgs, host: Option<&HostRoot>) -> Self {
        let mut env = host.map_or_else(Vec::new, |host| host.environment(args.user.as_deref()));
        env.extend(environment(&args.env, false));
        let here = host.map(|host| host.caller().cwd.as_os_str());
        Self {
            user: user(args, host),
            env,
            workdir: args.workdir.as_deref().or(here).map(bytes),
        }
    }
}

/// The command as the agent is asked for it.
pub fn exec(args: &RunArgs, host: Option<&HostRoot>) -> Exec {
    let shell = args.command.is_empty();
    let on_terminal = args.tty || (shell && terminal::stdin_is_terminal());
    let Surroundings {
        user,
        mut env,
        workdir,
    } = Surroundings::of(args, host);
    env.splice(..0, environment(&[], on_terminal));
    Exec {
        session: session::fresh_id(),
        argv: args.command.iter().map(|word| bytes(word)).collect(),
        env,
        clear_env: false,
        cwd: workdir,
        cwd_or_home: args.workdir.is_none(),
        user,
        terminal: on_terminal.then(terminal::window_size),
        stdin: args.interactive || shell || terminal::stdin_is_ours(),
        in_initramfs: false,
    }
}

/// Who commands run as; None is root.
pub fn user(args: &RunArgs, host: Option<&HostRoot>) -> Option<String> {
    args.user.clone().or_else(|| host.map(HostRoot::user))
}

/// `-e NAME=VALUE` as given, `-e NAME` from the caller's environment where it is set there.
pub fn environment(given: &[OsString], on_terminal: bool) -> Vec<(Vec<u8>, Vec<u8>)> {
    let term = env::var_os("TERM").filter(|_| on_terminal);
    let term = term.map(|value| (b"TERM".to_vec(), value.into_vec()));
    let given = given.iter().filter_map(|item| {
        let item = item.as_bytes();
        match item.iter().position(|&byte| byte == b'=') {
            Some(at) => Some((item[..at].to_vec(), item[at + 1..].to_vec())),
            None => Some((
                item.to_vec(),
                env::var_os(OsStr::from_bytes(item))?.into_vec(),
            )),
        }
    });
    term.into_iter().chain(given).collect()
}

fn bytes(text: &OsStr) -> Vec<u8> {
    text.as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unset_variable_is_not_passed_on() {
        let given = ["A=1", "B=x=y", "C=", "MVM_NO_SUCH_VARIABLE"].map(OsString::from);
        let pairs = environment(&given, false);
        let pairs: Vec<_> = pairs
            .iter()
            .map(|(name, value)| (name.as_slice(), value.as_slice()))
            .collect();
        assert_eq!(pairs, [(&b"A"[..], &b"1"[..]), (b"B", b"x=y"), (b"C", b"")]);
    }

    #[test]
    fn a_made_up_mac_address_is_local_and_unicast() {
        for _ in 0..64 {
            assert_eq!(mac_address().unwrap()[0] & 3, 2);
        }
    }
}
