//! A directory of the host as the guest's filesystem: what each operation does on the host.
//!
//! Permissions are checked by the guest's kernel (mount option `default_permissions`) against what
//! it was shown; here it is seen to that nothing but the share is reached, and that it stays what
//! the host's user may do.

mod advice;
mod attr;
mod entry;
mod file;
mod init;
mod locking;
mod near;
mod readdir;
mod replay;
mod told;
mod viewed;
mod xattr;

use std::collections::VecDeque;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Resource;
use thiserror::Error;

use self::near::Near;
use crate::handle::{Handle, Handles};
use crate::host::{Descriptors, Key, Stat};
use crate::inode::{Held, Inode, Inodes};
use crate::lock::Locks;
use crate::owner::{Ids, Override, Owner, Owners, SUID_SGID};
use crate::view::{Filter, Scope};
use crate::watch::{Replay, Single, Unseen, Watcher};
use crate::wire::{Attr, EntryOut, ROOT_ID};

/// The largest piece of a file that one request reads or writes, bytes.
pub const MAX_TRANSFER: usize = 1 << 20;

/// How long what does not change unnoticed is believed: until told otherwise.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long it is believed where nobody tells.
const BRIEFLY: Duration = Duration::from_secs(1);

/// What a guest may believe of the share without asking again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// All that it has seen, until it is told that it has changed.
    #[default]
    Auto,
    /// Nothing.
    Strict,
    /// All, for good: nobody else changes the share. Writes are collected in the guest.
    Private,
}

/// Whom the locks of the guest's programs concern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Locking {
    /// The guest's own programs.
    #[default]
    Guest,
    /// The host's programs and other guests too. They see what was written before a lock was given up,
    /// as the guest believes nothing for long: [`Options::cache`] is as if it were [`Cache::Strict`].
    Host,
}

/// How much the guest may make this process hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Inodes the guest may know, about 300 bytes each.
    pub inodes: usize,
    /// Descriptors for them. Those beyond are closed and opened again when needed.
    pub descriptors: usize,
    /// Files and directories the guest may have open.
    pub handles: usize,
}

impl Limits {
    /// What fits a process that may open `files` files.
    pub fn of_files(files: usize) -> Self {
        Self {
            inodes: 1 << 20,
            descriptors: (files / 2).clamp(64, 1 << 18),
            handles: (files / 4).clamp(64, 1 << 16),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        let files = rustix::process::getrlimit(Resource::Nofile).current;
        Self::of_files(
            files
                .and_then(|n| usize::try_from(n).ok())
                .unwrap_or(1 << 20),
        )
    }
}

/// How a directory is shared.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Whether the guest can change nothing.
    pub read_only: bool,
    /// Who owns the files in the guest.
    pub owner: Owner,
    /// What the guest may believe.
    pub cache: Cache,
    /// Whom the locks of the guest's programs concern.
    pub locking: Locking,
    /// Whether POSIX access lists hold in the guest. Costs it one more request for each file that
    /// somebody else than its owner uses.
    pub acl: bool,
    /// How much the guest may make this process hold.
    pub limits: Limits,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            read_only: false,
            owner: Owner::Mapped(Ids { uid: 0, gid: 0 }),
            cache: Cache::default(),
            locking: Locking::default(),
            acl: true,
            limits: Limits::default(),
        }
    }
}

/// Why a directory or a file cannot be shared.
#[derive(Debug, Error)]
pub enum ShareError {
    /// It cannot be looked at.
    #[error("{path} cannot be shared: it cannot be opened")]
    Open {
        /// What was to be shared.
        path: String,
        /// The system call's error.
        source: Errno,
    },
    /// It is a device, a socket or a FIFO.
    #[error("{path} cannot be shared: it is neither a directory nor a regular file")]
    Kind {
        /// What was to be shared.
        path: String,
    },
    /// Files cannot be opened by what holds on to them.
    #[error("nothing can be shared without /proc/self/fd, which cannot be opened")]
    Proc {
        /// The system call's error.
        source: Errno,
    },
}

