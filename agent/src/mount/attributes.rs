//! The attributes of directories that the guest has just changed, or listed.
//!
//! After each name that it has made or removed, the kernel asks for the directory's attributes anew, before it goes
//! on in there; and when one that it has listed is looked at the next time, as it may have another time of access. The host
//! has said them with the reply, so it need not be asked. They are used once, and only while
//! nothing else may have changed them: what the host changes is told after that reply (`super::order`), and
//! what the guest changes passes through here.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::message::{self, OUT_HEADER};

/// As many directories are kept in mind, with some 200 bytes each.
const REMEMBERED: usize = 1024;

/// The opcode `FUSE_GETATTR`.
const GETATTR: u32 = 3;

/// Requests that change, besides the directories that they name, one of which they tell a name only: `FUSE_RMDIR`,
/// `FUSE_RENAME` and `FUSE_RENAME2`.
const CHANGE_OTHERS: [u32; 3] = [11, 12, 45];

/// Requests that change nothing of the node that they are for: `FUSE_LOOKUP`, `FUSE_FORGET`, `FUSE_READLINK`,
/// `FUSE_STATFS`, `FUSE_GETXATTR`, `FUSE_LISTXATTR`, `FUSE_OPENDIR`, `FUSE_RELEASEDIR`, `FUSE_INTERRUPT` and
/// `FUSE_BATCH_FORGET`.
const CHANGE_NOTHING: [u32; 10] = [1, 2, 5, 17, 22, 23, 27, 29, 36, 42];

/// The length of `fuse_attr_out`, and of a reply with it.
const ATTRIBUTES: usize = 104;
const REPLY: usize = OUT_HEADER + ATTRIBUTES;

/// What is known of directories.
#[derive(Debug, Default)]
pub struct Attributes(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The highest number so far.
    latest: u64,
    /// By node: the number of the message that said them, and the attributes.
    known: HashMap<u64, (u64, [u8; ATTRIBUTES])>,
    /// The same nodes by number: those that were said first in front.
    order: BTreeMap<u64, u64>,
}

impl Attributes {
    /// A directory has these now, says the host with this number: one that comes late, from another connection, may
    /// not know what those say that came before it.
    pub fn add(&self, node: u64, number: u64, attributes: &[u8]) {
        let Ok(attributes) = attributes.try_into() else {
            return;
        };
        let mut state = self.lock();
        if number <= state.latest {
            return;
        }
        state.latest = number;
        state.forget(node);
        state.known.insert(node, (number, attributes));
        state.order.insert(number, node);
        if state.known.len() > REMEMBERED
            && let Some((_, oldest)) = state.order.pop_first()
        {
            state.known.remove(&oldest);
        }
    }

    /// The reply to a request for such attributes; None where the host is to be asked.
    pub fn reply_to(&self, request: &[u8]) -> Option<[u8; REPLY]> {
        let opcode = message::opcode(request)?;
        if CHANGE_NOTHING.contains(&opcode) {
            return None;
        }
        let node = message::node(request)?;
        let mut state = self.lock();
        if state.known.is_empty() {
            return None;
        }
        let attributes = state.forget(node);
        if CHANGE_OTHERS.contains(&opcode) {
            state.known.clear();
            state.order.clear();
        }
        let attributes = attributes.filter(|_| opcode == GETATTR)?;
        let mut reply = message::reply::<REPLY>(request, 0)?;
        reply[OUT_HEADER..].copy_from_slice(&attributes);
        Some(reply)
    }

    /// Something else may have happened to a directory.
    pub fn forget(&self, node: u64) {
        self.lock().forget(node);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes out what is known of a directory.
    fn forget(&mut self, node: u64) -> Option<[u8; ATTRIBUTES]> {
        let (number, attributes) = self.known.remove(&node)?;
        self.order.remove(&number);
        Some(attributes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MKDIR: u32 = 9;
    const LOOKUP: u32 = 1;

    fn request(opcode: u32, node: u64) -> Vec<u8> {
        let mut request = vec![0; 48];
        request[4..8].copy_from_slice(&opcode.to_le_bytes());
        request[8] = 9;
        request[16..24].copy_from_slice(&node.to_le_bytes());
        request
    }

    fn asked(known: &Attributes, node: u64) -> Option<u8> {
        let reply = known.reply_to(&request(GETATTR, node))?;
        assert_eq!(
            (reply[..8].to_vec(), reply[8]),
            (vec![120, 0, 0, 0, 0, 0, 0, 0], 9)
        );
        Some(reply[16])
    }

    #[test]
    fn what_the_host_said_last_is_the_reply_once() {
        let known = Attributes::default();
        known.add(5, 1, &[1; ATTRIBUTES]);
        known.add(5, 3, &[3; ATTRIBUTES]);
        known.add(5, 2, &[2; ATTRIBUTES]);
        known.add(6, 4, &[4; ATTRIBUTES]);
        known.add(7, 5, &[5; ATTRIBUTES - 1]);
        assert_eq!(known.reply_to(&request(LOOKUP, 5)), None);
        assert_eq!((asked(&known, 5), asked(&known, 5)), (Some(3), None));
        assert_eq!((asked(&known, 6), asked(&known, 7)), (Some(4), None));
        // Not even after it was used does what comes late say anything.
        known.add(5, 3, &[3; ATTRIBUTES]);
        assert_eq!(asked(&known, 5), None);
    }

    #[test]
    fn whatever_may_change_a_directory_has_the_host_asked() {
        let known = Attributes::default();
        known.add(5, 1, &[1; ATTRIBUTES]);
        assert_eq!(known.reply_to(&request(MKDIR, 5)), None);
        assert_eq!(asked(&known, 5), None);
        // One of them may be what is renamed or removed.
        for (number, opcode) in (2..).step_by(2).zip(CHANGE_OTHERS) {
            known.add(6, number, &[2; ATTRIBUTES]);
            known.add(7, number + 1, &[3; ATTRIBUTES]);
            assert_eq!(known.reply_to(&request(opcode, 5)), None);
            assert_eq!((asked(&known, 6), asked(&known, 7)), (None, None));
        }
        known.add(7, 100, &[3; ATTRIBUTES]);
        known.forget(7);
        assert_eq!(asked(&known, 7), None);
    }

    #[test]
    fn few_are_kept_in_mind() {
        let known = Attributes::default();
        let count = 5 * REMEMBERED as u64;
        (1..count).for_each(|number| known.add(number, number, &[0; ATTRIBUTES]));
        // One that becomes known again and again, and one that is used each time.
        for number in count..2 * count {
            known.add(count - 1, number, &[1; ATTRIBUTES]);
        }
        for number in 2 * count..3 * count {
            known.add(0, number, &[0; ATTRIBUTES]);
            assert_eq!(asked(&known, 0), Some(0));
        }
        let state = known.lock();
        assert!(state.known.len() <= REMEMBERED);
        assert!(state.order.len() <= 2 * REMEMBERED + 1);
        drop(state);
        assert_eq!(asked(&known, count - 1), Some(1));
        assert_eq!(asked(&known, count - 2), Some(0));
        assert_eq!(asked(&known, 1), None);
    }
}
