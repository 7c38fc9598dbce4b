//! Attributes: what a file is, and changes to that.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, FileType, Gid, OFlags, Timespec, Timestamps, Uid};
use rustix::fs::{UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno;

use super::{FOREVER, Share, shown_number};
use crate::host::{Stat, Time};
use crate::inode::{Held, Inode, lock};
use crate::owner::{Ids, Override, Owner};
use crate::wire::{AttrOut, SetattrIn, StatfsOut, Statx, StatxOut, SxTime, fattr};

/// The time of birth is known: of [`Statx::mask`].
const STATX_BTIME: u32 = 0x800;
/// All that every filesystem knows: of [`Statx::mask`].
const STATX_BASIC_STATS: u32 = 0x7ff;

impl Share {
    pub(crate) fn getattr(&self, id: u64) -> Result<AttrOut, Errno> {
        let (inode, held) = self.held(id)?;
        self.attr_out(&inode, &held)
    }

    fn attr_out(&self, inode: &Inode, held: &Held) -> Result<AttrOut, Errno> {
        let stat = Stat::fd(held.as_fd())?;
        let watched = self.is_watched_above(inode);
        let over = self.recall(inode, &stat, watched, || self.owners.recall(inode, held));
        let validity = self.validity(self.is_told_of(inode, &stat, watched));
        Ok(AttrOut {
            attr_valid: validity.as_secs(),
            attr_valid_nsec: validity.subsec_nanos(),
            dummy: 0,
            attr: self.attr(inode, &stat, &over),
        })
    }

    pub(crate) fn statx(&self, id: u64) -> Result<StatxOut, Errno> {
        let (inode, held) = self.held(id)?;
        let stat = Stat::fd(held.as_fd())?;
        let watched = self.is_watched_above(&inode);
        let over = self.recall(&inode, &stat, watched, || self.owners.recall(&inode, &held));
        let seen = self.owners.seen(&stat, &over);
        let of = |time: Time| SxTime {
            sec: time.sec,
            nsec: time.nsec,
            reserved: 0,
        };
        let birth = stat.birth.map(of);
        let validity = self.validity(self.is_told_of(&inode, &stat, watched));
        Ok(StatxOut {
            attr_valid: validity.as_secs(),
            attr_valid_nsec: validity.subsec_nanos(),
            stat: Statx {
                mask: STATX_BASIC_STATS | birth.map_or(0, |_| STATX_BTIME),
                blksize: stat.blksize,
                nlink: stat.nlink,
                uid: seen.uid,
                gid: seen.gid,
                mode: u16::try_from(seen.mode).map_err(|_| Errno::INVAL)?,
                ino: shown_number(stat.key),
                size: stat.size,
                blocks: stat.blocks,
                atime: of(stat.atime),
                btime: birth.unwrap_or_default(),
                ctime: of(stat.ctime),
                mtime: of(stat.mtime),
                rdev_major: seen.rdev.0,
                rdev_minor: seen.rdev.1,
                ..Statx::default()
            },
            ..StatxOut::default()
        })
    }

    pub(crate) fn setattr(&self, id: u64, change: &SetattrIn) -> Result<AttrOut, Errno> {
        self.check_writable()?;
        let (inode, held) = self.held(id)?;
        let valid = change.valid;
        if valid & fattr::SIZE != 0 {
            self.set_size(&inode, &held, change)?;
        }
        if valid & fattr::MODE != 0 {
            self.set_mode(&inode, &held, change.mode)?;
        }
        if valid & (fattr::UID | fattr::GID) != 0 {
            let uid = (valid & fattr::UID != 0).then_some(change.uid);
            let gid = (valid & fattr::GID != 0).then_some(change.gid);
            self.set_owner(&inode, &held, uid, gid)?;
        }
        if valid & (fattr::ATIME | fattr::MTIME) != 0 {
            self.fds.set_times(held.as_fd(), &times(change)?)?;
        }
        if valid & fattr::KILL_SUIDGID != 0 {
            self.kill_privileges(&inode, &held)?;
        }
        self.attr_out(&inode, &held)
    }

    fn set_size(&self, inode: &Arc<Inode>, held: &Held, change: &SetattrIn) -> Result<(), Errno> {
        if inode.kind != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        if change.valid & fattr::FH != 0 {
            let handle = self.handles.get(change.fh, inode.id)?;
            match rustix::fs::ftruncate(&*handle, change.size) {
                // It is open for reading, which O_TRUNC does not mind.
                Err(Errno::INVAL | Errno::BADF) => {}
                outcome => return outcome,
            }
        }
        let file = self.open_again(inode, held, OFlags::WRONLY)?;
        rustix::fs::ftruncate(&file, change.size)
    }

    pub(super) fn set_mode(&self, inode: &Inode, held: &Held, mode: u32) -> Result<(), Errno> {
        if inode.kind == FileType::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        let (real, added, taken) = self.owners.split_mode(inode.kind, mode);
        let before = self.recall_held(inode, held, &Stat::fd(held.as_fd())?);
        let after = Override {
            added,
            taken,
            ..before
        };
        // What is to be taken away is taken away first, what is added comes last: at no time has
        // anybody more than before and after.
        self.remember(inode, held, &before, &Override { added: 0, ..after })?;
        self.fds.set_mode(held.as_fd(), real)?;
        self.remember(inode, held, &Override { added: 0, ..after }, &after)
    }

    /// Gives the file to others in the guest's eyes.
    pub(super) fn set_owner(
        &self,
        inode: &Inode,
        held: &Held,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> Result<(), Errno> {
        let stat = Stat::fd(held.as_fd())?;
        let before = self.recall_held(inode, held, &stat);
        let mut after = before;
        match self.owners.rule {
            Owner::Host => set_host_owner(held.as_fd(), uid, gid)?,
            Owner::Mapped(_) => {
                let natural = self.owners.natural(stat.uid, stat.gid);
                self.check_ours(&stat)?;
                if let Some(uid) = uid {
                    after.uid = (uid != natural.uid).then_some(uid);
                }
                if let Some(gid) = gid {
                    after.gid = (gid != natural.gid).then_some(gid);
                }
                // Changes nothing but the time of the last change, as it has to.
                set_host_owner(held.as_fd(), Some(stat.uid), None)?;
            }
        }
        if !matches!(inode.kind, FileType::Directory | FileType::Symlink) {
            let seen = self.owners.seen(&stat, &after).mode;
            let killed = privileges(seen);
            after.added &= !killed;
            if stat.mode & killed != 0 {
                self.fds.set_mode(held.as_fd(), stat.mode & !killed)?;
            }
        }
        self.remember(inode, held, &before, &after)
    }

    /// Gives a new file its owner, and remembers of it what the host would not let it have.
    ///
    /// # Errors
    /// `EPERM` for a device on a filesystem where it cannot be remembered that it is one.
    pub(super) fn own_new(
        &self,
        inode: &Inode,
        held: &Held,
        stat: Stat,
        ids: Ids,
        mut over: Override,
    ) -> Result<(Stat, Override), Errno> {
        match self.owners.rule {
            Owner::Host if (stat.uid, stat.gid) == (ids.uid, ids.gid) => {}
            Owner::Host => set_host_owner(held.as_fd(), Some(ids.uid), Some(ids.gid))?,
            Owner::Mapped(_) => {
                let natural = self.owners.natural(stat.uid, stat.gid);
                over.uid = (ids.uid != natural.uid).then_some(ids.uid);
                over.gid = (ids.gid != natural.gid).then_some(ids.gid);
            }
        }
        self.remember(inode, held, &Override::default(), &over)?;
        if over.device.is_some() && lock(&inode.remembered).is_some() {
            return Err(Errno::PERM);
        }
        let stat = match self.owners.rule {
            Owner::Host => Stat::fd(held.as_fd())?,
            Owner::Mapped(_) => stat,
        };
        Ok((stat, over))
    }

    /// What is remembered of a file in a directory that is `watched` or not. It is looked up, by `look`, where the guest
    /// would not be told of a change; else what was found the last time is true still. Not for requests
    /// that tell nothing ([`Share::telling`]).
    pub(super) fn recall(
        &self,
        inode: &Inode,
        stat: &Stat,
        watched: bool,
        look: impl FnOnce() -> Override,
    ) -> Override {
        let mut recalled = lock(&inode.recalled);
        if self.validity(self.is_told_of(inode, stat, watched)) != FOREVER {
            *recalled = None;
            return look();
        }
        *recalled.get_or_insert_with(look)
    }

    /// The same of what `held` stands for.
    pub(super) fn recall_held(&self, inode: &Inode, held: &Held, stat: &Stat) -> Override {
        let watched = self.is_watched_above(inode);
        self.recall(inode, stat, watched, || self.owners.recall(inode, held))
    }

    /// What the host remembers of a file may have changed.
    pub(crate) fn recall_anew(&self, id: u64) {
        if let Ok(inode) = self.inodes.get(id) {
            *lock(&inode.recalled) = None;
        }
    }

    fn remember(
        &self,
        inode: &Inode,
        held: &Held,
        before: &Override,
        after: &Override,
    ) -> Result<(), Errno> {
        self.lend(held.as_fd(), 0o600, || {
            self.owners.remember(inode, held, before, after)
        })
    }

    /// # Errors
    /// `EPERM` where the file belongs to another of the host's users.
    fn check_ours(&self, stat: &Stat) -> Result<(), Errno> {
        match self.owners.privileged || stat.uid == self.owners.host.uid {
            true => Ok(()),
            false => Err(Errno::PERM),
        }
    }

    /// A program that somebody else has written is not setuid or setgid any more.
    pub(super) fn kill_privileges(&self, inode: &Inode, held: &Held) -> Result<(), Errno> {
        if !inode.privileged.load(Ordering::Relaxed) {
            return Ok(());
        }
        let stat = Stat::fd(held.as_fd())?;
        let before = self.owners.recall(inode, held);
        let killed = privileges(self.owners.seen(&stat, &before).mode);
        if stat.mode & killed != 0 {
            self.fds.set_mode(held.as_fd(), stat.mode & !killed)?;
        }
        let after = Override {
            added: before.added & !killed,
            ..before
        };
        self.remember(inode, held, &before, &after)?;
        inode.privileged.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Whether `ids` may do what `mask` says, by what the guest sees of the file.
    pub(crate) fn access(&self, id: u64, ids: Ids, mask: u32) -> Result<(), Errno> {
        let (inode, held) = self.held(id)?;
        let stat = Stat::fd(held.as_fd())?;
        let over = self.recall_held(&inode, &held, &stat);
        let seen = self.owners.seen(&stat, &over);
        let mask = mask & 0o7;
        if mask & 0o2 != 0 {
            self.check_writable()?;
        }
        let granted = match ids {
            Ids { uid: 0, .. } => {
                let runs = seen.mode & 0o111 != 0 || inode.kind == FileType::Directory;
                0o6 | u32::from(runs)
            }
            Ids { uid, .. } if uid == seen.uid => seen.mode >> 6,
            Ids { gid, .. } if gid == seen.gid => seen.mode >> 3,
            _ => seen.mode,
        };
        match mask & !granted {
            0 => Ok(()),
            _ => Err(Errno::ACCESS),
        }
    }

    pub(crate) fn statfs(&self, id: u64) -> Result<StatfsOut, Errno> {
        let (_, held) = self.held(id)?;
        let found = rustix::fs::fstatvfs(&*held)?;
        let narrow = |number| u32::try_from(number).map_err(|_| Errno::OVERFLOW);
        Ok(StatfsOut {
            blocks: found.f_blocks,
            bfree: found.f_bfree,
            bavail: found.f_bavail,
            files: found.f_files,
            ffree: found.f_ffree,
            bsize: narrow(found.f_bsize)?,
            namelen: narrow(found.f_namemax)?,
            frsize: narrow(found.f_frsize)?,
            ..StatfsOut::default()
        })
    }
}

/// Which of setuid and setgid a file with this mode loses when somebody else writes it: setgid
/// without permission to run means something else.
fn privileges(mode: u32) -> u32 {
    match mode & 0o010 {
        0 => 0o4000,
        _ => 0o6000,
    }
}

fn set_host_owner(held: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> Result<(), Errno> {
    let uid = uid.map(Uid::from_raw);
    let gid = gid.map(Gid::from_raw);
    rustix::fs::chownat(held, c"", uid, gid, AtFlags::EMPTY_PATH)
}

fn times(change: &SetattrIn) -> Result<Timestamps, Errno> {
    let time = |set, now, seconds: u64, nanos: u32| {
        let tv_nsec = match () {
            () if change.valid & set == 0 => UTIME_OMIT,
            () if change.valid & now != 0 => UTIME_NOW,
            () if nanos < 1_000_000_000 => nanos.into(),
            () => return Err(Errno::INVAL),
        };
        Ok(Timespec {
            tv_sec: seconds.cast_signed(),
            tv_nsec,
        })
    };
    Ok(Timestamps {
        last_access: time(
            fattr::ATIME,
            fattr::ATIME_NOW,
            change.atime,
            change.atimensec,
        )?,
        last_modification: time(
            fattr::MTIME,
            fattr::MTIME_NOW,
            change.mtime,
            change.mtimensec,
        )?,
    })
}
