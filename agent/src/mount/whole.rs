//! Directories of which all names are known.
//!
//! A program that makes many files looks each name up first, or its kernel does: for a tree that is unpacked that is
//! every sixth request. The host says of a directory that was made just now that it is empty, and that the kernel will be
//! told of what the host changes in there. What the guest makes passes through here. So what neither has made is not there.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::message::{self, IN_HEADER, OUT_HEADER};

/// As many directories are kept in mind, and of each as many names.
const DIRECTORIES: usize = 32;
const NAMES: usize = 4096;

/// The longest name of which it is said that it is not there, bytes: filesystems refuse names from 144 on.
const LONGEST: usize = 128;

/// The opcodes `FUSE_LOOKUP`, and `FUSE_RENAME` and `FUSE_RENAME2`.
const LOOKUP: u32 = 1;
const RENAME: u32 = 12;
const RENAME2: u32 = 45;

/// Requests that make a name, and where they have it: `FUSE_SYMLINK`, `FUSE_MKNOD`, `FUSE_MKDIR`, `FUSE_LINK` and
/// `FUSE_CREATE`, behind the structures of the same names.
const MAKING: [(u32, usize); 5] = [
    (6, IN_HEADER),
    (8, IN_HEADER + 16),
    (9, IN_HEADER + 8),
    (13, IN_HEADER + 8),
    (35, IN_HEADER + 16),
];

/// The length of `fuse_entry_out`, where that has how long the entry is believed, and a reply with it.
const ENTRY: usize = 128;
const ENTRY_VALID: usize = OUT_HEADER + 16;
const REPLY: usize = OUT_HEADER + ENTRY;

/// What is known of directories.
#[derive(Debug, Default)]
pub struct Whole {
    /// Locked until an answer has been given, too: what is said after it is forgotten is true.
    directories: Mutex<VecDeque<Directory>>,
    hasher: RandomState,
}

#[derive(Debug)]
struct Directory {
    node: u64,
    /// How long it is believed that a name is not there, seconds.
    validity: u64,
    /// Hashes of the names that may be there, in lower case. Of two with one hash, the host is asked for either.
    names: HashSet<u64>,
}

impl Whole {
    /// A directory is empty.
    pub fn add(&self, node: u64, validity: u64) {
        let mut directories = self.lock();
        directories.retain(|directory| directory.node != node);
        if directories.len() >= DIRECTORIES {
            directories.pop_front();
        }
        directories.push_back(Directory {
            node,
            validity,
            names: HashSet::new(),
        });
    }

    /// Answers a request for a name that is not there; whether it was one.
    pub fn answer(&self, request: &[u8], answer: impl Fn(&[u8])) -> bool {
        self.try_answer(request, answer).is_some()
    }

    fn try_answer(&self, request: &[u8], answer: impl Fn(&[u8])) -> Option<()> {
        let opcode = message::opcode(request)?;
        let at = match opcode {
            LOOKUP | RENAME | RENAME2 => IN_HEADER,
            making => MAKING.iter().find(|(opcode, _)| *opcode == making)?.1,
        };
        let mut directories = self.lock();
        if directories.is_empty() {
            return None;
        }
        let node = message::node(request)?;
        if opcode == LOOKUP {
            let directory = directories.iter().find(|known| known.node == node)?;
            let name = name(request, at)?;
            if !is_plain(name) || directory.names.contains(&self.hash(name)) {
                return None;
            }
            answer(&absent(request, directory.validity)?);
            return Some(());
        }
        let (node, name) = match opcode {
            RENAME => (message::number(request, at)?, new_name(request, at + 8)?),
            RENAME2 => (message::number(request, at)?, new_name(request, at + 16)?),
            _ => (node, name(request, at)?),
        };
        let at = directories.iter().position(|known| known.node == node)?;
        let names = &mut directories.get_mut(at)?.names;
        names.insert(self.hash(name));
        if names.len() > NAMES || !is_plain(name) {
            directories.remove(at);
        }
        None
    }

    /// Something else may have happened to a directory, of which the kernel is yet to be told.
    pub fn forget(&self, node: u64) {
        self.lock().retain(|directory| directory.node != node);
    }

