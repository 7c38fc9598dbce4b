//! Extended attributes, and which of them the guest has.

use std::ffi::CStr;
use std::os::fd::AsFd;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::Share;
use crate::host::{ProcPath, Stat};
use crate::inode::{Held, Inode};
use crate::message::Reply;
use crate::owner::{Owner, XATTR_PREFIX};
use crate::wire::{GetxattrOut, SETXATTR_ACL_KILL_SGID, SetxattrIn};

/// The longest value, and the longest list of names, bytes (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MAX_VALUE: usize = 64 << 10;

const ACL_PREFIX: &[u8] = b"system.posix_acl_";
const CAPABILITY: &[u8] = b"security.capability";

/// A header of an access list, and one of its entries.
const ACL_HEADER_LEN: usize = 4;
const ACL_ENTRY_LEN: usize = 8;
/// Tags of entries that name a user, and a group.
const ACL_USER: [u8; 2] = 2_u16.to_ne_bytes();
const ACL_GROUP: [u8; 2] = 8_u16.to_ne_bytes();

/// # Errors
/// `EOPNOTSUPP` for attributes that the guest cannot read here: those that mean something to the
/// host's security or to its administrators.
fn check_readable(name: &CStr) -> Result<(), Errno> {
    let name = name.to_bytes();
    if name.starts_with(XATTR_PREFIX) {
        return Err(Errno::NODATA);
    }
    if is_users(name) || name == CAPABILITY {
        return Ok(());
    }
    Err(Errno::OPNOTSUPP)
}

/// # Errors
/// `EPERM` for this process's own, `EOPNOTSUPP` for those that the guest cannot change: a
/// capability would make a program privileged on the host.
fn check_changeable(name: &CStr) -> Result<(), Errno> {
    let name = name.to_bytes();
    if name.starts_with(XATTR_PREFIX) {
        return Err(Errno::PERM);
    }
    match is_users(name) {
        true => Ok(()),
        false => Err(Errno::OPNOTSUPP),
    }
}

fn is_users(name: &[u8]) -> bool {
    name.starts_with(b"user.") || name.starts_with(ACL_PREFIX)
}

impl Share {
    /// The value of an attribute, or its length where `size` is zero.
    pub(crate) fn getxattr(
        &self,
        id: u64,
        name: &CStr,
        size: u32,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        check_readable(name)?;
        let (_, held) = self.held(id)?;
        let path = ProcPath::of(&*held);
        let size = usize::try_from(size).map_err(|_| Errno::INVAL)?;
        let room = reply.room(size.min(MAX_VALUE));
        let length = self.lend(held.as_fd(), 0o400, || {
            rustix::fs::getxattr(path.as_c_str(), name, &mut *room)
        })?;
        if size == 0 {
            return push_size(reply, length);
        }
        if name.to_bytes().starts_with(ACL_PREFIX) {
            let value = room.get_mut(..length).unwrap_or_default();
            self.map_acl(value, Direction::ToGuest);
        }
        reply.grow(length);
        Ok(())
    }

    /// The names of the attributes, or the length of the list where `size` is zero.
    pub(crate) fn listxattr(&self, id: u64, size: u32, reply: &mut Reply) -> Result<(), Errno> {
        let (_, held) = self.held(id)?;
        let path = ProcPath::of(&*held);
        let mut names = vec![0; MAX_VALUE];
        let length = rustix::fs::listxattr(path.as_c_str(), &mut names[..])?;
        names.truncate(length);
        let shown = names.split_inclusive(|byte| *byte == 0).filter(|name| {
            CStr::from_bytes_with_nul(name).is_ok_and(|name| check_readable(name).is_ok())
        });
        if size == 0 {
            let length = shown.map(<[u8]>::len).sum();
            return push_size(reply, length);
        }
        let size = usize::try_from(size).map_err(|_| Errno::INVAL)?;
        for name in shown {
            if reply.len() + name.len() > size {
                return Err(Errno::RANGE);
            }
            reply.put(name)?;
        }
        Ok(())
    }

    pub(crate) fn setxattr(
        &self,
        id: u64,
        asked: &SetxattrIn,
        name: &CStr,
        value: &[u8],
    ) -> Result<(), Errno> {
        self.check_writable()?;
        check_changeable(name)?;
        let (inode, held) = self.held(id)?;
        let size = usize::try_from(asked.size).map_err(|_| Errno::INVAL)?;
        let value = value.get(..size).ok_or(Errno::INVAL)?;
        if value.len() > MAX_VALUE {
            return Err(Errno::TOOBIG);
        }
        let flags = XattrFlags::from_bits_retain(asked.flags);
        if !name.to_bytes().starts_with(ACL_PREFIX) {
            return self.set(&held, name, value, flags);
        }
        let mut value = value.to_vec();
        self.map_acl(&mut value, Direction::ToHost);
        self.set(&held, name, &value, flags)?;
        match asked.setxattr_flags & SETXATTR_ACL_KILL_SGID {
            0 => Ok(()),
            _ => self.kill_setgid(&inode, &held),
        }
    }

    fn set(&self, held: &Held, name: &CStr, value: &[u8], flags: XattrFlags) -> Result<(), Errno> {
        let path = ProcPath::of(held);
        self.lend(held.as_fd(), 0o600, || {
            rustix::fs::setxattr(path.as_c_str(), name, value, flags)
        })
    }

    pub(crate) fn removexattr(&self, id: u64, name: &CStr) -> Result<(), Errno> {
        self.check_writable()?;
        check_changeable(name)?;
        let (_, held) = self.held(id)?;
        let path = ProcPath::of(&*held);
        self.lend(held.as_fd(), 0o600, || {
            rustix::fs::removexattr(path.as_c_str(), name)
        })
    }

    fn kill_setgid(&self, inode: &Inode, held: &Held) -> Result<(), Errno> {
        let stat = Stat::fd(held.as_fd())?;
        let over = self.recall_held(inode, held, &stat);
        let mode = self.owners.seen(&stat, &over).mode;
        match mode & 0o2000 {
            0 => Ok(()),
            _ => self.set_mode(inode, held, mode & !0o2000),
        }
    }

    /// Puts the other side's numbers of users and groups into an access list. What is no access list
    /// is left alone: the host refuses it.
    fn map_acl(&self, acl: &mut [u8], direction: Direction) {
        let Owner::Mapped(guest) = self.owners.rule else {
            return;
        };
        let host = self.owners.host;
        let entries = acl.get_mut(ACL_HEADER_LEN..).unwrap_or_default();
        for entry in entries.chunks_exact_mut(ACL_ENTRY_LEN) {
            let (tag, id) = entry.split_at_mut(4);
            let Ok(id) = <&mut [u8; 4]>::try_from(id) else {
                continue;
            };
            let (host, guest) = match tag.first_chunk::<2>() {
                Some(&ACL_USER) => (host.uid, guest.uid),
                Some(&ACL_GROUP) => (host.gid, guest.gid),
                _ => continue,
            };
            let number = u32::from_ne_bytes(*id);
            let mapped = match direction {
                Direction::ToHost if number == guest => host,
                Direction::ToGuest if number == host => guest,
                _ => number,
            };
            *id = mapped.to_ne_bytes();
        }
    }
}

#[derive(Clone, Copy)]
enum Direction {
    ToHost,
    ToGuest,
}

fn push_size(reply: &mut Reply, length: usize) -> Result<(), Errno> {
    reply.push(&GetxattrOut {
        size: u32::try_from(length).map_err(|_| Errno::RANGE)?,
        padding: 0,
    })
}
