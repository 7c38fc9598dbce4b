//! FUSE requests of a guest, as bytes, on a share that has a little of everything in it.

#![no_main]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{CWD, FileType, Mode};
use share::wire::{IN_HEADER_LEN, Opcode};
use share::{Answer, Limits, Locking, Options, Readers, Reply, Share, View, again, dispatch};
use tempfile::TempDir;

/// What lies beside the share, and is not to change.
const SECRET: &str = "beside the share";

/// Where among an opcode's arguments a length stands that is to be kept short, so that no request fills
/// the host's disk.
fn length_of(opcode: Opcode) -> Option<usize> {
    match opcode {
        Opcode::Fallocate => Some(16),
        Opcode::CopyFileRange => Some(40),
        _ => None,
    }
}

fn furnish(dir: &Path) -> std::io::Result<()> {
    fs::create_dir(dir.join("d"))?;
    fs::write(dir.join("f"), "content")?;
    fs::write(dir.join("d/f"), "content")?;
    fs::hard_link(dir.join("f"), dir.join("h"))?;
    symlink("../secret", dir.join("l"))?;
    symlink("/", dir.join("d/l"))?;
    rustix::fs::mknodat(CWD, dir.join("p"), FileType::Fifo, Mode::RUSR, 0)?;
    Ok(())
}

/// The requests that `data` stands for: an opcode, an inode, a length, and as many bytes.
fn requests(mut data: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    std::iter::from_fn(move || {
        let (&[opcode, node, length], rest) = data.split_first_chunk()?;
        let (body, rest) = rest.split_at_checked(length.into())?;
        data = rest;
        let opcode = Opcode::ALL[usize::from(opcode) % Opcode::ALL.len()];
        let mut body = body.to_vec();
        if let Some(at) = length_of(opcode) {
            body.iter_mut()
                .skip(at + 2)
                .take(6)
                .for_each(|byte| *byte = 0);
        }
        let mut message = vec![0; IN_HEADER_LEN];
        let total = u32::try_from(IN_HEADER_LEN + body.len()).expect("less than 300 bytes");
        message[..4].copy_from_slice(&total.to_ne_bytes());
        message[4..8].copy_from_slice(&(opcode as u32).to_ne_bytes());
        message[16..24].copy_from_slice(&u64::from(node).to_ne_bytes());
        message.extend(body);
        Some(message)
    })
}

/// The same requests where only a part is shown: no reply has anything of what is not.
fn in_a_view(dir: &Path, options: Options, data: &[u8]) {
    let mut view = View::default();
    view.show(Path::new("share"), Readers::Process);
    let share = Share::open_view(dir, options, view).expect("a share");
    let mut reply = Reply::with_capacity(4096);
    for request in requests(data) {
        let (_, bytes) = dispatch(&share, &request, &mut reply);
        let mut windows = bytes.windows(SECRET.len());
        assert!(!windows.any(|window| window == SECRET.as_bytes()));
    }
}

fuzz_target!(|data: &[u8]| {
    let dir = TempDir::with_prefix("mvm-fuzz-").expect("a directory");
    let shared = dir.path().join("share");
    fs::create_dir(&shared).expect("a directory");
    fs::write(dir.path().join("secret"), SECRET).expect("a file");
    furnish(&shared).expect("files");
    let limits = Limits {
        inodes: 20,
        descriptors: 4,
        handles: 8,
    };
    let options = Options {
        limits,
        ..Options::default()
    };
    in_a_view(dir.path(), options, data);
    let locking = match data.first() {
        Some(byte) if byte % 2 == 1 => Locking::Host,
        _ => Locking::Guest,
    };
    let options = Options { locking, ..options };
    let share = Share::open(&shared, options).expect("a share");
    let mut reply = Reply::with_capacity(4096);
    // As it comes, then as requests.
    let _ = dispatch(&share, data, &mut reply);
    for request in requests(data) {
        let (mut answer, mut bytes) = dispatch(&share, &request, &mut reply);
        if answer == Answer::Later {
            (answer, bytes) = again(&share, &request, &mut reply);
        }
        if answer == Answer::Reply {
            let length = bytes
                .first_chunk()
                .map(|length| u32::from_ne_bytes(*length));
            assert_eq!(
                length.and_then(|n| usize::try_from(n).ok()),
                Some(bytes.len())
            );
        }
    }
    let (inodes, _, handles) = share.usage();
    assert!(
        inodes <= 20 && handles <= 8,
        "{inodes} inodes, {handles} handles"
    );
    let secret = fs::read_to_string(dir.path().join("secret")).expect("it is there");
    assert_eq!(secret, SECRET);
    let beside = fs::read_dir(dir.path()).expect("it is there").count();
    assert_eq!(beside, 2);
});
