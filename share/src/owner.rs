//! Whose files are in the guest's eyes, and what the host cannot keep of that.
//!
//! A file that the guest makes belongs to the user who runs this process. Where the guest has it
//! otherwise (another owner, setuid, a file that its owner may not read), that is remembered in the
//! extended attribute [`XATTR`] of the file:
//!
//! ```text
//! UID:GID:ADDED:TAKEN[:KIND:MAJOR:MINOR]
//! ```
//!
//! `UID` and `GID` are decimal, or `-` where the host's own hold; `ADDED` and `TAKEN` are octal
//! permission bits that the guest sees besides those on the host, and does not see though the host
//! has them. `0:0:4000:0` is a setuid program of root. `KIND` is `c` or `b`: what the host has as an
//! empty file is a device to the guest. The host never has a file setuid or setgid, nor a device,
//! because a guest wanted it.
//!
//! Symbolic links, sockets and FIFOs cannot carry such an attribute, and some filesystems have none: for
//! those it is remembered as long as the guest knows the inode, and no longer.

use std::ffi::CStr;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::str::FromStr;

use rustix::fs::{FileType, XattrFlags};
use rustix::io::Errno;

use crate::host::{ProcPath, Stat};
use crate::inode::{Inode, lock};

/// The extended attribute that remembers what the host cannot keep.
pub const XATTR: &CStr = c"user.mvm.stat";
/// What extended attributes of this process's own begin with: guests do not see them.
pub const XATTR_PREFIX: &[u8] = b"user.mvm.";

/// The user that stands for nobody in particular.
const NOBODY: u32 = 65534;
/// The longest value of [`XATTR`] there can be.
const MAX_VALUE: usize = 64;

/// The largest numbers of devices.
const MAX_MAJOR: u32 = 0xfff;
const MAX_MINOR: u32 = 0xf_ffff;

/// setuid and setgid.
pub(crate) const SUID_SGID: u32 = 0o6000;

/// A user and a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    /// The user's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
}

/// Who owns the files in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The user who runs this process is `Ids` in the guest; a change of owner is remembered, and
    /// nothing on the host belongs to anybody else because of the guest.
    Mapped(Ids),
    /// Numbers are those of the host, and a change of owner is one on the host too. Takes the
    /// privilege to give files away; for who trusts the guest with the host's users.
    Host,
}

/// What a file is to the guest besides what it is on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Override {
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// Permissions that only the guest sees.
    pub added: u32,
    /// Permissions that only the host sees.
    pub taken: u32,
    /// What a regular file is instead.
    pub device: Option<Device>,
}

/// A device of the guest's, which is no more than an empty file on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Device {
    is_block: bool,
    major: u32,
    minor: u32,
}

impl Device {
    /// From the protocol's `rdev` (the kernel's `new_encode_dev`); nothing for what is no device.
    pub fn new(kind: FileType, rdev: u32) -> Option<Self> {
        let is_block = match kind {
            FileType::BlockDevice => true,
            FileType::CharacterDevice => false,
            _ => return None,
        };
        Some(Self {
            is_block,
            major: (rdev >> 8) & MAX_MAJOR,
            minor: (rdev & 0xff) | ((rdev >> 12) & 0xfff00),
        })
    }

    fn kind(self) -> FileType {
        match self.is_block {
            true => FileType::BlockDevice,
            false => FileType::CharacterDevice,
        }
    }

    fn parse(kind: &str, major: &str, minor: &str) -> Option<Self> {
        let is_block = match kind {
            "b" => true,
            "c" => false,
            _ => return None,
        };
        let number = |text: &str, max| text.parse().ok().filter(|number| *number <= max);
        Some(Self {
            is_block,
            major: number(major, MAX_MAJOR)?,
            minor: number(minor, MAX_MINOR)?,
        })
    }
}

impl Override {
    fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Override {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for id in [self.uid, self.gid] {
            match id {
                Some(id) => write!(f, "{id}:")?,
                None => f.write_str("-:")?,
            }
        }
        write!(f, "{:o}:{:o}", self.added, self.taken)?;
        let Some(device) = &self.device else {
            return Ok(());
        };
        let kind = if device.is_block { 'b' } else { 'c' };
        write!(f, ":{kind}:{}:{}", device.major, device.minor)
    }
}

