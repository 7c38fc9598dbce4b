//! Names: found, made, removed, renamed.

use std::cell::Cell;
use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, RenameFlags};
use rustix::io::Errno;

use super::{Caller, Share};
use crate::host::{self, Stat};
use crate::inode::{Held, Inode, Place};
use crate::message::{PATH_MAX, Reply};
use crate::owner::{Device, Ids, Override};
use crate::view::Scope;
use crate::wire::{EntryOut, MknodIn};

/// The flags of renameat2(2) that there are here; whiteouts are devices.
const RENAME_FLAGS: RenameFlags = RenameFlags::NOREPLACE.union(RenameFlags::EXCHANGE);

thread_local! {
    /// This thread's umask, once it was set.
    static UMASK: Cell<Option<Mode>> = const { Cell::new(None) };
}

/// A new file in the making: what it is to be.
pub(super) struct Making {
    pub kind: FileType,
    /// Permissions the host is to give it.
    pub real: Mode,
    /// What is remembered of it.
    remembered: Override,
    /// What the host is to leave out of them.
    umask: Mode,
    /// Whose it is in the guest.
    ids: Ids,
    /// Whether the directory is watched.
    watched: bool,
}

impl Making {
    /// Does `action` with the umask that the guest's caller has.
    pub fn masked<T>(&self, action: impl FnOnce() -> T) -> T {
        // Threads that serve a share have a umask of their own, which is most often what it was the last time.
        if UMASK.replace(Some(self.umask)) != Some(self.umask) {
            rustix::process::umask(self.umask);
        }
        action()
    }
}

impl Share {
    pub(crate) fn lookup(&self, parent: u64, name: &CStr) -> Result<EntryOut, Errno> {
        let (parent_inode, dir) = self.dir(parent)?;
        let watched = self.watch_dir(&parent_inode, &dir);
        let (stat, scope) = match self.find(&parent_inode, dir.as_fd(), name) {
            Err(Errno::NOENT) => return Ok(self.absent(watched)),
            outcome => outcome?,
        };
        let inode = self.enter(parent, dir.as_fd(), name, &stat, scope)?;
        let over = self.recall(&inode, &stat, watched, || {
            self.owners.recall_at(dir.as_fd(), name, &inode)
        });
        Ok(self.entry(&inode, &stat, &over, watched))
    }

    /// There is no such name in a directory that is `watched` or not.
    fn absent(&self, watched: bool) -> EntryOut {
        let validity = self.validity(watched);
        EntryOut {
            entry_valid: validity.as_secs(),
            entry_valid_nsec: validity.subsec_nanos(),
            ..EntryOut::default()
        }
    }

    pub(crate) fn forget(&self, id: u64, count: u64) {
        if let Some(inode) = self.inodes.forget(id, count) {
            self.forgotten(&inode);
        }
    }

    /// The guest knows nothing of `inode` any more.
    pub(super) fn forgotten(&self, inode: &Arc<Inode>) {
        if inode.kind == FileType::Directory {
            self.end_listing(Some(inode.id));
        }
        if let Some(watcher) = &self.watcher
            && inode.is_watched()
        {
            let held = inode.held().or_else(|| self.inodes.hold(inode).ok());
            watcher.remove(inode, held.as_deref());
        }
    }

    pub(crate) fn readlink(&self, id: u64, reply: &mut Reply) -> Result<(), Errno> {
        let (inode, held) = self.held(id)?;
        if inode.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let length = rustix::fs::readlinkat_raw(&*held, c"", reply.room(PATH_MAX))?;
        reply.grow(length);
        Ok(())
    }

    /// What a new file in `dir` is to be.
    pub(super) fn making(
        &self,
        caller: &Caller,
        parent: &Inode,
        dir: &Held,
        kind: FileType,
        mode: u32,
    ) -> Result<Making, Errno> {
        let watched = self.watch_dir(parent, dir);
        let stat = Stat::fd(dir.as_fd())?;
        let over = self.recall(parent, &stat, watched, || self.owners.recall(parent, dir));
        let seen = self.owners.seen(&stat, &over);
        let mut ids = caller.ids;
        let mut mode = mode & 0o7777;
        if seen.mode & 0o2000 != 0 {
            ids.gid = seen.gid;
            if kind == FileType::Directory {
                mode |= 0o2000;
            }
        }
        let umask = caller.umask & 0o777;
        let (real, _, _) = self.owners.split_mode(kind, mode);
        let (_, added, taken) = self.owners.split_mode(kind, mode & !umask);
        Ok(Making {
            kind,
            real: Mode::from_raw_mode(real),
            remembered: Override {
                added,
                taken,
                ..Override::default()
            },
            umask: Mode::from_raw_mode(umask & !taken),
            ids,
            watched,
        })
    }

