//! Windows of guests that mean well, and of others.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use agent::protocol::{PLACE, PLACED, REQUEST_PLACED, WINDOW, for_agent, for_host};
use share::Channel;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::folder::stream::Queue;

const MEMORY: usize = 8 << 20;
const PAGES: usize = WINDOW_SLOTS * SLOT_PAGES;

fn memory() -> GuestMemory {
    let mapped = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    GuestMemory::from(mapped)
}

/// Pages from the top of a part of memory downwards, but for each fourth, which follows the one before it.
fn pages() -> Vec<u64> {
    let pairs = (0..).map(|pair| (PAGES * 2 - pair * 4) as u64);
    let pages = pairs.flat_map(|page| [page, page - 2, page - 1]);
    pages
        .take(PAGES)
        .map(|page| page * WINDOW_PAGE as u64)
        .collect()
}

fn open() -> (Window, GuestMemory) {
    let memory = memory();
    let window = Window::new(memory.clone());
    window.open(&pages()).unwrap();
    (window, memory)
}

/// Bytes of which no two pages are alike.
fn content(length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (at / 7 + at / 4096 * 3) as u8)
        .collect()
}

fn slot(number: usize) -> Vec<u64> {
    pages()[number * SLOT_PAGES..][..SLOT_PAGES].to_vec()
}

/// What is in a slot.
fn seen(memory: &GuestMemory, number: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; SLOT];
    for (page, into) in slot(number).iter().zip(bytes.chunks_mut(WINDOW_PAGE)) {
        memory.read(*page, into).unwrap();
    }
    bytes.truncate(length);
    bytes
}

fn put(memory: &GuestMemory, number: usize, bytes: &[u8]) {
    for (page, part) in slot(number).iter().zip(bytes.chunks(WINDOW_PAGE)) {
        memory.write(*page, part).unwrap();
    }
}

#[test]
fn a_request_is_what_lies_in_its_slot() {
    let (window, memory) = open();
    for (number, length) in [(0, SLOT), (1, PLACED_FROM), (1, 70_001)] {
        let sent = content(length);
        put(&memory, number, &sent);
        let mut message = vec![0; SLOT];
        let slot = number as u64;
        let fetched = window.fetch(slot, length as u64, &mut message).unwrap();
        assert!(
            fetched == length && message[..length] == sent,
            "{length} bytes"
        );
    }
}

#[test]
fn a_reply_that_is_all_here_is_not_placed_and_gives_its_slot_back() {
    let (window, memory) = open();
    for reply in [content(16), content(100_003)] {
        let (head, rest) = reply.split_at(16);
        let parts = [IoSlice::new(head), IoSlice::new(rest)];
        assert!(!window.place(6, &parts, reply.len()).unwrap());
        window.lend(6, 1).unwrap();
        assert!(!window.place(6, &parts, reply.len()).unwrap());
        assert!(seen(&memory, 1, 16) == [0; 16]);
    }
    // Both can be lent again.
    window.lend(10, 0).unwrap();
    window.lend(12, 1).unwrap();
}

#[test]
fn a_file_is_read_to_behind_the_place_of_the_header() {
    let (window, memory) = open();
    let mut file = tempfile::tempfile().unwrap();
    let whole = content(300_000);
    file.write_all(&whole).unwrap();
    let read = |unique, offset, length| window.read(unique, file.as_fd(), offset, length);
    assert!(read(6, 0, 65536).is_none(), "nothing was lent");
    window.lend(6, 1).unwrap();
    for (offset, length, expected) in [
        (0, 65536, 65536),
        (5, 4081, 4081),
        (100_001, 1 << 20, 199_999),
        (299_999, 65536, 1),
        (300_000, 65536, 0),
    ] {
        assert_eq!(read(6, offset, length), Some(Ok(expected)));
        let start = usize::try_from(offset).unwrap();
        let placed = seen(&memory, 1, 16 + expected);
        assert!(
            placed[16..] == whole[start..][..expected],
            "{expected} bytes from {offset} on"
        );
    }
    assert!(window.place(6, &[IoSlice::new(&[7; 16])], 20).unwrap());
    assert_eq!(seen(&memory, 1, 16), [7; 16]);
    let gone = window.place(6, &[IoSlice::new(&[7; 16])], 20);
    assert!(gone.is_err(), "its data is nowhere");
}

