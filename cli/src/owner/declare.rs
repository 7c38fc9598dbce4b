//! What a machine forwards from the start: as it was typed, or as it was changed since.

use std::env;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result};

use super::Owned;
use crate::args::RunArgs;
use crate::folder::spec::Volume;
use crate::folder::{Folders, Root};
use crate::forward::proxy::Proxy;
use crate::forward::spec::{GuestEnd, HostEnd, PortRange, Publish};
use crate::forward::{Auto, Declarations, Forwarder};
use crate::host_root::HostRoot;
use crate::resolve;
use crate::rootfs::Rootfs;
use crate::store::{Bytes, Changes, Definition};

/// Where the caller's SSH agent is in the guest.
const SSH_AGENT: &str = "/run/mvm/ssh-agent.sock";

/// What is declared for a machine from `args` whose definition is `definition`.
pub fn declarations(args: &RunArgs, definition: &Definition) -> Result<Declarations> {
    let changes = &definition.changes;
    let typed = Auto {
        exclude: args.forward.publish_auto_exclude.clone(),
    };
    let auto = Auto {
        exclude: match &changes.exclude {
            Some(ports) => ports
                .iter()
                .filter_map(|&port| PortRange::new(port, port))
                .collect(),
            None => typed.exclude,
        },
    };
    Ok(Declarations {
        publish: match &changes.publish {
            Some(list) => parsed(list)?,
            None => args.forward.publish.clone(),
        },
        reverse: match &changes.reverse {
            Some(list) => parsed(list)?,
            None => args.forward.reverse.clone(),
        },
        auto: changes
            .auto
            .unwrap_or(args.forward.publish_auto)
            .then_some(auto),
        ssh_agent: ssh_agent_path(args).map(Path::to_owned),
    })
}

/// The folders that a machine from `args` whose definition is `definition` shares with its guest.
pub fn volumes(args: &RunArgs, definition: &Definition) -> Result<Vec<Volume>> {
    match &definition.changes.mounts {
        None => Ok(args.folder.volume.clone()),
        Some(list) => list.iter().map(volume).collect(),
    }
}

/// These, and what else of the host's files the machine has.
pub fn folders(
    args: &RunArgs,
    mut volumes: Vec<Volume>,
    host: Option<&HostRoot>,
) -> Result<Folders> {
    let writable = host.into_iter().flat_map(HostRoot::writable);
    volumes.extend(writable.map(Volume::at_its_own_path));
    let folders = Folders::new(volumes, resolve::user(args, host), args.cpus)?;
    if let Some(host) = host {
        let root = Root::of_host(host).context("the host's root cannot be the machine's")?;
        return Ok(folders.with_root(root));
    }
    Ok(match Rootfs::of(args) {
        Rootfs::Directory { path, writable } => {
            let root = Root::directory(&path, writable)
                .with_context(|| format!("{} cannot be a root filesystem", path.display()))?;
            folders.with_root(root)
        }
        Rootfs::Host | Rootfs::BuiltIn | Rootfs::Image { .. } => folders,
    })
}

/// A folder that was declared at the control socket or is written down.
pub fn volume(text: &Bytes) -> Result<Volume> {
    let parsed = Volume::parse(text.as_os_str());
    parsed.with_context(|| format!("{text} cannot be shared"))
}

/// The guest ports for which the host's are to be chosen.
pub fn without_host_port(declared: &Declarations) -> Vec<String> {
    let rules = declared.publish.iter().flat_map(Publish::rules);
    rules
        .filter(|rule| matches!(rule.host, HostEnd::Port { port: None, .. }))
        .filter_map(|rule| match rule.guest {
            GuestEnd::Port(port) => Some(port.to_string()),
            GuestEnd::Unix(_) => None,
        })
        .collect()
}

/// What is declared now, to be written down.
pub fn changes(args: &RunArgs, definition: &Definition) -> Changes {
    let mut changes = definition.changes.clone();
    changes
        .publish
        .get_or_insert_with(|| texts(&args.forward.publish));
    changes
        .reverse
        .get_or_insert_with(|| texts(&args.forward.reverse));
    changes.mounts.get_or_insert_with(|| {
        let typed = args.folder.volume.iter();
        typed.map(|volume| volume.text().into()).collect()
    });
    changes
}

fn texts<T: ToString>(list: &[T]) -> Vec<Bytes> {
    list.iter()
        .map(|item| item.to_string().as_str().into())
        .collect()
}

fn parsed<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    list: &[Bytes],
) -> Result<Vec<T>> {
    list.iter()
        .map(|text| {
            let text = text.to_string();
            text.parse()
                .with_context(|| format!("{text} cannot be forwarded"))
        })
        .collect()
}

/// Serves the proxy that `args` ask for.
pub fn proxy(args: &RunArgs, forwarder: &Forwarder) -> Result<Option<Proxy>> {
    let Some(at) = args.forward.socks else {
        return Ok(None);
    };
    if let Some(warning) = at.warning() {
        eprintln!("mvm: {warning}");
    }
    Ok(Some(Proxy::open(at, forwarder.clone())?))
}

/// Where commands of a machine from `args` find the caller's SSH agent.
pub fn ssh_agent_path(args: &RunArgs) -> Option<&'static Path> {
    args.forward.ssh_agent.then_some(Path::new(SSH_AGENT))
}

/// Lets the guest use the SSH agent of this process's own caller.
pub fn offer_ssh_agent(machine: &Owned) {
    if let Some(path) = env::var_os("SSH_AUTH_SOCK").map(PathBuf::from)
        && machine.args.forward.ssh_agent
    {
        machine.forwarder.offer_ssh_agent(path);
    }
}
