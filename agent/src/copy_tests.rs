//! Copies through the agent's own connections, in this machine's own tree.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use agent::archive::{self, ChunkReader, ChunkWriter, PackOptions, Policy, Root};
use agent::protocol::{self, FromUnpack, Landing, Open, Pack, Unpack};

use crate::tests::{connect, eventually};

fn path(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

fn open_unpack(to: &Path) -> UnixStream {
    connect(&Open::Unpack(Unpack {
        path: path(to),
        landing: Landing::Tree(None),
        owned: false,
    }))
}

/// The answer, when all has been sent.
fn done(stream: &UnixStream) -> Result<(), String> {
    match protocol::receive(stream).expect("an answer") {
        Some(FromUnpack::Done(done)) => done,
        other => panic!("expected the end, got {other:?}"),
    }
}

#[test]
fn a_tree_goes_out_and_comes_in_again() {
    let temporary = tempfile::tempdir().unwrap();
    let at = |name: &str| temporary.path().join(name);
    fs::create_dir_all(at("tree/sub")).unwrap();
    fs::write(at("tree/sub/file"), "content").unwrap();

    let stream = connect(&Open::Pack(Pack {
        path: path(&at("tree")),
        name: Vec::new(),
        follow: false,
        attributes: true,
    }));
    let mut wire = Vec::new();
    (&stream).read_to_end(&mut wire).unwrap();
    let policy = Policy {
        owned: false,
        devices: false,
    };
    let chunks = ChunkReader::new(wire.as_slice(), |note| panic!("{note}"));
    let (landing, to) = (Landing::Tree(None), path(&at("out")));
    archive::unpack(Root::Own, &to, &landing, policy, chunks, &mut |_| {}).unwrap();
    assert_eq!(fs::read(at("out/sub/file")).unwrap(), b"content");

    let stream = open_unpack(&at("in"));
    (&stream).write_all(&wire).unwrap();
    assert_eq!(done(&stream), Ok(()));
    assert_eq!(fs::read(at("in/sub/file")).unwrap(), b"content");
}

#[test]
fn what_cannot_be_packed_is_said() {
    let temporary = tempfile::tempdir().unwrap();
    let stream = connect(&Open::Pack(Pack {
        path: path(&temporary.path().join("missing")),
        name: Vec::new(),
        follow: false,
        attributes: false,
    }));
    let mut chunks = ChunkReader::new(&stream, |note| panic!("{note}"));
    let error = chunks.read(&mut [0]).unwrap_err().to_string();
    assert!(error.contains("missing\" cannot be copied"), "{error}");
}

#[test]
fn what_cannot_be_unpacked_is_said_while_it_is_still_sent() {
    let temporary = tempfile::tempdir().unwrap();
    let at = |name: &str| temporary.path().join(name);
    fs::write(at("large"), vec![1; 8 << 20]).unwrap();
    let stream = open_unpack(&at("missing/new"));
    // More than the connection holds; it has to be taken for all of it to be sent.
    let mut out = ChunkWriter::new(&stream);
    let options = PackOptions::default();
    archive::pack(Root::Own, &path(&at("large")), &options, &mut out).unwrap();
    out.end(Ok(())).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let error = done(&stream).unwrap_err();
    assert!(error.contains("directory that does not exist"), "{error}");
    let mut rest = Vec::new();
    (&stream).read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
}

#[test]
fn a_host_that_ends_midway_leaves_no_half_file() {
    let temporary = tempfile::tempdir().unwrap();
    let at = |name: &str| temporary.path().join(name);
    fs::create_dir(at("from")).unwrap();
    fs::write(at("from/large"), vec![1; 4 << 20]).unwrap();
    let mut out = ChunkWriter::new(Vec::new());
    let options = PackOptions::default();
    archive::pack(Root::Own, &path(&at("from")), &options, &mut out).unwrap();
    let wire = out.end(Ok(())).unwrap();

    let stream = open_unpack(&at("to"));
    (&stream).write_all(&wire[..2 << 20]).unwrap();
    eventually("the file is begun", || at("to/large").exists());
    drop(stream);
    eventually("the half file is gone", || !at("to/large").exists());
}
