//! Calls of guests that mean well, and of others.

use std::fs;
use std::thread;

use agent::protocol::for_host;
use share::wire::{Opcode, ROOT_ID};
use share::{Options, dispatch};
use tempfile::TempDir;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;

const MEMORY: usize = 1 << 20;

/// What is in the area where nobody wrote.
const NOTHING: u8 = 0xaa;

/// Every other page, from the top downwards.
fn pages() -> Vec<u64> {
    let page = |number| (MEMORY - 2 * number * WINDOW_PAGE) as u64;
    (1..=CALL_PAGES).map(page).collect()
}

struct Guest {
    _dir: TempDir,
    desk: Desk,
    area: Pieces,
}

impl Guest {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("file"), "content").unwrap();
        let share = Share::open(dir.path(), Options::default()).unwrap();
        let mapped = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let desk = Desk::new(Arc::new(share), GuestMemory::from(mapped));
        let guest = Self {
            _dir: dir,
            desk,
            area: Pieces::of(&pages()),
        };
        guest.put(0, &[NOTHING; AREA]);
        guest
    }

    fn open() -> Self {
        let guest = Self::new();
        guest.desk.open(&pages()).unwrap();
        guest
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        self.area.write(&self.desk.memory, at, bytes).unwrap();
    }

    fn seen(&self, at: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.area.read(&self.desk.memory, at, &mut bytes).unwrap();
        bytes
    }

    /// Calls as the agent does; what was done, and what is answered.
    fn call(&self, messages: &[u8]) -> (u64, Vec<u8>) {
        self.put(CALL_HEADER, messages);
        self.call_with(messages.len() as u64)
    }

    fn call_with(&self, asked: u64) -> (u64, Vec<u8>) {
        self.put(CALL_ASKED, &asked.to_le_bytes());
        self.put(CALL_DONE, &0_u64.to_le_bytes());
        // A vCPU's thread.
        thread::scope(|scope| scope.spawn(|| self.desk.call()).join().unwrap());
        let number = |at| self.desk.number(&self.area, at).unwrap();
        match number(CALL_DONE) {
            0 => (0, Vec::new()),
            done => {
                let answered = usize::try_from(number(CALL_ANSWERED)).unwrap();
                (done, self.seen(CALL_HEADER, answered))
            }
        }
    }
}

fn request(opcode: Opcode, node: u64, unique: u64, body: &[u8]) -> Vec<u8> {
    let mut request = for_host(opcode as u32, unique, &[]);
    request[16..24].copy_from_slice(&node.to_le_bytes());
    request.extend(body);
    let length = u32::try_from(request.len()).unwrap();
    request[..4].copy_from_slice(&length.to_le_bytes());
    request
}

fn lookup(unique: u64) -> Vec<u8> {
    request(Opcode::Lookup, ROOT_ID, unique, b"file\0")
}

fn node(reply: &[u8]) -> u64 {
    u64::from_ne_bytes(*reply[16..].first_chunk().unwrap())
}

#[test]
fn the_answer_lies_where_the_request_did() {
    let guest = Guest::open();
    let request = lookup(6);
    let (done, answered) = guest.call(&request);
    assert_eq!(done, request.len() as u64);
    let mut reply = Reply::with_capacity(PLACED_FROM);
    let (_, expected) = dispatch(&guest.desk.share, &lookup(6), &mut reply);
    assert_eq!(answered, expected);
    assert_eq!(guest.desk.replies(), 1);
    // Nothing was written behind it.
    let behind = guest.seen(CALL_HEADER + answered.len(), 100);
    assert_eq!(behind, [NOTHING; 100]);
}

#[test]
fn what_was_held_back_is_done_after_and_has_no_reply() {
    let guest = Guest::open();
    let known = guest.call(&lookup(6)).1;
    let forget = request(Opcode::Forget, node(&known), 0, &1_u64.to_ne_bytes());
    let fsync = request(Opcode::Fsync, ROOT_ID, 8, &[0; 16]);
    let missing = request(Opcode::Lookup, ROOT_ID, 10, b"nothing\0");
    let (done, answered) =
        guest.call(&[&missing[..], &forget, &lookup(12), &fsync, &forget].concat());
    // That with the longer wait is left, and all behind it.
    let expected = missing.len() + forget.len() + lookup(12).len();
    assert_eq!(done, expected as u64);
    assert_eq!(answered[8..16], 10_u64.to_ne_bytes());
    assert_eq!(guest.desk.replies(), 2);
    // The guest has forgotten it once, and was told of it once more.
    assert_eq!(guest.desk.share.usage().0, 2);
}

#[test]
fn advice_comes_before_the_reply() {
    let guest = Guest::open();
    let body = [&[0; 16][..], b"new\0"].concat();
    let (_, answered) = guest.call(&request(Opcode::Mkdir, ROOT_ID, 6, &body[8..]));
    let length = |bytes: &[u8]| u32::from_ne_bytes(*bytes.first_chunk().unwrap()) as usize;
    let mut rest = &answered[..];
    let mut numbers = Vec::new();
    while !rest.is_empty() {
        numbers.push(u64::from_ne_bytes(*rest[8..].first_chunk().unwrap()));
        rest = &rest[length(rest)..];
    }
    assert_eq!(numbers.last(), Some(&6));
    assert!(numbers.iter().rev().skip(1).all(|number| *number == 0));
}

#[test]
fn what_would_wait_is_left_alone() {
    let guest = Guest::open();
    let fsync = request(Opcode::Fsync, ROOT_ID, 6, &[0; 16]);
    assert_eq!(guest.call(&fsync), (0, Vec::new()));
    assert_eq!(guest.seen(CALL_HEADER, fsync.len()), fsync);
    // Another vCPU is at it.
    let _work = guest.desk.work.lock().unwrap();
    assert_eq!(guest.call(&lookup(6)), (0, Vec::new()));
    assert_eq!(guest.desk.replies(), 0);
}

#[test]
fn a_call_that_makes_no_sense_is_not_answered() {
    let guest = Guest::new();
    assert_eq!(guest.call(&lookup(6)).0, 0, "nothing is open");
    assert!(guest.desk.open(&pages()[1..]).is_err());
    guest.desk.open(&pages()).unwrap();
    assert!(guest.desk.open(&pages()).is_err());
    for asked in [0, 3, 39, 44, AREA as u64, u64::MAX] {
        assert_eq!(guest.call_with(asked).0, 0, "{asked} bytes");
    }
    for length in [0_u32, 1, 39, 46, u32::MAX] {
        let mut request = lookup(6);
        request[..4].copy_from_slice(&length.to_le_bytes());
        assert_eq!(guest.call(&request).0, 0, "of {length} bytes");
    }
    // And then it is as before.
    assert_eq!(guest.call(&lookup(6)).0, 45);
}

#[test]
fn an_area_that_is_no_memory_is_not_touched() {
    for address in [MEMORY as u64, u64::MAX, u64::MAX - 4095] {
        let guest = Guest::new();
        guest.desk.open(&[address; CALL_PAGES]).unwrap();
        assert_eq!(guest.call(&lookup(6)).0, 0, "{address:#x}");
        assert_eq!(guest.desk.replies(), 0);
    }
}
