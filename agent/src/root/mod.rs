//! The root filesystem that commands see.
//!
//! The agent stays in the initramfs. Another root is mounted below it, gets /dev, /proc and /sys,
//! and is then moved over `/` (an initramfs cannot be pivoted away), where processes that change
//! root to it are at the top of the mount tree: the kernel denies user namespaces elsewhere.

mod block;
mod builtin;
mod disk;
mod share;

use agent::guest::{Guest, Root};
use anyhow::{Context, Result};
use rustix::mount::{
    MountFlags, MountPropagationFlags, mount, mount_bind, mount_change, mount_move,
};

pub use self::share::Expected;
use crate::mounts;
use crate::reap::{Child, Reaper};
use crate::tree::{Tree, path_of};

/// Where another root is put together.
const ROOT: &str = "/mvm/root";

/// What lies below it, where writes go elsewhere.
const LOWER: &str = "/mvm/lower";

/// Programs that the host put into the initramfs, and where a 9p root shows them.
const PROGRAMS: &str = "/mvm/bin";
const PROGRAMS_SHOWN: &str = "/dev/mvm";

/// The largest message of a 9p mount; the kernel lowers it to what the transport can carry.
const NINEP_OPTIONS: &std::ffi::CStr = c"trans=virtio,version=9p2000.L,msize=1048576,cache=mmap";

/// A root that is ready, or will be when what is missing has come.
#[derive(Debug)]
pub struct Prepared {
    /// The root.
    pub tree: Tree,
    /// What commands wait for.
    pub missing: Missing,
}

/// What a root is waiting for.
#[derive(Debug)]
pub enum Missing {
    /// Nothing.
    Nothing,
    /// A child that still completes it.
    Furnishing(Child),
    /// All of it: the host serves it.
    All(Box<Expected>),
}

/// Makes the root that `guest` asks for, with all that is mounted below it.
pub fn prepare(guest: &Guest, reaper: &Reaper) -> Result<Prepared> {
    let (tree, missing) = match &guest.root {
        Root::Initramfs => {
            builtin::write_files().context("the built-in root cannot be completed")?;
            let furnishing =
                builtin::link_applets(reaper).context("the built-in root cannot be completed")?;
            let missing = furnishing.map_or(Missing::Nothing, Missing::Furnishing);
            (Tree::own()?, missing)
        }
        Root::Disk {
            serial,
            partition,
            filesystem,
            read_only,
        } => {
            let device = block::wait_for(serial, *partition)?;
            disk::mount_root(&device, filesystem, *read_only, ROOT)?;
            let tree = enter()?;
            furnish(&tree)?;
            (tree, Missing::Nothing)
        }
        Root::NineP { tag } => {
            std::fs::create_dir_all(ROOT)?;
            mount(tag.as_str(), ROOT, "9p", MountFlags::empty(), NINEP_OPTIONS).with_context(
                || format!("the host's filesystem cannot be mounted over 9p (tag {tag})"),
            )?;
            show_programs()?;
            (enter()?, Missing::Nothing)
        }
        Root::Share { overlay } => {
            let expected = Expected::new(*overlay, guest.mounts.clone());
            return Ok(Prepared {
                tree: Tree::later(),
                missing: Missing::All(Box::new(expected)),
            });
        }
    };
    mounts::mount_requested(&tree, &guest.mounts)?;
    Ok(Prepared { tree, missing })
}

/// Gives a root what every system has to have and its image need not bring.
fn furnish(tree: &Tree) -> Result<()> {
    mounts::mount_tmpfs(tree, "/run", "mode=0755")?;
    tree.make_directory("/tmp", 0o1777)
        .context("the root filesystem has no directory /tmp and none can be made")?;
    // Containers and systemd expect mounts to propagate, as on a distribution.
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    mount_change(path_of(tree.directory()?), shared).context("the root's mounts cannot be shared")
}

/// Shows the programs that the host put into the initramfs below /dev, the one directory of a host's
/// root that is the machine's own.
fn show_programs() -> Result<()> {
    if std::fs::exists(PROGRAMS)? {
        std::fs::create_dir_all(PROGRAMS_SHOWN)?;
        mount_bind(PROGRAMS, PROGRAMS_SHOWN)
            .with_context(|| format!("{PROGRAMS} cannot be shown at {PROGRAMS_SHOWN}"))?;
    }
    Ok(())
}

/// Completes what is mounted at [`ROOT`] and moves it over `/`.
fn enter() -> Result<Tree> {
    let tree = Tree::below(ROOT).context("the root filesystem cannot be opened")?;
    mounts::share_virtual(&tree)?;
    mount_move(ROOT, "/").context("the root filesystem cannot be moved over the initramfs")?;
    Ok(tree)
}
