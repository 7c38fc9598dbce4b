//! Open files: reading, writing, and what else is done to their data.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, FileType, OFlags, SeekFrom};
use rustix::io::Errno;

use super::{BRIEFLY, Cache, Caller, Locking, MAX_TRANSFER, Share};
use crate::handle::Handle;
use crate::host::{self, Stat};
use crate::inode::Inode;
use crate::message::Reply;
use crate::wire::{
    CopyFileRangeIn, CreateIn, EntryOut, FSYNC_FDATASYNC, FallocateIn, LseekIn, OPEN_KILL_SUIDGID,
    OpenIn, OpenOut, ReadIn, WRITE_KILL_SUIDGID, WriteIn, fopen, init,
};

/// What of a guest's flags is passed on to the host. The guest's page cache lies above the host's,
/// so O_DIRECT says nothing here; O_NOATIME is for owners; O_NONBLOCK is nothing for files.
const OPEN_FLAGS: OFlags = OFlags::RWMODE
    .union(OFlags::APPEND)
    .union(OFlags::TRUNC)
    .union(OFlags::DSYNC)
    .union(OFlags::SYNC);

/// The most that one request copies within the host, bytes: a request has to end.
const MAX_COPY: u64 = 256 << 20;

impl Share {
    /// The host's flags for a guest's.
    ///
    /// # Errors
    /// `EROFS` where the guest would write and can change nothing.
    fn open_flags(&self, flags: u32) -> Result<OFlags, Errno> {
        let mut flags = OFlags::from_bits_retain(flags) & OPEN_FLAGS;
        if flags & OFlags::RWMODE != OFlags::RDONLY || flags.contains(OFlags::TRUNC) {
            self.check_writable()?;
        }
        if self.has(init::WRITEBACK_CACHE) {
            // The guest's kernel decides where data go, and reads what surrounds them.
            flags -= OFlags::APPEND;
            if flags & OFlags::RWMODE == OFlags::WRONLY {
                flags = (flags - OFlags::RWMODE) | OFlags::RDWR;
            }
        }
        Ok(flags)
    }

    pub(crate) fn open_file(&self, id: u64, asked: &OpenIn) -> Result<OpenOut, Errno> {
        let flags = self.open_flags(asked.flags)?;
        self.handles.check_room()?;
        let (inode, held) = self.held(id)?;
        if inode.kind == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        let file = self.open_again(&inode, &held, flags)?;
        if asked.open_flags & OPEN_KILL_SUIDGID != 0 && flags.contains(OFlags::TRUNC) {
            self.kill_privileges(&inode, &held)?;
        }
        let told = self.is_told_of_data(&inode, &file)?;
        self.opened(inode, file, told)
    }

    /// A new handle for what was opened, of whose data the guest is `told` if they change.
    fn opened(&self, inode: Arc<Inode>, file: OwnedFd, told: bool) -> Result<OpenOut, Errno> {
        let keep = match told {
            true => fopen::KEEP_CACHE | fopen::CACHE_DIR,
            false => 0,
        };
        let handle = Handle::new(inode, file);
        Ok(OpenOut {
            fh: self.handles.add(handle)?,
            open_flags: keep | fopen::PARALLEL_DIRECT_WRITES,
            backing_id: 0,
        })
    }

    /// Whether the guest may keep what it has of a file's data, or of a directory's entries.
    fn is_told_of_data(&self, inode: &Inode, file: &OwnedFd) -> Result<bool, Errno> {
        match self.options.cache {
            Cache::Strict => Ok(false),
            Cache::Private => Ok(true),
            Cache::Auto if inode.kind == FileType::Directory => Ok(inode.is_watched()),
            Cache::Auto => {
                let watched = self.is_watched_above(inode);
                match watched || inode.is_watched() {
                    true => Ok(self.is_told_of(inode, &Stat::fd(file.as_fd())?, watched)),
                    false => Ok(false),
                }
            }
        }
    }