/// Who asks for something.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// User and group, in the guest's numbers.
    pub ids: Ids,
    /// The permissions a new file is not to have.
    pub umask: u32,
}

/// A shared directory, or a single shared file, and all that a guest knows of it.
#[derive(Debug)]
pub struct Share {
    options: Options,
    owners: Owners,
    /// What is shown; everything where there is none.
    filter: Option<Filter>,
    fds: Descriptors,
    inodes: Inodes,
    handles: Handles,
    pub(crate) locks: Locks,
    /// Directories in the middle of being listed that were never opened, the oldest first.
    parked: Mutex<VecDeque<Arc<Handle>>>,
    /// Which of its files can be reached without waiting.
    near: Near,
    /// Where the guest is told of changes.
    watcher: Option<Watcher>,
    /// Where the guest may change what is not watched.
    _unseen: Option<Unseen>,
    /// The guest may change a file that is shared by itself.
    _single: Option<Single>,
    /// What an agent in the guest is doing again of what the host has done.
    replay: Mutex<Option<Replay>>,
    /// Whose requests those are; zero where there is none.
    replayer: AtomicU32,
    /// Counts changes that a guest has made to directories.
    changes: AtomicU64,
    /// What was agreed on with the guest's kernel: flags of [`crate::wire::init`].
    agreed: AtomicU64,
}

