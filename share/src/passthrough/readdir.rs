//! What is in a directory.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use super::{MAX_TRANSFER, Share, shown_number};
use crate::handle::Handle;
use crate::host::Key;
use crate::inode::{Held, Inode, lock};
use crate::message::Reply;
use crate::wire::{Dirent, EntryOut, ReadIn};

/// How much is read of the host's directory at a time, bytes: at least one entry fits.
const MIN_BUFFER: usize = 1024;
const MAX_BUFFER: usize = 64 << 10;
/// How many listings may be under way of directories that were not opened.
const MAX_PARKED: usize = 32;

/// An entry of the host's directory.
struct Found<'a> {
    name: &'a CStr,
    ino: u64,
    kind: FileType,
    /// Where the entry after it is.
    next: u64,
}

impl Share {
    /// Lists a directory from an offset on, with attributes (`plus`) or without. With them, each
    /// entry counts as looked up.
    pub(crate) fn readdir(
        &self,
        id: u64,
        asked: &ReadIn,
        plus: bool,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        if asked.fh != 0 {
            let handle = self.handles.get(asked.fh, id)?;
            return self.read_entries(&handle, asked, plus, reply);
        }
        let handle = self.unpark(id)?;
        self.read_entries(&handle, asked, plus, reply)?;
        if !reply.is_empty() {
            self.park(handle);
        }
        Ok(())
    }

    /// A directory that the guest lists without having opened it: the one where it left off, if it is
    /// still there.
    fn unpark(&self, id: u64) -> Result<Arc<Handle>, Errno> {
        let mut parked = lock(&self.parked);
        let at = parked.iter().position(|handle| handle.inode.id == id);
        if let Some(handle) = at.and_then(|at| parked.remove(at)) {
            return Ok(handle);
        }
        drop(parked);
        let (inode, dir) = self.dir(id)?;
        self.check_listed(&inode, &dir)?;
        if !self.watch_dir(&inode, &dir)
            && let Some(watcher) = &self.watcher
        {
            watcher.add_unwatched(id);
        }
        let file = self.open_again(&inode, &dir, OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(Arc::new(Handle::new(inode, file)))
    }

    fn park(&self, handle: Arc<Handle>) {
        let mut parked = lock(&self.parked);
        let oldest = match parked.len() < MAX_PARKED {
            true => None,
            false => parked.pop_front(),
        };
        parked.push_back(handle);
        drop(parked);
        drop(oldest);
    }

    /// No listing of a directory goes on, or of any.
    pub(super) fn end_listing(&self, id: Option<u64>) {
        let mut parked = lock(&self.parked);
        let gone: Vec<_> = std::mem::take(&mut *parked)
            .into_iter()
            .filter_map(|handle| match id {
                Some(id) if handle.inode.id != id => {
                    parked.push_back(handle);
                    None
                }
                _ => Some(handle),
            })
            .collect();
        drop(parked);
        drop(gone);
    }

    fn read_entries(
        &self,
        handle: &Handle,
        asked: &ReadIn,
        plus: bool,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        if handle.inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let limit = usize::try_from(asked.size)
            .unwrap_or(MAX_TRANSFER)
            .min(MAX_TRANSFER);
        // An entry takes some six times less of the host's buffer when attributes go with it.
        let share = if plus { limit / 6 } else { limit };
        let size = share.clamp(MIN_BUFFER, MAX_BUFFER).next_multiple_of(8);
        let mut position = lock(&handle.position);
        if *position != asked.offset {
            rustix::fs::seek(handle, SeekFrom::Start(asked.offset))?;
            *position = asked.offset;
        }
        let mut buffer = vec![MaybeUninit::uninit(); size];
        let mut entries = RawDir::new(handle, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let found = Found {
                name: entry.file_name(),
                ino: entry.ino(),
                kind: entry.file_type(),
                next: entry.next_entry_cookie(),
            };
            match self.list(handle, &found, plus, limit, reply) {
                Ok(true) => *position = found.next,
                outcome => {
                    // The kernel's position is behind what it gave; the next read is to begin with this.
                    rustix::fs::seek(handle, SeekFrom::Start(*position))?;
                    return outcome.map(drop);
                }
            }
        }
        Ok(())
    }

    /// Adds one entry, unless the reply would be longer than `limit` bytes.
    fn list(
        &self,
        handle: &Handle,
        found: &Found<'_>,
        plus: bool,
        limit: usize,
        reply: &mut Reply,
    ) -> Result<bool, Errno> {
        let name = found.name.to_bytes();
        let head = if plus { size_of::<EntryOut>() } else { 0 };
        let padded = (size_of::<Dirent>() + name.len()).next_multiple_of(8);
        if reply.len() + head + padded > limit {
            return Ok(false);
        }
        let is_itself = is_itself(found.name);
        if !plus && !is_itself && !self.is_shown(handle, found.name)? {
            return Ok(true);
        }
        let mut kind = found.kind;
        let mut ino = found.ino ^ shown_number_of_dev(handle.inode.key.dev);
        if plus {
            let entry = match is_itself {
                true => EntryOut::default(),
                false => match self.entry_of(handle, found.name) {
                    // It has vanished meanwhile.
                    Err(Errno::NOENT) => return Ok(true),
                    // The guest sees that it is there, and asks again for more.
                    Err(_) => EntryOut::default(),
                    Ok(entry) => entry,
                },
            };
            if entry.nodeid != 0 {
                kind = FileType::from_raw_mode(entry.attr.mode);
                ino = entry.attr.ino;
            }
            reply.push(&entry)?;
        }
        reply.push(&Dirent {
            ino,
            off: found.next,
            namelen: u32::try_from(name.len()).map_err(|_| Errno::NAMETOOLONG)?,
            kind: kind.as_raw_mode() >> 12,
        })?;
        reply.put(name)?;
        let padding = padded - size_of::<Dirent>() - name.len();
        reply.put([0; 8].get(..padding).unwrap_or_default())?;
        Ok(true)
    }

    /// Whether a directory has nothing in it.
    pub(super) fn has_no_entries(&self, inode: &Inode, dir: &Held) -> Result<bool, Errno> {
        let file = self.open_again(inode, dir, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut buffer = [MaybeUninit::uninit(); MIN_BUFFER];
        let mut entries = RawDir::new(file, &mut buffer);
        while let Some(entry) = entries.next() {
            if !is_itself(entry?.file_name()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn entry_of(&self, handle: &Handle, name: &CStr) -> Result<EntryOut, Errno> {
        let dir = handle.as_fd();
        let (stat, scope) = self.find(&handle.inode, dir, name)?;
        let inode = self.enter(handle.inode.id, dir, name, &stat, scope)?;
        let watched = handle.inode.is_watched();
        let over = self.recall(&inode, &stat, watched, || {
            self.owners.recall_at(dir, name, &inode)
        });
        Ok(self.entry(&inode, &stat, &over, watched))
    }
}

/// Whether an entry is the directory itself, or the one above it.
fn is_itself(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

/// What tells the numbers of a filesystem's inodes apart from those of others.
fn shown_number_of_dev(dev: u64) -> u64 {
    shown_number(Key { dev, ino: 0 })
}
