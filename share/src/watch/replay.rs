//! The host's changes, done once more in the guest.
//!
//! A program in the guest that watches a directory hears of what is done through its own kernel, and of
//! nothing else. So an agent in the guest does there what was done on the host, and its requests are
//! answered as if it had succeeded, while nothing is done on the host:
//!
//! | [`Change`] | what the agent does | what watchers see |
//! | --- | --- | --- |
//! | `Created`, a file | open with `O_CREAT`, `O_EXCL` and `O_WRONLY`; `Modified` where that follows; close | `IN_CREATE`, `IN_MODIFY`, `IN_CLOSE_WRITE` |
//! | `Created`, others | mkdir, symlink to anything, or mknod of a FIFO | `IN_CREATE` |
//! | `Modified` | utimensat of the modification time, `UTIME_OMIT` for the other | `IN_MODIFY` |
//! | `Attrib` | utimensat of both times | `IN_ATTRIB` |
//! | `CloseWrite` | open with `O_WRONLY`; close | `IN_CLOSE_WRITE` |
//! | `Deleted` | unlink or rmdir | `IN_DELETE` |
//! | `Moved` | rename | `IN_MOVED_FROM`, `IN_MOVED_TO` |
//!
//! A kernel asks about a name before it acts on it, and what it is told then is what was true before
//! the change: what is to be made is not there, what is to be removed is there still.

use std::collections::VecDeque;
use std::ffi::CStr;

use rustix::io::Errno;

use super::event::{Change, HostEvent, Kind};
use crate::message::{Args, Reply};
use crate::passthrough::Share;
use crate::wire::{self, InHeader, Opcode};

/// What an agent is about to do.
#[derive(Debug)]
pub(crate) struct Replay {
    /// What it does, in this order. What it has done is taken out.
    pub events: VecDeque<HostEvent>,
}

/// What is to be seen of a name before a change is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Before {
    /// Nothing.
    Absent,
    /// What is not there any more.
    Present { is_dir: bool },
    /// What has another name by now.
    MovedTo(u64, std::ffi::CString),
}

impl Replay {
    /// What is to be seen of a name now, if that is not what there is.
    pub fn before(&self, dir: u64, name: &CStr) -> Option<Before> {
        self.events.iter().find_map(|event| {
            let here = event.dir == dir && event.name.as_c_str() == name;
            match &event.change {
                Change::Created { .. } if here => Some(Before::Absent),
                Change::Deleted { is_dir } if here => Some(Before::Present { is_dir: *is_dir }),
                Change::Moved { dir, name, .. } if here => {
                    Some(Before::MovedTo(*dir, name.clone()))
                }
                Change::Moved {
                    dir: to, name: new, ..
                } if *to == dir && new.as_c_str() == name => Some(Before::Absent),
                _ => None,
            }
        })
    }

    /// Takes out the first change that `is_done`, and all before it, which the agent has passed over.
    pub fn done(&mut self, is_done: impl Fn(&HostEvent) -> bool) -> Option<HostEvent> {
        let at = self.events.iter().position(is_done)?;
        self.events.drain(..=at).next_back()
    }
}

/// Answers a request of the agent that does the host's changes again; nothing where it is to be
/// answered like any other.
pub(crate) fn answer(
    share: &Share,
    opcode: Opcode,
    header: &InHeader,
    args: Args<'_>,
    reply: &mut Reply,
) -> Option<Result<(), Errno>> {
    if !share.is_replayed_by(header.pid) {
        return None;
    }
    use Opcode::{
        Create, Fallocate, Getattr, Link, Lookup, Mkdir, Mknod, Open, Removexattr, Rename, Rename2,
        Rmdir, Setattr, Setxattr, Symlink, Tmpfile, Unlink, Write,
    };
    match opcode {
        Lookup => lookup(share, header, args, reply).transpose(),
        Create | Mkdir | Mknod | Symlink => Some(make(share, opcode, header, args, reply)),
        Unlink | Rmdir => Some(remove(share, header, args)),
        Rename | Rename2 => Some(rename(share, opcode, header, args)),
        Setattr => {
            let seen = share.getattr(header.nodeid);
            Some(seen.and_then(|seen| reply.push(&seen)))
        }
        Getattr => {
            let seen = match share.getattr(header.nodeid) {
                Err(Errno::NOENT | Errno::STALE) => share.attributes_gone(header.nodeid),
                seen => seen,
            };
            Some(seen.and_then(|seen| reply.push(&seen)))
        }
        Open => {
            let open = share.open_nothing(header.nodeid);
            Some(open.and_then(|open| reply.push(&open)))
        }
        // It has nothing of its own to change.
        Write | Fallocate | Link | Setxattr | Removexattr | Tmpfile => Some(Err(Errno::PERM)),
        _ => None,
    }
}

/// Nothing where the name is to be looked up like any other.
fn lookup(
    share: &Share,
    header: &InHeader,
    mut args: Args<'_>,
    reply: &mut Reply,
) -> Result<Option<()>, Errno> {
    let name = args.name()?;
    let Some(before) = share.before(header.nodeid, name) else {
        return Ok(None);
    };
    let entry = share.entry_before(header.nodeid, name, &before)?;
    reply.push(&entry).map(Some)
}

fn make(
    share: &Share,
    opcode: Opcode,
    header: &InHeader,
    mut args: Args<'_>,
    reply: &mut Reply,
) -> Result<(), Errno> {
    let made = match opcode {
        Opcode::Create => {
            args.take::<wire::CreateIn>()?;
            Kind::File
        }
        Opcode::Mkdir => {
            args.take::<wire::MkdirIn>()?;
            Kind::Directory
        }
        Opcode::Mknod => {
            args.take::<wire::MknodIn>()?;
            Kind::Special
        }
        _ => Kind::Symlink,
    };
    let dir = header.nodeid;
    let name = args.name()?;
    share.take_done(|event| {
        event.dir == dir
            && event.name.as_c_str() == name
            && matches!(event.change, Change::Created { kind } if kind == made)
    })?;
    let entry = share.entry_made(dir, name, made)?;
    reply.push(&entry)?;
    match opcode {
        Opcode::Create => reply.push(&share.open_nothing(entry.nodeid)?),
        _ => Ok(()),
    }
}

fn remove(share: &Share, header: &InHeader, mut args: Args<'_>) -> Result<(), Errno> {
    let dir = header.nodeid;
    let name = args.name()?;
    share.take_done(|event| {
        event.dir == dir
            && event.name.as_c_str() == name
            && matches!(event.change, Change::Deleted { .. })
    })
}

fn rename(
    share: &Share,
    opcode: Opcode,
    header: &InHeader,
    mut args: Args<'_>,
) -> Result<(), Errno> {
    let newdir = match opcode {
        Opcode::Rename => args.take::<wire::RenameIn>()?.newdir,
        _ => args.take::<wire::Rename2In>()?.newdir,
    };
    let (from, to) = (args.name()?, args.name()?);
    let dir = header.nodeid;
    share.take_done(|event| {
        event.dir == dir
            && event.name.as_c_str() == from
            && matches!(&event.change, Change::Moved { dir, name, .. }
                if *dir == newdir && name.as_c_str() == to)
    })
}