#[test]
fn a_window_that_makes_no_sense_is_refused() {
    let window = Window::new(memory());
    let mut message = vec![0; SLOT];
    let long = PLACED_FROM as u64;
    assert!(window.fetch(0, long, &mut message).is_err() && window.lend(6, 0).is_err());
    assert!(window.open(&pages()[1..]).is_err());
    window.open(&pages()).unwrap();
    assert!(window.open(&pages()).is_err());
    for slot in [2, u64::MAX] {
        assert!(window.fetch(slot, long, &mut message).is_err());
        assert!(window.lend(6, slot).is_err());
    }
    for length in [0, 39, SLOT as u64 + 1, u64::MAX] {
        assert!(window.fetch(0, length, &mut message).is_err(), "{length}");
    }
    assert!(window.fetch(0, long, &mut message[..100]).is_err());
    window.lend(6, 0).unwrap();
    window.lend(6, 0).unwrap();
    assert!(window.lend(8, 1).is_err(), "more than there are");
}

#[test]
fn pages_that_are_no_memory_are_refused_when_they_are_used() {
    for address in [MEMORY as u64, u64::MAX, u64::MAX - 4095] {
        let window = Window::new(memory());
        window.open(&[address; PAGES]).unwrap();
        let long = PLACED_FROM as u64;
        assert!(window.fetch(0, long, &mut [0; PLACED_FROM]).is_err());
        window.lend(6, 0).unwrap();
        let file = tempfile::tempfile().unwrap();
        let read = window.read(6, file.as_fd(), 0, 65536).unwrap();
        assert!(read.is_err(), "{address:#x}");
        assert!(window.place(6, &[IoSlice::new(&[7; 16])], 65536).is_err());
    }
}

#[test]
fn on_the_stream_are_headers_only() {
    let memory = memory();
    let (near, mut far) = UnixStream::pair().unwrap();
    let queue = Queue::new(near, Some(Window::new(memory.clone())), None);
    let mut buffer = vec![0; 1 << 20];
    // A long request.
    let mut request = content(50_000);
    request[..4].copy_from_slice(&50_000_u32.to_le_bytes());
    put(&memory, 0, &request);
    far.write_all(&for_host(WINDOW, 0, &pages())).unwrap();
    far.write_all(&for_host(REQUEST_PLACED, 6, &[0, 50_000]))
        .unwrap();
    assert_eq!(queue.receive(&mut buffer).unwrap(), 50_000);
    assert!(buffer[..50_000] == request);
    // A long reply.
    far.write_all(&for_host(PLACE, 8, &[1])).unwrap();
    let short = for_host(15, 8, &[0; 5]);
    far.write_all(&short).unwrap();
    assert_eq!(queue.receive(&mut buffer).unwrap(), short.len());
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&content(39_984)).unwrap();
    let read = queue.read_to_place(8, file.as_fd(), 0, 65536);
    assert_eq!(read, Some(Ok(39_984)));
    let mut header = [0; 16];
    header[..4].copy_from_slice(&40_000_u32.to_le_bytes());
    header[8..].copy_from_slice(&8_u64.to_le_bytes());
    queue.send(&[IoSlice::new(&header)]).unwrap();
    let told = for_agent(PLACED, &[8, 40_000], &[]);
    let mut heard = vec![0; told.len()];
    far.read_exact(&mut heard).unwrap();
    assert_eq!(heard, told);
    assert!(seen(&memory, 1, 40_000) == [&header[..], &content(39_984)].concat());
    // And what makes no sense ends it.
    far.write_all(&for_host(REQUEST_PLACED, 6, &[0])).unwrap();
    assert!(queue.receive(&mut buffer).is_err());
}
