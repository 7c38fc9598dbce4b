//! What an agent in the guest is shown that does the host's changes again (see `watch/replay.rs`).

use std::ffi::CStr;
use std::os::fd::AsFd;

use std::sync::atomic::Ordering;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::{FOREVER, Share};
use crate::handle::Handle;
use crate::host::{Key, Stat};
use crate::inode::{Place, lock};
use crate::owner::Override;
use crate::watch::{Before, HostEvent, Kind, Replay};
use crate::wire::{AttrOut, EntryOut, OpenOut, fopen};

/// A filesystem that no file is on: the one of names that the host has not any more.
const NOWHERE: u64 = u64::MAX;

impl Share {
    /// From now on, the thread `pid` of the guest does `events` again, in their order: its requests do
    /// nothing on the host. To be ended with [`Share::replayed`].
    pub fn replay(&self, pid: u32, events: impl IntoIterator<Item = HostEvent>) {
        *lock(&self.replay) = Some(Replay {
            events: events.into_iter().collect(),
        });
        self.replayer.store(pid, Ordering::Release);
    }

    /// The agent has done what it was told to, or given up.
    pub fn replayed(&self) {
        self.replayer.store(0, Ordering::Release);
        *lock(&self.replay) = None;
    }

    pub(crate) fn is_replayed_by(&self, pid: u32) -> bool {
        // The kernel's own requests come from nobody.
        pid != 0 && self.replayer.load(Ordering::Acquire) == pid
    }

    pub(crate) fn before(&self, dir: u64, name: &CStr) -> Option<Before> {
        lock(&self.replay).as_ref()?.before(dir, name)
    }

    /// # Errors
    /// `ENOENT` where no such change was to be made.
    pub(crate) fn take_done(&self, is_done: impl Fn(&HostEvent) -> bool) -> Result<(), Errno> {
        let mut replay = lock(&self.replay);
        let done = replay.as_mut().and_then(|replay| replay.done(is_done));
        done.map(drop).ok_or(Errno::NOENT)
    }

    /// What a name was before a change; to be believed only for the request at hand.
    pub(crate) fn entry_before(
        &self,
        dir: u64,
        name: &CStr,
        before: &Before,
    ) -> Result<EntryOut, Errno> {
        let entry = match before {
            Before::Absent => EntryOut::default(),
            Before::Present { is_dir } => {
                let kind = match is_dir {
                    true => FileType::Directory,
                    false => FileType::RegularFile,
                };
                self.gone(dir, name, kind)?
            }
            Before::MovedTo(to, new) => match self.lookup(*to, new)? {
                found if found.nodeid != 0 => found,
                // It has been removed since.
                _ => self.gone(dir, name, FileType::RegularFile)?,
            },
        };
        Ok(briefest(entry))
    }

    /// What was just made on the host, or was there for a moment.
    pub(crate) fn entry_made(&self, dir: u64, name: &CStr, kind: Kind) -> Result<EntryOut, Errno> {
        let found = self.lookup(dir, name)?;
        let found_kind = Kind::of(FileType::from_raw_mode(found.attr.mode));
        // The guest's kernel asked for a FIFO where something special was made.
        if found.nodeid != 0 && found_kind == kind && kind != Kind::Special {
            return Ok(found);
        }
        if found.nodeid != 0 {
            self.forget(found.nodeid, 1);
        }
        let kind = match kind {
            Kind::File => FileType::RegularFile,
            Kind::Directory => FileType::Directory,
            Kind::Symlink => FileType::Symlink,
            Kind::Special => FileType::Fifo,
        };
        Ok(briefest(self.gone(dir, name, kind)?))
    }

    /// An entry for what is not there any more: the inode that the guest knows from when it was, or one
    /// that stands for it.
    fn gone(&self, dir: u64, name: &CStr, kind: FileType) -> Result<EntryOut, Errno> {
        let known = self.inodes.at(&Place::new(dir, name));
        if let Some(inode) = known
            && let Some(held) = inode.held()
            && inode.kind == kind
        {
            let stat = Stat::fd(held.as_fd())?;
            let over = self.owners.recall(&inode, &held);
            self.inodes.tell_again(&inode)?;
            return Ok(self.entry(&inode, &stat, &over, false));
        }
        let stat = Stat::nothing(
            Key {
                dev: NOWHERE,
                ino: self.inodes.spare_number(),
            },
            kind,
        );
        let inode = self.inodes.enter_ghost(&stat)?;
        let entry = self.entry(&inode, &stat, &Override::default(), false);
        // There is nothing to ask of it a second time.
        Ok(EntryOut {
            attr_valid: FOREVER.as_secs(),
            ..entry
        })
    }

    /// What is left of a file that the host has removed: no name.
    pub(crate) fn attributes_gone(&self, id: u64) -> Result<AttrOut, Errno> {
        let inode = self.inodes.get(id)?;
        let stat = Stat {
            nlink: 0,
            ..Stat::nothing(inode.key, inode.kind)
        };
        Ok(AttrOut {
            attr_valid: FOREVER.as_secs(),
            attr_valid_nsec: 0,
            dummy: 0,
            attr: self.attr(&inode, &stat, &Override::default()),
        })
    }

    /// A handle for who wants to close it again and nothing else.
    pub(crate) fn open_nothing(&self, id: u64) -> Result<OpenOut, Errno> {
        let inode = self.inodes.get(id)?;
        let nothing = self.fds.nothing()?;
        Ok(OpenOut {
            fh: self.handles.add(Handle::new(inode, nothing))?,
            open_flags: fopen::KEEP_CACHE,
            backing_id: 0,
        })
    }
}

/// To be looked up again the next time.
fn briefest(entry: EntryOut) -> EntryOut {
    EntryOut {
        entry_valid: 0,
        entry_valid_nsec: 0,
        ..entry
    }
}
