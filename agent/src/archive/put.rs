//! One file made in a directory: under its name where that is free, else beside what is there, which it
//! replaces when it is complete.
//!
//! Nothing is written through what is in the directory already, be it a file, a link or a pipe.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_OMIT, Uid, chmod,
    chownat, fchmod, fstat, makedev, mkdirat, mkfifoat, mknodat, openat, renameat, statat,
    symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::attributes;
use super::chain;
use super::member::{Kind, Member};

/// Names that are tried for a file beside the one that it will replace.
const TRIES: u64 = 16;

/// Permissions of what is not complete yet.
pub const PRIVATE: Mode = Mode::RWXU;

/// A file that has been begun. Dropped, it is removed again; [`Draft::keep`] completes it.
#[derive(Debug)]
pub struct Draft<'a> {
    parent: BorrowedFd<'a>,
    name: &'a [u8],
    /// The name that it has until it replaces what is there.
    temporary: Option<Vec<u8>>,
    kept: bool,
}

impl<'a> Draft<'a> {
    /// Calls `make` with a name of `parent` that is free, at best `name` itself; it fails with EEXIST
    /// where the name is taken.
    ///
    /// Fails with EISDIR or EEXIST where there is a directory, a device or a socket of that name.
    pub fn begin<T>(
        parent: BorrowedFd<'a>,
        name: &'a [u8],
        mut make: impl FnMut(&[u8]) -> Result<T, Errno>,
    ) -> Result<(Self, T), Errno> {
        let mut draft = Self {
            parent,
            name,
            temporary: None,
            kept: true,
        };
        let mut made = make(name);
        for number in 0..TRIES {
            if !matches!(made, Err(Errno::EXIST)) {
                break;
            }
            may_be_replaced(parent, name)?;
            let random = RandomState::new().hash_one(number);
            let temporary = format!(".mvm-cp.{random:016x}").into_bytes();
            made = make(&temporary);
            draft.temporary = Some(temporary);
        }
        let made = made?;
        draft.kept = false;
        Ok((draft, made))
    }

    /// The name that it has now.
    pub fn name(&self) -> &[u8] {
        self.temporary.as_deref().unwrap_or(self.name)
    }

    /// Gives it its name.
    pub fn keep(mut self) -> Result<(), Errno> {
        if let Some(temporary) = &self.temporary {
            renameat(self.parent, temporary.as_slice(), self.parent, self.name)?;
            // Two names of one file are not exchanged but both stay.
            match unlinkat(self.parent, temporary.as_slice(), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        self.kept = true;
        Ok(())
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if !self.kept {
            // What made it incomplete is reported; it may also be gone already.
            let _ = unlinkat(self.parent, self.name(), AtFlags::empty());
        }
    }
}

fn may_be_replaced(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        stat => stat?,
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::Symlink | FileType::Fifo => Ok(()),
        FileType::Directory => Err(Errno::ISDIR),
        _ => Err(Errno::EXIST),
    }
}

/// Makes an empty regular file `name` that only its owner can open.
pub fn file(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    let private = Mode::RUSR | Mode::WUSR;
    openat(parent, name, flags | OFlags::CLOEXEC, private)
}

/// Makes what is neither a regular file nor a directory nor a hard link, and opens it as a place
/// or, a FIFO, for reading.
pub fn special(parent: BorrowedFd<'_>, name: &[u8], kind: &Kind) -> Result<OwnedFd, Errno> {
    let place = OFlags::PATH;
    let (made, flags, expected) = match kind {
        Kind::Symlink(target) => {
            let made = symlinkat(target.as_slice(), parent, name);
            (made, place, FileType::Symlink)
        }
        Kind::Fifo => {
            let made = mkfifoat(parent, name, PRIVATE);
            (made, OFlags::RDONLY | OFlags::NONBLOCK, FileType::Fifo)
        }
        &Kind::Device {
            block,
            major,
            minor,
        } => {
            let kind = match block {
                true => FileType::BlockDevice,
                false => FileType::CharacterDevice,
            };
            let made = mknodat(parent, name, kind, PRIVATE, makedev(major, minor));
            (made, place, kind)
        }
        _ => return Err(Errno::INVAL),
    };
    made?;
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = openat(parent, name, flags, Mode::empty())?;
    let stat = fstat(&opened)?;
    // Somebody else may have replaced it since; that is not to get this one's owner.
    match FileType::from_raw_mode(stat.st_mode) == expected && is_ours(&stat) {
        true => Ok(opened),
        false => Err(Errno::STALE),
    }
}

/// Opens the directory `name`, and makes it with permissions `mode` where there is none; whether it did.
///
/// Fails with ENOTDIR or ELOOP where there is something else.
pub fn directory(
    parent: BorrowedFd<'_>,
    name: &[u8],
    mode: Mode,
) -> Result<(OwnedFd, bool), Errno> {
    let is_new = match mkdirat(parent, name, mode) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(error) => return Err(error),
    };
    let directory = chain::open(parent, name)?;
    let is_new = is_new && is_ours(&fstat(&directory)?);
    Ok((directory, is_new))
}

fn is_ours(stat: &Stat) -> bool {
    stat.st_uid == geteuid().as_raw()
}

/// What of a member a new file could not get.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Unkept {
    /// Its owner, and with it its set-id bits.
    pub owner: bool,
    /// Extended attributes.
    pub attributes: bool,
}

/// Gives a new file what `member` says of it besides its content: permissions and times, and where
/// `owned` is set, also its owner, set-id bits and attributes.
pub fn dress(file: impl AsFd, member: &Member, owned: bool) -> Result<Unkept, Errno> {
    let file = file.as_fd();
    let mut unkept = Unkept::default();
    if owned {
        let owner = (Uid::from_raw(member.uid), Gid::from_raw(member.gid));
        match chownat(file, c"", Some(owner.0), Some(owner.1), AtFlags::EMPTY_PATH) {
            Ok(()) => {}
            Err(Errno::PERM | Errno::INVAL) => unkept.owner = true,
            Err(error) => return Err(error),
        }
        // After the owner: a change of owner takes capabilities away.
        if attributes::set(file, &member.attributes).is_err() {
            unkept.attributes = true;
        }
    }
    let mut mode = member.mode;
    if !owned || unkept.owner {
        mode &= 0o1777;
    }
    match &member.kind {
        Kind::Symlink(_) => {}
        Kind::Directory if !owned => {
            // A directory gets its group by what is above it, if that says so; this goes on below.
            let inherited = fstat(file)?.st_mode & 0o2000;
            fchmod(file, Mode::from_raw_mode(mode | inherited))?;
        }
        Kind::Device { .. } => chmod(place_path(file), Mode::from_raw_mode(mode))?,
        _ => fchmod(file, Mode::from_raw_mode(mode))?,
    }
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: member.modified.seconds,
            tv_nsec: member.modified.nanoseconds.into(),
        },
    };
    utimensat(file, c"", &times, AtFlags::EMPTY_PATH)?;
    Ok(unkept)
}

/// A path to what is open as a place only, for system calls that take no such descriptor.
fn place_path(file: BorrowedFd<'_>) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", file.as_raw_fd())
}
