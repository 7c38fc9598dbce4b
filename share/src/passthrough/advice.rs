//! What the guest had better do, seen from what it asks for.

use std::sync::atomic::Ordering;

use zerocopy::FromBytes;

use super::{BRIEFLY, Share};
use crate::channel::Advice;
use crate::wire::{EntryOut, InHeader, OUT_HEADER_LEN, Opcode, OutHeader};

/// How many names are looked up before it is worth to list their directory, as they come with their attributes then;
/// and twice as many the next time, and so on.
const LOOKUPS: u32 = 2;

/// How many entries are listed for each name that was looked up: less than one request brings, whatever the
/// directory's size.
const ENTRIES: u32 = 16;

impl Share {
    /// What to advise with the reply to `message`, whose bytes are `reply`.
    pub(crate) fn advice(&self, message: &[u8], reply: &[u8]) -> Vec<Advice> {
        use Opcode::{
            Create, Link, Lookup, Mkdir, Mknod, Readdir, Readdirplus, Rmdir, Symlink, Unlink,
        };
        let mut advice = Vec::new();
        // What is soon not believed any more is not worth it.
        if self.validity(true) <= BRIEFLY {
            return advice;
        }
        let Some((header, opcode)) = answered(message, reply) else {
            return advice;
        };
        match opcode {
            Lookup if is_believed(reply) => advice.extend(self.listing(header.nodeid)),
            Create | Link | Mkdir | Mknod | Rmdir | Symlink | Unlink => {
                advice.extend(self.attributes(header.nodeid));
                match opcode {
                    Create => advice.extend(self.is_new(reply).filter(|_| is_believed(reply))),
                    Mkdir => advice.extend(self.is_empty(reply)),
                    _ => {}
                }
            }
            // It has been read to its end, by which its time of access may be another.
            Readdir | Readdirplus if reply.len() == OUT_HEADER_LEN => {
                advice.extend(self.attributes(header.nodeid));
            }
            _ => {}
        }
        advice
    }

    /// What attributes a directory has now: its kernel does not know them any more.
    fn attributes(&self, node: u64) -> Option<Advice> {
        // What was changed before this number was taken is seen in what is looked at after.
        let number = self.changes.fetch_add(1, Ordering::SeqCst) + 1;
        let attributes = self.getattr(node).ok()?;
        (attributes.attr_valid > BRIEFLY.as_secs()).then_some(Advice::Attributes {
            node,
            number,
            attributes: zerocopy::transmute!(attributes),
        })
    }

    /// A file that was made, told once.
    fn is_new(&self, reply: &[u8]) -> Option<Advice> {
        let node = entry(reply)?.nodeid;
        let inode = self.inodes.get(node).ok()?;
        let is_new = inode.is_new.swap(false, Ordering::Relaxed);
        is_new.then_some(Advice::New { node })
    }

    /// A directory that was made, if the guest is told from now on of what the host makes in there, and the host has not yet.
    fn is_empty(&self, reply: &[u8]) -> Option<Advice> {
        let node = entry(reply)?.nodeid;
        let (inode, dir) = self.dir(node).ok()?;
        let watched = self.watch_dir(&inode, &dir);
        let validity = self.validity(watched);
        if validity <= BRIEFLY || !self.has_no_entries(&inode, &dir).ok()? {
            return None;
        }
        let validity = validity.as_secs();
        Some(Advice::Empty { node, validity })
    }

    /// One more name was found in a directory.
    fn listing(&self, dir: u64) -> Option<Advice> {
        // A view of the host's root has directories of which a guest needs little.
        if self.filter.is_some() {
            return None;
        }
        let inode = self.inodes.get(dir).ok()?;
        let found = inode.found.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let is_time = found % LOOKUPS == 0 && (found / LOOKUPS).is_power_of_two();
        is_time.then_some(Advice::List {
            dir,
            entries: found.saturating_mul(ENTRIES),
        })
    }
}

/// The header of a request that was not refused, and what it asks for.
fn answered(message: &[u8], reply: &[u8]) -> Option<(InHeader, Opcode)> {
    let (outcome, _) = OutHeader::read_from_prefix(reply).ok()?;
    let (header, _) = InHeader::read_from_prefix(message).ok()?;
    let opcode = Opcode::from_number(header.opcode)?;
    (outcome.error == 0).then_some((header, opcode))
}

/// What a reply says of a name.
fn entry(reply: &[u8]) -> Option<EntryOut> {
    let (entry, _) = EntryOut::read_from_prefix(reply.get(OUT_HEADER_LEN..)?).ok()?;
    Some(entry)
}

/// Whether a reply is of something that is there, and is not soon to be asked for again.
fn is_believed(reply: &[u8]) -> bool {
    entry(reply).is_some_and(|entry| entry.nodeid != 0 && entry.entry_valid > BRIEFLY.as_secs())
}
