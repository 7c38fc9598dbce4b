//! Trees packed and unpacked again on this machine's own filesystem, and hostile archives.

mod full;
mod hostile;
mod landing;
mod race;
mod tree;

use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{ArchiveError, ChunkReader, ChunkWriter, PackOptions, Policy, Root, Summary};
use crate::protocol::Landing;

/// As a guest's files come to the host without `--archive`.
const PLAIN: Policy = Policy {
    owned: false,
    devices: false,
};

/// As `--archive` copies into a machine.
const OWNED: Policy = Policy {
    owned: true,
    devices: true,
};

/// What came of unpacking, and the notes on the way.
struct Unpacked {
    result: Result<Summary, ArchiveError>,
    notes: Vec<String>,
}

impl Unpacked {
    /// The error as a person reads it.
    #[track_caller]
    fn error(self) -> String {
        self.result.expect_err("an error").sentence()
    }
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The wire of a tree packed with all that can be packed.
fn packed(source: &Path) -> Vec<u8> {
    let mut out = ChunkWriter::new(Vec::new());
    let options = PackOptions {
        attributes: true,
        ..PackOptions::default()
    };
    let result = super::pack(Root::Own, bytes(source), &options, &mut out);
    out.end(result.map_err(|error| error.sentence())).unwrap()
}

/// The wire of these bytes as an archive.
fn framed(archive: &[u8]) -> Vec<u8> {
    let mut out = ChunkWriter::new(Vec::new());
    out.write_all(archive).unwrap();
    out.end(Ok(())).unwrap()
}

fn unpack(wire: &[u8], to: &Path, landing: &Landing, policy: Policy) -> Unpacked {
    let (mut sent, mut own) = (Vec::new(), Vec::new());
    let chunks = ChunkReader::new(wire, |note| sent.push(note));
    let mut note = |note| own.push(note);
    let result = super::unpack(Root::Own, bytes(to), landing, policy, chunks, &mut note);
    sent.append(&mut own);
    let notes = sent;
    Unpacked { result, notes }
}

/// Copies a tree; `name` is what it is called in a directory.
fn copy(from: &Path, to: &Path, name: Option<&str>, policy: Policy) -> Unpacked {
    let landing = Landing::Tree(name.map(|name| name.as_bytes().to_vec()));
    unpack(&packed(from), to, &landing, policy)
}

/// Everything below `top`, as a sorted list of relative paths.
fn names(top: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut pending = vec![top.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let below = path.strip_prefix(top).unwrap();
            found.push(below.to_string_lossy().into_owned());
            if path.symlink_metadata().unwrap().is_dir() {
                pending.push(path);
            }
        }
    }
    found.sort();
    found
}