    fn hash(&self, name: &[u8]) -> u64 {
        self.hasher.hash_one(name.to_ascii_lowercase())
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Directory>> {
        self.directories
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a name stands for itself and what differs from it in case, whatever the host's filesystem takes for equal, and is
/// not too long for any. `.` and `..`, by which handles are looked up, are none.
fn is_plain(name: &[u8]) -> bool {
    name.is_ascii()
        && name.len() <= LONGEST
        && !name.contains(&b'~')
        && !matches!(name.last(), None | Some(b'.' | b' '))
}

/// The name in a request that begins at `at`.
fn name(request: &[u8], at: usize) -> Option<&[u8]> {
    request.get(at..)?.split(|byte| *byte == 0).next()
}

/// The second of two names.
fn new_name(request: &[u8], at: usize) -> Option<&[u8]> {
    request.get(at..)?.split(|byte| *byte == 0).nth(1)
}

/// The reply that a name is not there.
fn absent(request: &[u8], validity: u64) -> Option<[u8; REPLY]> {
    let mut reply = message::reply::<REPLY>(request, 0)?;
    reply[ENTRY_VALID..ENTRY_VALID + 8].copy_from_slice(&validity.to_le_bytes());
    Some(reply)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn request(opcode: u32, node: u64, rest: &[u8]) -> Vec<u8> {
        let mut request = vec![0; IN_HEADER];
        request[4..8].copy_from_slice(&opcode.to_le_bytes());
        request[8] = 9;
        request[16..24].copy_from_slice(&node.to_le_bytes());
        request.extend(rest);
        request
    }

    fn is_absent(whole: &Whole, node: u64, name: &str) -> bool {
        let name = format!("{name}\0");
        whole.answer(&request(LOOKUP, node, name.as_bytes()), |_| ())
    }

    #[test]
    fn a_name_that_nobody_has_made_is_not_there() {
        let whole = Whole::default();
        assert!(!is_absent(&whole, 5, "file"));
        whole.add(5, 77);
        let replies = RefCell::new(Vec::new());
        let asked = request(LOOKUP, 5, b"file\0");
        assert!(whole.answer(&asked, |reply| replies.borrow_mut().push(reply.to_vec())));
        let replies = replies.into_inner();
        assert_eq!(replies.len(), 1);
        assert_eq!(
            replies[0][..16],
            [144, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]
        );
        // No node, and for how long that there is none.
        assert_eq!(replies[0][16..24], [0; 8]);
        assert_eq!(replies[0][32..40], [77, 0, 0, 0, 0, 0, 0, 0]);
        assert!(!is_absent(&whole, 6, "file"));
        assert!(!is_absent(&whole, 5, ".") && !is_absent(&whole, 5, ".."));
    }

    #[test]
    fn whatever_the_guest_makes_is_asked_for() {
        let whole = Whole::default();
        whole.add(5, 1);
        whole.add(6, 1);
        for (opcode, at, name) in [
            (6, 0, "symlink"),
            (8, 16, "mknod"),
            (9, 8, "mkdir"),
            (13, 8, "link"),
            (35, 16, "create"),
        ] {
            assert!(is_absent(&whole, 5, name));
            let mut rest = vec![1; at];
            rest.extend(name.as_bytes());
            rest.extend(b"\0target\0");
            assert!(!whole.answer(&request(opcode, 5, &rest), |_| ()));
            assert!(!is_absent(&whole, 5, name), "{name}");
            assert!(is_absent(&whole, 6, name));
        }
        // To another directory, by either request.
        for (opcode, padding) in [(RENAME, 0), (RENAME2, 8)] {
            let mut rest = 6_u64.to_le_bytes().to_vec();
            rest.resize(8 + padding, 0);
            rest.extend(format!("old\0new{opcode}\0").as_bytes());
            assert!(!whole.answer(&request(opcode, 5, &rest), |_| ()));
            assert!(!is_absent(&whole, 6, &format!("new{opcode}")));
            assert!(is_absent(&whole, 5, &format!("new{opcode}")));
            assert!(is_absent(&whole, 6, "old"));
        }
    }

    #[test]
    fn what_the_host_has_changed_and_what_is_too_much_is_asked_for() {
        let whole = Whole::default();
        whole.add(5, 1);
        whole.forget(5);
        assert!(!is_absent(&whole, 5, "file"));
        whole.add(5, 1);
        for number in 0..=NAMES {
            assert!(is_absent(&whole, 5, "file"));
            let name = format!("{number}\0");
            whole.answer(&request(6, 5, name.as_bytes()), |_| ());
        }
        assert!(!is_absent(&whole, 5, "file"));
        (0..1000).for_each(|node| whole.add(node, 1));
        assert_eq!(whole.lock().len(), DIRECTORIES);
        whole.add(999, 1);
        assert_eq!(whole.lock().len(), DIRECTORIES);
    }

    #[test]
    fn names_that_filesystems_may_refuse_or_take_for_others_are_asked_for() {
        let whole = Whole::default();
        let make = |name: &str| {
            let name = format!("{name}\0target\0");
            whole.answer(&request(6, 5, name.as_bytes()), |_| ());
        };
        whole.add(5, 1);
        make("File");
        for name in ["file", "FILE", "", "a.", "a ", "longfi~1", "\u{212a}"] {
            assert!(!is_absent(&whole, 5, name), "{name:?}");
        }
        assert!(is_absent(&whole, 5, &"n".repeat(LONGEST)));
        assert!(!is_absent(&whole, 5, &"n".repeat(LONGEST + 1)));
        for name in ["\u{212a}", "a. ", "~"] {
            whole.add(5, 1);
            assert!(is_absent(&whole, 5, "k"));
            make(name);
            assert!(!is_absent(&whole, 5, "k"), "{name:?}");
        }
    }

    #[test]
    fn messages_that_end_too_soon_are_for_the_host() {
        let whole = Whole::default();
        whole.add(0, 1);
        for opcode in [LOOKUP, RENAME, RENAME2, 6, 8, 9, 13, 35] {
            let message = request(opcode, 0, &[]);
            for length in 0..message.len() {
                assert!(!whole.answer(&message[..length], |_| ()));
            }
        }
    }
}
