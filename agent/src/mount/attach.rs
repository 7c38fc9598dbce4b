//! Mounting a FUSE filesystem, and taking the mount away again.
//!
//! The filesystem is made before it is anywhere in the machine's tree, so it is shown to work before
//! somebody can stumble upon it. Nothing here keeps a descriptor of the mount, which would be somebody
//! who uses it: it is found again by its place, and known by its number.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use agent::protocol::Mount;
use rustix::fs::{AtFlags, Mode, OFlags, Statx, StatxFlags, openat, statx};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};

use super::device;
use crate::tree::{Tree, path_of};

/// What a string of a mount may be long: fsconfig(2) takes 256 bytes with the end.
const MAX_SOURCE: usize = 255;

/// A FUSE filesystem that is mounted nowhere yet.
pub struct Filesystem {
    mount: OwnedFd,
}

impl Filesystem {
    /// Makes the filesystem that `device` is the other end of; fails with a sentence.
    ///
    /// Nobody is asked anything before [`Filesystem::try_out`], but the kernel's first request is there from now on.
    pub fn new(device: &OwnedFd, request: &Mount) -> Result<Self, String> {
        Self::make(device, request).map_err(|errno| match errno {
            Errno::NODEV => device::no_fuse(),
            Errno::PERM => "the agent may not mount anything".to_owned(),
            errno => format!("the kernel makes no FUSE filesystem of the shared folder: {errno}"),
        })
    }

    fn make(device: &OwnedFd, request: &Mount) -> rustix::io::Result<Self> {
        let is_root = matches!(request.at, agent::protocol::MountPoint::Root);
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let source = request.source.get(..MAX_SOURCE).unwrap_or(&request.source);
        let strings = [
            ("subtype", b"mvm".to_vec()),
            ("source", source.to_vec()),
            ("fd", device.as_raw_fd().to_string().into_bytes()),
            (
                "rootmode",
                format!("{:o}", request.mode & 0o177_777).into_bytes(),
            ),
            ("user_id", b"0".to_vec()),
            ("group_id", b"0".to_vec()),
        ];
        for (key, value) in strings {
            fsconfig_set_string(&context, key, value)?;
        }
        for key in ["allow_other", "default_permissions"] {
            fsconfig_set_flag(&context, key)?;
        }
        fsconfig_create(&context)?;
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NODEV;
        if !is_root {
            attributes |= MountAttrFlags::MOUNT_ATTR_NOSUID;
        }
        // Of the mount alone: what the host has changed is done again through another one.
        if request.read_only {
            attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
        }
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        Ok(Self { mount })
    }

    /// Opens what ends the kernel's connection; fails with a sentence.
    ///
    /// The file belongs to this connection and does nothing once that is gone, whoever gets its number.
    pub fn abort_file(&self) -> Result<OwnedFd, String> {
        let open = || -> rustix::io::Result<OwnedFd> {
            let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
            fsconfig_create(&context)?;
            let none = MountAttrFlags::empty();
            let control = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, none)?;
            let file = format!("{}/abort", device_of(&look(&self.mount, "")?));
            openat(
                &control,
                file,
                OFlags::WRONLY | OFlags::CLOEXEC,
                Mode::empty(),
            )
        };
        open().map_err(|errno| {
            format!("the kernel's control of FUSE cannot be had (fusectl): {errno}")
        })
    }

    /// Waits until the host has answered the first requests; fails with a sentence where they are refused.
    pub fn try_out(&self) -> Result<(), String> {
        let asked = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
        let seen = statx(&self.mount, "", asked, StatxFlags::BASIC_STATS);
        seen.map(drop).map_err(|errno| match errno {
            Errno::CONNREFUSED => {
                "the machine's kernel and the host do not agree on how to share folders: the kernel is older than \
                 Linux 5.15, or the host refused it"
                    .to_owned()
            }
            errno => format!("the shared folder cannot be looked at: {errno}"),
        })
    }

    /// Shows it over the directory, or the file, `target`, which is found again at `place`. Fails with a sentence.
    pub fn attach(self, target: &OwnedFd, place: Place) -> Result<Attached, String> {
        let known = look(&self.mount, "").map_err(|errno| errno.to_string())?;
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&self.mount, "", target, "", flags)
            .map_err(|errno| format!("the shared folder cannot be mounted: {errno}"))?;
        Ok(Attached {
            number: known.stx_mnt_id,
            device: device_of(&known),
            place,
        })
    }
}

/// Where a mount is found again.
#[derive(Debug)]
pub enum Place {
    /// Under this name in this directory.
    Below(OwnedFd, CString),
    /// It is the machine's root, or lies below that.
    Root,
}

/// A mount and its place.
#[derive(Debug)]
pub struct Attached {
    /// The kernel's number of the mount.
    number: u64,
    /// The filesystem's device, as the kernel numbers it.
    pub device: u64,
    place: Place,
}

/// Why a mount was not taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Everybody uses it.
    Root,
    /// Somebody uses it.
    Busy,
    /// It is not where it was: something else is mounted over it, or it was moved.
    Elsewhere,
    /// Anything else.
    Other(Errno),
}

impl Attached {
    /// Opens its top, as a place only: it is in use as long. `root` is the machine's root.
    ///
    /// # Errors
    /// Where it is not at its place any more.
    pub fn open(&self, root: &Tree) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let top = match &self.place {
            Place::Below(parent, name) => openat(parent, &**name, flags, Mode::empty())?,
            Place::Root => root.directory()?.try_clone_to_owned()?,
        };
        match look(&top, "")?.stx_mnt_id == self.number {
            true => Ok(top),
            false => Err(Errno::NOENT.into()),
        }
    }

    /// Unmounts it as `flags` say.
    pub fn unmount(&self, flags: UnmountFlags) -> Result<(), Refusal> {
        let Place::Below(parent, name) = &self.place else {
            return Err(Refusal::Root);
        };
        let seen = look(parent, &**name);
        let is_it = |seen: Statx| seen.stx_mnt_id == self.number && device_of(&seen) == self.device;
        if !seen.is_ok_and(is_it) {
            return Err(Refusal::Elsewhere);
        }
        let mut path = path_of(parent).into_bytes();
        path.push(b'/');
        path.extend_from_slice(name.as_bytes());
        unmount(path, flags | UnmountFlags::NOFOLLOW).map_err(|errno| match errno {
            Errno::BUSY => Refusal::Busy,
            errno => Refusal::Other(errno),
        })
    }
}

/// What is known without asking the host: where it is mounted, and the device's number.
fn look(at: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC;
    statx(at, name, flags, StatxFlags::MNT_ID)
}

/// The kernel's own way to number its devices, which fusectl and fdinfo show: 20 bits are the minor number.
pub fn device_of(seen: &Statx) -> u64 {
    u64::from(seen.stx_dev_major) << 20 | u64::from(seen.stx_dev_minor)
}