    /// Opens a directory to list it. Where the guest keeps what it has listed until told otherwise, it
    /// need not open it, and is told so for good by `ENOSYS`.
    pub(crate) fn open_dir(&self, id: u64) -> Result<OpenOut, Errno> {
        if self.has(init::NO_OPENDIR_SUPPORT) {
            return Err(Errno::NOSYS);
        }
        self.handles.check_room()?;
        let (inode, dir) = self.dir(id)?;
        self.check_listed(&inode, &dir)?;
        self.watch_dir(&inode, &dir);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let file = self.open_again(&inode, &dir, flags)?;
        let told = self.is_told_of_data(&inode, &file)?;
        self.opened(inode, file, told)
    }

    /// Makes a file and opens it, or opens the one that is there.
    pub(crate) fn create(
        &self,
        caller: &Caller,
        parent: u64,
        name: &CStr,
        asked: &CreateIn,
    ) -> Result<(EntryOut, OpenOut), Errno> {
        self.check_writable()?;
        self.handles.check_room()?;
        let flags = self.open_flags(asked.flags)?;
        let (inode, dir) = self.dir(parent)?;
        let making = self.making(caller, &inode, &dir, FileType::RegularFile, asked.mode)?;
        let exclusive = OFlags::from_bits_retain(asked.flags).contains(OFlags::EXCL);
        let made = self.lend(dir.as_fd(), 0o700, || {
            making.masked(|| host::create(dir.as_fd(), name, flags, making.real))
        });
        let file = match made {
            Err(Errno::EXIST) if !exclusive => return self.open_existing(parent, name, asked),
            outcome => outcome?,
        };
        let held = self.fds.hold_again(file.as_fd())?;
        let (inode, entry) = self.made(&making, (parent, &dir), name, Some(held))?;
        inode.is_new.store(true, Ordering::Relaxed);
        match self.opened(inode, file, entry.attr_valid > BRIEFLY.as_secs()) {
            Ok(open) => Ok((entry, open)),
            Err(errno) => {
                self.forget(entry.nodeid, 1);
                Err(errno)
            }
        }
    }

    fn open_existing(
        &self,
        parent: u64,
        name: &CStr,
        asked: &CreateIn,
    ) -> Result<(EntryOut, OpenOut), Errno> {
        let entry = self.lookup(parent, name)?;
        if entry.nodeid == 0 {
            return Err(Errno::STALE);
        }
        let asked = OpenIn {
            flags: asked.flags,
            open_flags: asked.open_flags,
        };
        match self.open_file(entry.nodeid, &asked) {
            Ok(open) => Ok((entry, open)),
            Err(errno) => {
                self.forget(entry.nodeid, 1);
                Err(errno)
            }
        }
    }

    /// Makes a file without a name and opens it.
    pub(crate) fn create_nameless(
        &self,
        caller: &Caller,
        parent: u64,
        asked: &CreateIn,
    ) -> Result<(EntryOut, OpenOut), Errno> {
        self.check_writable()?;
        self.handles.check_room()?;
        let flags = self.open_flags(asked.flags)?;
        let exclusive = OFlags::from_bits_retain(asked.flags) & OFlags::EXCL;
        let (inode, dir) = self.dir(parent)?;
        let making = self.making(caller, &inode, &dir, FileType::RegularFile, asked.mode)?;
        let file = self.lend(dir.as_fd(), 0o700, || {
            making.masked(|| host::create_nameless(dir.as_fd(), flags | exclusive, making.real))
        })?;
        let held = self.fds.hold_again(file.as_fd())?;
        let (inode, entry) = self.introduce(&making, None, held)?;
        match self.opened(inode, file, entry.attr_valid > BRIEFLY.as_secs()) {
            Ok(open) => Ok((entry, open)),
            Err(errno) => {
                self.forget(entry.nodeid, 1);
                Err(errno)
            }
        }
    }

    pub(crate) fn read(&self, id: u64, asked: &ReadIn, reply: &mut Reply) -> Result<(), Errno> {
        let handle = self.handles.get(asked.fh, id)?;
        let size = usize::try_from(asked.size).unwrap_or(MAX_TRANSFER);
        reply.read(handle.as_fd(), asked.offset, size.min(MAX_TRANSFER))
    }