impl Share {
    /// Shares what `path` is, symbolic links in it followed, as the calling thread's user.
    ///
    /// # Errors
    /// Where it cannot be opened or is neither a directory nor a regular file.
    pub fn open(path: &Path, mut options: Options) -> Result<Self, ShareError> {
        if options.locking == Locking::Host {
            options.cache = Cache::Strict;
        }
        let shown = || path.display().to_string();
        let opened = |source| ShareError::Open {
            path: shown(),
            source,
        };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty()).map_err(opened)?;
        let stat = Stat::fd(root.as_fd()).map_err(opened)?;
        if !matches!(stat.kind(), FileType::Directory | FileType::RegularFile) {
            return Err(ShareError::Kind { path: shown() });
        }
        let fds = Descriptors::open().map_err(|source| ShareError::Proc { source })?;
        let limits = options.limits;
        let near = Near::default();
        near.learn(stat.key.dev, root.as_fd());
        let is_file = stat.kind() == FileType::RegularFile;
        let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let inodes = Inodes::new(root, &stat, limits.inodes, limits.descriptors);
        let watcher = match is_file {
            true => watch_file(&options, &real, &inodes),
            false => open_watcher(&options, &real),
        };
        let is_unseen = !options.read_only && !is_file && watcher.is_none();
        let unseen = is_unseen.then(|| Unseen::new(&real));
        let single = (!options.read_only && is_file).then(|| Single::new(stat.key));
        Ok(Self {
            owners: Owners::new(options.owner),
            filter: None,
            fds,
            inodes,
            handles: Handles::new(limits.handles),
            locks: Locks::new(limits.handles),
            parked: Mutex::default(),
            near,
            watcher,
            _unseen: unseen,
            _single: single,
            replay: Mutex::default(),
            replayer: AtomicU32::new(0),
            changes: AtomicU64::new(0),
            agreed: AtomicU64::new(0),
            options,
        })
    }

    /// Type and permissions of the root, for the mount option `rootmode`.
    ///
    /// # Errors
    /// Those of statx(2).
    pub fn root_mode(&self) -> Result<u32, Errno> {
        let root = self.inodes.get(ROOT_ID)?;
        let held = self.inodes.hold(&root)?;
        Ok(Stat::fd(held.as_fd())?.mode)
    }

    /// How many inodes the guest knows, how many descriptors are held for them, and how many
    /// handles are open.
    pub fn usage(&self) -> (usize, usize, usize) {
        (self.inodes.len(), self.inodes.held(), self.handles.len())
    }

    /// Whether the guest's kernel agreed on a flag of [`crate::wire::init`].
    pub(crate) fn has(&self, flag: u64) -> bool {
        self.agreed.load(Ordering::Relaxed) & flag != 0
    }

    /// # Errors
    /// `EROFS` where the guest can change nothing.
    fn check_writable(&self) -> Result<(), Errno> {
        match self.options.read_only {
            true => Err(Errno::ROFS),
            false => Ok(()),
        }
    }

    /// The directory with this number, and a descriptor of it.
    pub(crate) fn dir(&self, id: u64) -> Result<(Arc<Inode>, Arc<Held>), Errno> {
        let inode = self.inodes.get(id)?;
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let held = self.inodes.hold(&inode)?;
        self.check_shown(&inode, &held)?;
        Ok((inode, held))
    }

    /// The inode with this number, and a descriptor of it.
    fn held(&self, id: u64) -> Result<(Arc<Inode>, Arc<Held>), Errno> {
        let inode = self.inodes.get(id)?;
        let held = self.inodes.hold(&inode)?;
        self.check_shown(&inode, &held)?;
        Ok((inode, held))
    }

    /// How long the guest may believe what it is told; `told` is whether it would be told otherwise.
    fn validity(&self, told: bool) -> Duration {
        match (self.options.cache, told) {
            (Cache::Strict, _) => Duration::ZERO,
            (Cache::Auto, false) => BRIEFLY,
            (Cache::Auto, true) | (Cache::Private, _) => FOREVER,
        }
    }

    /// Whether the guest is told of changes to the attributes and the data of a file in a directory
    /// that is `watched` or not.
    fn is_told_of(&self, inode: &Inode, stat: &Stat, watched: bool) -> bool {
        match inode.kind {
            // Its entries count too.
            FileType::Directory => inode.is_watched(),
            // Under its other names it may be changed unseen, unless it is itself what is watched.
            _ => (watched && stat.nlink <= 1) || inode.is_watched(),
        }
    }

    /// A reply for a name, in a directory that is `watched` or not, that stands for `inode`.
    fn entry(&self, inode: &Inode, stat: &Stat, over: &Override, watched: bool) -> EntryOut {
        if let Some(watcher) = &self.watcher
            && inode.kind == FileType::Directory
        {
            watcher.want(inode);
        }
        let entry = self.validity(watched);
        let attr = self.validity(self.is_told_of(inode, stat, watched));
        EntryOut {
            nodeid: inode.id,
            generation: 0,
            entry_valid: entry.as_secs(),
            attr_valid: attr.as_secs(),
            entry_valid_nsec: entry.subsec_nanos(),
            attr_valid_nsec: attr.subsec_nanos(),
            attr: self.attr(inode, stat, over),
        }
    }

    /// Watches a directory if possible, before anything in it is looked at; whether it is watched.
    fn watch_dir(&self, dir: &Inode, held: &Held) -> bool {
        self.watcher
            .as_ref()
            .is_some_and(|watcher| watcher.add(dir, held))
    }

    /// Whether the directory in which `inode` was found last is watched.
    fn is_watched_above(&self, inode: &Inode) -> bool {
        let parent = inode
            .place()
            .and_then(|place| self.inodes.get(place.parent).ok());
        parent.is_some_and(|parent| parent.is_watched())
    }

    /// What the guest is shown of `inode`.
    fn attr(&self, inode: &Inode, stat: &Stat, over: &Override) -> Attr {
        let seen = self.owners.seen(stat, over);
        if seen.mode & SUID_SGID != 0 && inode.kind == FileType::RegularFile {
            inode.privileged.store(true, Ordering::Relaxed);
        }
        // Before 1970 is before zero: the bits are those of the signed number.
        let seconds = i64::cast_unsigned;
        Attr {
            ino: shown_number(stat.key),
            size: stat.size,
            blocks: stat.blocks,
            atime: seconds(stat.atime.sec),
            mtime: seconds(stat.mtime.sec),
            ctime: seconds(stat.ctime.sec),
            atimensec: stat.atime.nsec,
            mtimensec: stat.mtime.nsec,
            ctimensec: stat.ctime.nsec,
            mode: seen.mode,
            nlink: stat.nlink,
            uid: seen.uid,
            gid: seen.gid,
            rdev: device_number(seen.rdev),
            blksize: stat.blksize,
            flags: 0,
        }
    }

    /// Does `action` on a file of this process's user; where its permissions are in the way, they
    /// are lent to their owner meanwhile. The guest's kernel has decided that it may be done.
    fn lend<T>(
        &self,
        held: BorrowedFd<'_>,
        permissions: u32,
        mut action: impl FnMut() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let outcome = action();
        let refused = matches!(outcome, Err(Errno::ACCESS));
        if !refused || self.owners.privileged || self.filter.is_some() {
            return outcome;
        }
        let stat = Stat::fd(held)?;
        let is_ours = stat.uid == self.owners.host.uid && stat.kind() != FileType::Symlink;
        if !is_ours || stat.mode & permissions == permissions {
            return outcome;
        }
        self.fds.set_mode(held, stat.mode | permissions)?;
        let outcome = action();
        self.fds.set_mode(held, stat.mode)?;
        outcome
    }

    /// Opens what `inode` is, for the guest.
    fn open_again(&self, inode: &Inode, held: &Held, flags: OFlags) -> Result<OwnedFd, Errno> {
        let permissions = match inode.kind {
            FileType::Directory => 0o500,
            _ => 0o600,
        };
        self.lend(held.as_fd(), permissions, || {
            self.fds.open_again(held.as_fd(), inode.kind, flags)
        })
    }

    /// The inode of what was found as `name` in `parent`, in `scope` of the view, once more known to the guest.
    fn enter(
        &self,
        parent: u64,
        dir: BorrowedFd<'_>,
        name: &CStr,
        stat: &Stat,
        scope: Scope,
    ) -> Result<Arc<Inode>, Errno> {
        let inode = self.inodes.enter(parent, name, stat, scope)?;
        self.widen(&inode, scope);
        // Without a time of birth, nothing but a descriptor keeps its number from being another
        // file's.
        if stat.birth.is_none()
            && let Err(errno) = self.inodes.hold_at(&inode, dir, name)
        {
            self.inodes.forget(inode.id, 1);
            return Err(errno);
        }
        Ok(inode)
    }
}