impl FromStr for Override {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let id = |text: &str| match text {
            "-" => Ok(None),
            text => text.parse().map(Some).map_err(|_| ()),
        };
        let bits = |text, all| u32::from_str_radix(text, 8).map(|bits| bits & all);
        let fields: Vec<_> = text.split(':').collect();
        let (&[uid, gid, added, taken], device) = fields.split_first_chunk().ok_or(())?;
        let device = match *device {
            [] => None,
            [kind, major, minor] => Some(Device::parse(kind, major, minor).ok_or(())?),
            _ => return Err(()),
        };
        Ok(Self {
            uid: id(uid)?,
            gid: id(gid)?,
            added: bits(added, SUID_SGID).map_err(|_| ())?,
            taken: bits(taken, 0o777).map_err(|_| ())?,
            device,
        })
    }
}

/// A file's owner and permissions as the guest sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub uid: u32,
    pub gid: u32,
    /// Type and permissions.
    pub mode: u32,
    /// Which device it is, major and minor.
    pub rdev: (u32, u32),
}

/// The rule by which the guest sees owners.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owners {
    pub rule: Owner,
    /// Who runs this process.
    pub host: Ids,
    /// Whether the host's permissions hold for this process at all.
    pub privileged: bool,
}

impl Owners {
    pub fn new(rule: Owner) -> Self {
        let host = Ids {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        };
        Self {
            rule,
            host,
            privileged: host.uid == 0,
        }
    }

    /// The host's owner of a file in the guest's numbers.
    pub fn natural(&self, uid: u32, gid: u32) -> Ids {
        let Owner::Mapped(guest) = self.rule else {
            return Ids { uid, gid };
        };
        // Another user of the host who has the guest's number by chance is not the guest's user.
        let map = |id, host, guest| match id {
            id if id == host => guest,
            id if id == guest => NOBODY,
            id => id,
        };
        Ids {
            uid: map(uid, self.host.uid, guest.uid),
            gid: map(gid, self.host.gid, guest.gid),
        }
    }

    /// What the guest sees of a file.
    pub fn seen(&self, stat: &Stat, over: &Override) -> Seen {
        let natural = self.natural(stat.uid, stat.gid);
        let device = over.device.filter(|_| stat.kind() == FileType::RegularFile);
        let kind = device.map_or(stat.kind(), Device::kind);
        Seen {
            uid: over.uid.unwrap_or(natural.uid),
            gid: over.gid.unwrap_or(natural.gid),
            mode: kind.as_raw_mode() | (stat.mode & 0o7777 & !over.taken) | over.added,
            rdev: device.map_or(stat.rdev, |device| (device.major, device.minor)),
        }
    }

    /// The permissions a file gets on the host when the guest wants `mode` for it, and what is to be
    /// remembered of the rest.
    pub fn split_mode(&self, kind: FileType, mode: u32) -> (u32, u32, u32) {
        let mode = mode & 0o7777;
        let is_dir = kind == FileType::Directory;
        let added = if is_dir { 0 } else { mode & SUID_SGID };
        // What this process has to be able to do with its own file, whatever the guest's user may.
        let needed = match (self.privileged, is_dir) {
            (true, _) => 0,
            (false, true) => 0o500,
            (false, false) => 0o400,
        };
        let real = (mode & !added) | needed;
        (real, added, needed & !mode)
    }

    /// What is remembered of what `name` in `dir` is, which was just found to be `inode`.
    pub fn recall_at(&self, dir: BorrowedFd<'_>, name: &CStr, inode: &Inode) -> Override {
        if let Some(over) = *lock(&inode.remembered) {
            return over;
        }
        if !can_carry(inode.kind) {
            return Override::default();
        }
        let dir = ProcPath::of(&dir);
        let mut path = [0_u8; 32 + 1 + 256];
        let dir = dir.as_c_str().to_bytes();
        let parts = [dir, b"/", name.to_bytes_with_nul()];
        let mut at = 0;
        for part in parts {
            let Some(room) = path.get_mut(at..at + part.len()) else {
                return Override::default();
            };
            room.copy_from_slice(part);
            at += part.len();
        }
        let path = CStr::from_bytes_until_nul(&path).unwrap_or_default();
        let mut value = [0; MAX_VALUE];
        let found = rustix::fs::lgetxattr(path, XATTR, &mut value[..]);
        parse(&value, found)
    }