    /// Writes `data`; returns how much of it.
    pub(crate) fn write(&self, id: u64, asked: &WriteIn, data: &[u8]) -> Result<u32, Errno> {
        self.check_writable()?;
        let handle = self.handles.get(asked.fh, id)?;
        let size = usize::try_from(asked.size).map_err(|_| Errno::INVAL)?;
        let data = data.get(..size).ok_or(Errno::INVAL)?;
        if asked.write_flags & WRITE_KILL_SUIDGID != 0 {
            let held = self.inodes.hold(&handle.inode)?;
            self.kill_privileges(&handle.inode, &held)?;
        }
        let written = rustix::io::pwrite(&*handle, data, asked.offset)?;
        u32::try_from(written).map_err(|_| Errno::INVAL)
    }

    pub(crate) fn release(&self, fh: u64) {
        let Some(handle) = self.handles.remove(fh) else {
            return;
        };
        let inode = handle.inode.clone();
        drop(handle);
        if self.options.locking == Locking::Host {
            self.locks.released(&inode);
        }
    }

    pub(crate) fn fsync(&self, id: u64, fh: u64, flags: u32) -> Result<(), Errno> {
        if fh == 0 {
            let (inode, dir) = self.dir(id)?;
            return rustix::fs::fsync(self.open_again(&inode, &dir, OFlags::RDONLY)?);
        }
        let handle = self.handles.get(fh, id)?;
        match flags & FSYNC_FDATASYNC {
            0 => rustix::fs::fsync(&*handle),
            _ => rustix::fs::fdatasync(&*handle),
        }
    }

    pub(crate) fn syncfs(&self, id: u64) -> Result<(), Errno> {
        let (inode, held) = self.held(id)?;
        let file = self.open_again(&inode, &held, OFlags::RDONLY)?;
        rustix::fs::syncfs(&file)
    }

    pub(crate) fn fallocate(&self, id: u64, asked: &FallocateIn) -> Result<(), Errno> {
        self.check_writable()?;
        let handle = self.handles.get(asked.fh, id)?;
        let mode = FallocateFlags::from_bits_retain(asked.mode);
        rustix::fs::fallocate(&*handle, mode, asked.offset, asked.length)?;
        let held = self.inodes.hold(&handle.inode)?;
        self.kill_privileges(&handle.inode, &held)
    }

    /// Where data or a hole begin at or after an offset.
    pub(crate) fn lseek(&self, id: u64, asked: &LseekIn) -> Result<u64, Errno> {
        let handle = self.handles.get(asked.fh, id)?;
        let whence = i32::try_from(asked.whence).map_err(|_| Errno::INVAL)?;
        let to = match whence {
            libc::SEEK_DATA => SeekFrom::Data(asked.offset),
            libc::SEEK_HOLE => SeekFrom::Hole(asked.offset),
            // The guest's kernel does the others by itself.
            _ => return Err(Errno::INVAL),
        };
        rustix::fs::seek(&*handle, to)
    }

    /// Copies within the host; returns how much was copied, which may be less than was asked for.
    pub(crate) fn copy(&self, id: u64, asked: &CopyFileRangeIn) -> Result<u32, Errno> {
        self.check_writable()?;
        if asked.flags != 0 {
            return Err(Errno::INVAL);
        }
        let from = self.handles.get(asked.fh_in, id)?;
        let to = self.handles.get(asked.fh_out, asked.nodeid_out)?;
        let length = usize::try_from(asked.len.min(MAX_COPY)).map_err(|_| Errno::INVAL)?;
        let (mut off_in, mut off_out) = (asked.off_in, asked.off_out);
        let copied = rustix::fs::copy_file_range(
            &*from,
            Some(&mut off_in),
            &*to,
            Some(&mut off_out),
            length,
        )?;
        let held = self.inodes.hold(&to.inode)?;
        self.kill_privileges(&to.inode, &held)?;
        u32::try_from(copied).map_err(|_| Errno::INVAL)
    }
}