    /// What was just made as `name` in `dir` becomes known to the guest; `fd` holds on to it, where
    /// it is not to be found by its name. Where that fails, it is removed again.
    pub(super) fn made(
        &self,
        making: &Making,
        dir: (u64, &Held),
        name: &CStr,
        fd: Option<OwnedFd>,
    ) -> Result<(Arc<Inode>, EntryOut), Errno> {
        let introduced = fd
            .map_or_else(|| host::hold(dir.1.as_fd(), name), Ok)
            .and_then(|fd| self.introduce(making, Some((dir.0, name)), fd));
        if introduced.is_err() {
            let flags = match making.kind {
                FileType::Directory => AtFlags::REMOVEDIR,
                _ => AtFlags::empty(),
            };
            // The error that counts is the first.
            let _ = rustix::fs::unlinkat(dir.1, name, flags);
        }
        introduced
    }

    /// A new file becomes known to the guest, at a name in a directory or without one.
    pub(super) fn introduce(
        &self,
        making: &Making,
        place: Option<(u64, &CStr)>,
        fd: OwnedFd,
    ) -> Result<(Arc<Inode>, EntryOut), Errno> {
        let stat = Stat::fd(fd.as_fd())?;
        if stat.kind() != making.kind {
            // The host was faster with something else.
            return Err(Errno::STALE);
        }
        let inode = match place {
            Some((parent, name)) => self.inodes.enter(parent, name, &stat, Scope::ROOT)?,
            None => self.inodes.enter_nameless(&stat)?,
        };
        let owned = self
            .inodes
            .keep(&inode, fd)
            .and_then(|held| self.own_new(&inode, &held, stat, making.ids, making.remembered));
        match owned {
            Ok((stat, over)) => {
                let watched = making.watched && place.is_some();
                self.recall(&inode, &stat, watched, || over);
                let entry = self.entry(&inode, &stat, &over, watched);
                Ok((inode, entry))
            }
            Err(errno) => {
                self.inodes.forget(inode.id, 1);
                Err(errno)
            }
        }
    }

    pub(crate) fn mkdir(
        &self,
        caller: &Caller,
        parent: u64,
        name: &CStr,
        mode: u32,
    ) -> Result<EntryOut, Errno> {
        self.check_writable()?;
        let (inode, dir) = self.dir(parent)?;
        let making = self.making(caller, &inode, &dir, FileType::Directory, mode)?;
        self.lend(dir.as_fd(), 0o700, || {
            making.masked(|| rustix::fs::mkdirat(&*dir, name, making.real))
        })?;
        if making.real.bits() & 0o2000 != 0 {
            // mkdir(2) ignores it, and the host's directory need not have it.
            self.keep_setgid(&dir, name)?;
        }
        Ok(self.made(&making, (parent, &dir), name, None)?.1)
    }

    fn keep_setgid(&self, dir: &Held, name: &CStr) -> Result<(), Errno> {
        let made = host::hold(dir.as_fd(), name)?;
        let stat = Stat::fd(made.as_fd())?;
        match stat.kind() {
            FileType::Directory => self.fds.set_mode(made.as_fd(), stat.mode | 0o2000),
            _ => Err(Errno::STALE),
        }
    }