    /// What is remembered of what `held` stands for.
    pub fn recall(&self, inode: &Inode, held: &impl AsFd) -> Override {
        if let Some(over) = *lock(&inode.remembered) {
            return over;
        }
        if !can_carry(inode.kind) {
            return Override::default();
        }
        let mut value = [0; MAX_VALUE];
        let path = ProcPath::of(held);
        let found = rustix::fs::getxattr(path.as_c_str(), XATTR, &mut value[..]);
        parse(&value, found)
    }

    /// Remembers `over` of a file of which `before` was remembered.
    ///
    /// # Errors
    /// Those of setxattr(2), but for a filesystem that has no such attributes.
    pub fn remember(
        &self,
        inode: &Inode,
        held: &impl AsFd,
        before: &Override,
        over: &Override,
    ) -> Result<(), Errno> {
        if before == over {
            return Ok(());
        }
        let mut recalled = lock(&inode.recalled);
        *recalled = None;
        if lock(&inode.remembered).is_none() && can_carry(inode.kind) {
            let path = ProcPath::of(held);
            let outcome = match over.is_nothing() {
                true => rustix::fs::removexattr(path.as_c_str(), XATTR),
                false => {
                    let value = over.to_string();
                    let flags = XattrFlags::empty();
                    rustix::fs::setxattr(path.as_c_str(), XATTR, value.as_bytes(), flags)
                }
            };
            match outcome {
                Ok(()) | Err(Errno::NODATA) => return Ok(()),
                Err(Errno::OPNOTSUPP) => {}
                Err(errno) => return Err(errno),
            }
        }
        *lock(&inode.remembered) = Some(*over);
        Ok(())
    }
}

/// Whether files of this kind have extended attributes for users.
fn can_carry(kind: FileType) -> bool {
    matches!(kind, FileType::RegularFile | FileType::Directory)
}

fn parse(value: &[u8], found: Result<usize, Errno>) -> Override {
    // What cannot be read is as good as not there; what the host's users wrote there is not trusted
    // to make sense.
    let value = found.ok().and_then(|len| value.get(..len));
    let text = value.and_then(|value| str::from_utf8(value).ok());
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_is_read_back() {
        for text in [
            "-:-:0:0",
            "0:0:4000:0",
            "1000:-:6000:400",
            "-:4294967294:0:700",
            "0:0:0:0:c:1:3",
            "-:-:0:400:b:4095:1048575",
        ] {
            assert_eq!(text.parse::<Override>().unwrap().to_string(), text);
        }
        for text in [
            "",
            ":::",
            "0:0:0",
            "0:0:0:0:0",
            "a:0:0:0",
            "-1:0:0:0",
            "0:0:9:0",
            "0:0:0:0:c",
            "0:0:0:0:c:1",
            "0:0:0:0:c:1:3:",
            "0:0:0:0:d:1:3",
            "0:0:0:0:c:4096:0",
            "0:0:0:0:b:0:1048576",
        ] {
            assert_eq!(text.parse::<Override>(), Err(()), "{text:?}");
        }
    }

    #[test]
    fn only_setuid_and_setgid_can_be_added_and_only_permissions_taken() {
        let over: Override = "-:-:177777:177777".parse().unwrap();
        assert_eq!((over.added, over.taken), (0o6000, 0o777));
    }

    fn owners(privileged: bool) -> Owners {
        Owners {
            rule: Owner::Mapped(Ids { uid: 0, gid: 0 }),
            host: Ids {
                uid: 1000,
                gid: 100,
            },
            privileged,
        }
    }

    #[test]
    fn the_caller_is_the_guests_user_and_the_hosts_root_is_not_the_guests() {
        let owners = owners(false);
        assert_eq!(owners.natural(1000, 100), Ids { uid: 0, gid: 0 });
        assert_eq!(
            owners.natural(0, 0),
            Ids {
                uid: NOBODY,
                gid: NOBODY
            }
        );
        assert_eq!(owners.natural(33, 34), Ids { uid: 33, gid: 34 });
    }

    #[test]
    fn a_mode_is_split_into_what_the_host_gets_and_what_is_remembered() {
        let file = FileType::RegularFile;
        assert_eq!(owners(false).split_mode(file, 0o4755), (0o755, 0o4000, 0));
        assert_eq!(owners(false).split_mode(file, 0), (0o400, 0, 0o400));
        assert_eq!(owners(true).split_mode(file, 0), (0, 0, 0));
        let dir = FileType::Directory;
        assert_eq!(owners(false).split_mode(dir, 0o2070), (0o2570, 0, 0o500));
        assert_eq!(owners(true).split_mode(dir, 0o3777), (0o3777, 0, 0));
    }
}