/// Watches a file that is shared by itself, if possible.
fn watch_file(options: &Options, path: &Path, inodes: &Inodes) -> Option<Watcher> {
    if options.cache != Cache::Auto {
        return None;
    }
    let file = inodes.get(ROOT_ID).ok()?;
    let held = file.held()?;
    let opened = Watcher::open_file(path, !options.read_only, &file, &held).inspect_err(|errno| {
        tracing::warn!(
            "{} cannot be watched for changes ({errno}): the guest sees them after a second",
            path.display()
        );
    });
    opened.ok()
}

fn open_watcher(options: &Options, root: &Path) -> Option<Watcher> {
    if options.cache != Cache::Auto {
        return None;
    }
    let opened = Watcher::open(root, !options.read_only).inspect_err(|errno| {
        tracing::warn!(
            "the shared directory cannot be watched for changes, as this host has no fanotify for us \
             ({errno}): the guest sees them after a second"
        );
    });
    opened.ok()
}

/// The inode number that the guest sees: that of the host, told apart by filesystem, as there may be
/// others mounted below the share.
fn shown_number(key: Key) -> u64 {
    // The guest compares numbers of one share only, and numbers of the share's own filesystem are
    // far below 2^48 in practice; where they are not, two files may be taken for links of one.
    key.ino ^ (key.dev & 0xffff).rotate_right(16)
}

/// A device's number as the protocol has it (the kernel's `new_encode_dev`).
fn device_number((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & !0xff) << 12)
}
