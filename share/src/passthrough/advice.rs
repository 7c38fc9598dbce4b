//! What the guest had better do, seen from what it asks for.

use std::sync::atomic::Ordering;

use zerocopy::FromBytes;

use super::{BRIEFLY, Share};
use crate::channel::Advice;
use crate::wire::{EntryOut, InHeader, OUT_HEADER_LEN, Opcode};

/// How many names are looked up before it is worth to list their directory, as they come with their attributes then;
/// and twice as many the next time, and so on.
const LOOKUPS: u32 = 2;

/// How many entries are listed for each name that was looked up: less than one request brings, whatever the
/// directory's size.
const ENTRIES: u32 = 16;

impl Share {
    /// What to advise with the reply to `message`, whose bytes are `reply`.
    pub(crate) fn advice(&self, message: &[u8], reply: &[u8]) -> Option<Advice> {
        let (header, _) = InHeader::read_from_prefix(message).ok()?;
        let opcode = Opcode::from_number(header.opcode)?;
        if !matches!(opcode, Opcode::Lookup | Opcode::Create) {
            return None;
        }
        let (entry, _) = EntryOut::read_from_prefix(reply.get(OUT_HEADER_LEN..)?).ok()?;
        // What is soon not believed any more is not worth it, nor is what is not there.
        if entry.nodeid == 0 || entry.entry_valid <= BRIEFLY.as_secs() {
            return None;
        }
        match opcode {
            Opcode::Create => self.is_new(entry.nodeid),
            _ => self.listing(header.nodeid),
        }
    }

    fn is_new(&self, node: u64) -> Option<Advice> {
        let inode = self.inodes.get(node).ok()?;
        let is_new = inode.is_new.swap(false, Ordering::Relaxed);
        is_new.then_some(Advice::New { node })
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