    /// Makes an empty file, a FIFO or a socket, or what is a device to the guest: an empty file, as
    /// nobody makes devices on the host from in here.
    pub(crate) fn mknod(
        &self,
        caller: &Caller,
        parent: u64,
        name: &CStr,
        asked: &MknodIn,
    ) -> Result<EntryOut, Errno> {
        self.check_writable()?;
        let kind = FileType::from_raw_mode(asked.mode);
        let device = Device::new(kind, asked.rdev);
        let kind = match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => kind,
            _ if device.is_some() => FileType::RegularFile,
            _ => return Err(Errno::PERM),
        };
        let (inode, dir) = self.dir(parent)?;
        let mut making = self.making(caller, &inode, &dir, kind, asked.mode)?;
        making.remembered.device = device;
        self.lend(dir.as_fd(), 0o700, || {
            making.masked(|| rustix::fs::mknodat(&*dir, name, kind, making.real, 0))
        })?;
        Ok(self.made(&making, (parent, &dir), name, None)?.1)
    }

    pub(crate) fn symlink(
        &self,
        caller: &Caller,
        parent: u64,
        name: &CStr,
        target: &CStr,
    ) -> Result<EntryOut, Errno> {
        self.check_writable()?;
        let (inode, dir) = self.dir(parent)?;
        let making = self.making(caller, &inode, &dir, FileType::Symlink, 0o777)?;
        let target = OsStr::from_bytes(target.to_bytes());
        self.lend(dir.as_fd(), 0o700, || {
            rustix::fs::symlinkat(target, &*dir, name)
        })?;
        Ok(self.made(&making, (parent, &dir), name, None)?.1)
    }

    pub(crate) fn link(&self, id: u64, parent: u64, name: &CStr) -> Result<EntryOut, Errno> {
        self.check_writable()?;
        let (inode, held) = self.held(id)?;
        if inode.kind == FileType::Directory {
            return Err(Errno::PERM);
        }
        let (parent_inode, dir) = self.dir(parent)?;
        let watched = self.watch_dir(&parent_inode, &dir);
        self.lend(dir.as_fd(), 0o700, || {
            self.fds.link(held.as_fd(), dir.as_fd(), name)
        })?;
        let stat = Stat::fd(held.as_fd())?;
        self.inodes.enter_known(&inode, parent, name)?;
        let over = self.recall(&inode, &stat, watched, || self.owners.recall(&inode, &held));
        Ok(self.entry(&inode, &stat, &over, watched))
    }

    pub(crate) fn unlink(&self, parent: u64, name: &CStr) -> Result<(), Errno> {
        self.remove(parent, name, AtFlags::empty())
    }

    pub(crate) fn rmdir(&self, parent: u64, name: &CStr) -> Result<(), Errno> {
        self.remove(parent, name, AtFlags::REMOVEDIR)
    }

    fn remove(&self, parent: u64, name: &CStr, flags: AtFlags) -> Result<(), Errno> {
        self.check_writable()?;
        let (_, dir) = self.dir(parent)?;
        let victim = self.victim(&dir, name)?;
        self.lend(dir.as_fd(), 0o700, || {
            rustix::fs::unlinkat(&*dir, name, flags)
        })?;
        if let Some((inode, stat)) = victim {
            self.lost_name(&inode, &stat, parent, name);
        }
        Ok(())
    }

    /// What `name` in `dir` is, if the guest knows it: it is held, as it may live on without a name.
    fn victim(&self, dir: &Held, name: &CStr) -> Result<Option<(Arc<Inode>, Stat)>, Errno> {
        let stat = match Stat::at(dir.as_fd(), name) {
            Err(Errno::NOENT) => return Ok(None),
            outcome => outcome?,
        };
        let Some(inode) = self.inodes.find(&stat) else {
            return Ok(None);
        };
        match self.inodes.hold_at(&inode, dir.as_fd(), name) {
            // The host has replaced it just now.
            Err(Errno::STALE) => Ok(None),
            outcome => outcome.map(|_| Some((inode, stat))),
        }
    }

    /// `inode` is not `name` in `parent` any more; `stat` is from before that.
    fn lost_name(&self, inode: &Inode, stat: &Stat, parent: u64, name: &CStr) {
        if inode.kind == FileType::Directory || stat.nlink <= 1 {
            self.inodes.unname(inode);
        } else if inode
            .place()
            .is_some_and(|place| place == Place::new(parent, name))
        {
            self.inodes.set_place(inode, None);
        }
    }

    /// Renames `from` to `to`, each a directory and a name in it.
    pub(crate) fn rename(
        &self,
        from: (u64, &CStr),
        to: (u64, &CStr),
        flags: u32,
    ) -> Result<(), Errno> {
        self.check_writable()?;
        let flags = RenameFlags::from_bits_retain(flags);
        if !RENAME_FLAGS.contains(flags) {
            return Err(Errno::INVAL);
        }
        let (_, from_dir) = self.dir(from.0)?;
        let (_, to_dir) = self.dir(to.0)?;
        let moved = self.victim(&from_dir, from.1)?;
        let replaced = self.victim(&to_dir, to.1)?;
        let rename = || rustix::fs::renameat_with(&*from_dir, from.1, &*to_dir, to.1, flags);
        self.lend(from_dir.as_fd(), 0o700, || {
            self.lend(to_dir.as_fd(), 0o700, rename)
        })?;
        let same = matches!((&moved, &replaced), (Some((a, _)), Some((b, _))) if a.id == b.id);
        if same {
            // Two names of one file: nothing has happened.
            return Ok(());
        }
        let place = |(parent, name): (u64, &CStr)| Place::new(parent, name);
        if let Some((inode, _)) = &moved {
            self.inodes.set_place(inode, Some(place(to)));
        }
        match &replaced {
            Some((inode, _)) if flags.contains(RenameFlags::EXCHANGE) => {
                self.inodes.set_place(inode, Some(place(from)));
            }
            Some((inode, stat)) => self.lost_name(inode, stat, to.0, to.1),
            None => {}
        }
        Ok(())
    }
}
