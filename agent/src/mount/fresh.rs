//! Files that were made just now, of which the kernel asks what nobody has to ask the host.
//!
//! Before it lets a file be written the first time, or be given to another owner, the kernel wants to know its
//! `security.capability`: for a tree that is unpacked that is every fifth request. The host says of each new file
//! that it has none, and that is true until somebody gives it one, here or there.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::message::{self, IN_HEADER, OUT_HEADER};

/// As many files are remembered: those that are in the making at a time.
const REMEMBERED: usize = 64;

/// The opcodes `FUSE_SETXATTR` and `FUSE_GETXATTR`.
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;

/// Where a `FUSE_GETXATTR` has the name: behind `fuse_getxattr_in`.
const NAME: usize = IN_HEADER + 8;
const CAPABILITY: &[u8] = b"security.capability\0";

/// The nodes of files that have no `security.capability`.
#[derive(Debug, Default)]
pub struct Fresh(Mutex<VecDeque<u64>>);

impl Fresh {
    /// A file was made.
    pub fn add(&self, node: u64) {
        let mut nodes = self.lock();
        if nodes.len() >= REMEMBERED {
            nodes.pop_front();
        }
        nodes.push_back(node);
    }

    /// The reply to a request for what such a file has not: `ENODATA`. None where the host is to be asked.
    pub fn reply_to(&self, request: &[u8]) -> Option<[u8; OUT_HEADER]> {
        let opcode = message::opcode(request)?;
        if !matches!(opcode, SETXATTR | GETXATTR) {
            return None;
        }
        let node = message::node(request)?;
        if opcode == SETXATTR {
            self.forget(node);
            return None;
        }
        if request.get(NAME..)? != CAPABILITY || !self.lock().contains(&node) {
            return None;
        }
        message::reply(request, -libc::ENODATA)
    }

    /// Something else may have happened to a file.
    pub fn forget(&self, node: u64) {
        self.lock().retain(|known| *known != node);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, node: u64, name: &[u8]) -> Vec<u8> {
        let mut request = vec![0; NAME];
        request[4..8].copy_from_slice(&opcode.to_le_bytes());
        request[8] = 9;
        request[16..24].copy_from_slice(&node.to_le_bytes());
        request.extend(name);
        request
    }

    #[test]
    fn a_new_file_has_no_capability_until_somebody_gives_it_something() {
        let fresh = Fresh::default();
        let asked = |node| fresh.reply_to(&request(GETXATTR, node, CAPABILITY));
        fresh.add(5);
        fresh.add(6);
        let enodata = [16, 0, 0, 0, 195, 255, 255, 255, 9, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(asked(5), Some(enodata));
        assert_eq!(asked(7), None);
        assert_eq!(
            fresh.reply_to(&request(GETXATTR, 5, b"user.mime_type\0")),
            None
        );
        assert_eq!(fresh.reply_to(&request(SETXATTR, 5, CAPABILITY)), None);
        assert_eq!((asked(5), asked(6)), (None, Some(enodata)));
        fresh.forget(6);
        assert_eq!(asked(6), None);
    }

    #[test]
    fn few_are_remembered_and_short_messages_are_for_the_host() {
        let fresh = Fresh::default();
        (0..1000).for_each(|node| fresh.add(node));
        assert_eq!(fresh.lock().len(), REMEMBERED);
        let whole = request(GETXATTR, 999, CAPABILITY);
        for length in 0..whole.len() {
            assert_eq!(fresh.reply_to(&whole[..length]), None);
        }
        assert!(fresh.reply_to(&whole).is_some());
    }
}
