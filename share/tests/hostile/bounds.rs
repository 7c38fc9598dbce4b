//! Nothing grows without bound, and no request is too odd.

use std::fs;
use std::path::Path;

use rustix::io::Errno;
use share::Limits;
use share::wire::{self, Opcode, ROOT_ID};
use zerocopy::IntoBytes;

use crate::guest::{Guest, share, some_limits};

#[test]
fn a_guest_that_forgets_nothing_and_closes_nothing_is_told_that_it_is_enough() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..300 {
        fs::write(dir.path().join(number.to_string()), "").unwrap();
    }
    let limits = Limits {
        inodes: 200,
        descriptors: 50,
        handles: 30,
    };
    let share = share(&dir, limits);
    let mut guest = Guest::new(&share);
    let mut nodes = Vec::new();
    let mut refused = 0;
    for number in 0..300 {
        let name = std::ffi::CString::new(number.to_string()).unwrap();
        match guest.lookup(ROOT_ID, &name) {
            Ok(node) => nodes.push(node),
            Err(errno) => {
                assert_eq!(errno, Errno::NFILE);
                refused += 1;
            }
        }
    }
    assert_eq!((nodes.len(), refused), (199, 101));
    let opened = nodes
        .iter()
        .filter(|node| guest.open(**node, libc::O_RDONLY).is_ok());
    assert_eq!(opened.count(), 30);
    let (inodes, descriptors, handles) = share.usage();
    assert_eq!((inodes, handles), (200, 30));
    assert!(descriptors <= 50 + 50 / 8 + 64, "{descriptors}");
}

#[test]
fn requests_that_end_too_soon_are_refused_and_nothing_more() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "data").unwrap();
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    let file = guest.lookup(ROOT_ID, c"file").unwrap();
    let filled = [0xff_u8; 96];
    for opcode in Opcode::ALL {
        for length in 0..filled.len() {
            for node in [ROOT_ID, file] {
                for byte in [0_u8, 1, 0x7f, 0xff] {
                    let body = vec![byte; length];
                    let _ = guest.ask(*opcode, node, &[&body]);
                }
            }
        }
        // A name without an end.
        let _ = guest.ask(*opcode, ROOT_ID, &[&filled, b"name"]);
    }
    // The guest has ended the session in the meantime, and may go on all the same.
    let file = guest.lookup(ROOT_ID, c"file").unwrap();
    let fh = guest.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(file, fh).unwrap(), b"data");
    assert!(Path::new(dir.path()).join("file").exists());
}

#[test]
fn a_listing_is_as_short_as_it_has_to_be() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..50 {
        fs::write(dir.path().join(format!("{number}-{}", "x".repeat(100))), "").unwrap();
    }
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    let open = wire::OpenIn::default();
    let open: wire::OpenOut = guest
        .get(Opcode::Opendir, ROOT_ID, &[open.as_bytes()])
        .unwrap();
    for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
        for size in [0, 1, 23, 24, 100, 300, 1000, 4096, u32::MAX] {
            for offset in [0, 1, u64::MAX, 1 << 63] {
                let asked = wire::ReadIn {
                    fh: open.fh,
                    offset,
                    size,
                    ..wire::ReadIn::default()
                };
                if let Ok(listed) = guest.ask(opcode, ROOT_ID, &[asked.as_bytes()]) {
                    assert!(listed.len() <= usize::try_from(size).unwrap());
                }
            }
        }
    }
}
