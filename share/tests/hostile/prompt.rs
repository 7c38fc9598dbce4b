//! Requests on a thread that must not wait.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::thread;

use rustix::fs::Advice;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use share::wire::{self, InHeader, Opcode, OutHeader, ROOT_ID};
use share::{Reply, Share, answer_promptly};
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes};

use crate::guest::{Guest, share, some_limits};

/// Room for a reply.
const ROOM: usize = 16 << 10;

fn request(opcode: Opcode, node: u64, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let header = InHeader {
        len: u32::try_from(wire::IN_HEADER_LEN + body.len()).unwrap(),
        opcode: opcode as u32,
        unique: 7,
        nodeid: node,
        ..InHeader::default()
    };
    [header.as_bytes(), &body].concat()
}

/// What is answered promptly: what comes after the header, or the error. None where nothing is.
fn ask(share: &Share, message: &[u8]) -> Option<Result<Vec<u8>, Errno>> {
    let answer = || {
        let mut reply = Reply::with_capacity(ROOM);
        let mut sent = None;
        let send = |bytes: &[u8], _: &[share::Advice]| sent = Some(bytes.to_vec());
        let answered = answer_promptly(share, message, &mut reply, send).unwrap();
        answered.then(|| sent.unwrap_or_default())
    };
    // A thread that was prompt once stays so.
    let bytes = thread::scope(|scope| scope.spawn(answer).join().unwrap())?;
    let Ok((header, rest)) = OutHeader::read_from_prefix(&bytes) else {
        return Some(Ok(Vec::new()));
    };
    Some(match header.error {
        0 => Ok(rest.to_vec()),
        errno => Err(Errno::from_raw_os_error(-errno)),
    })
}

fn lookup(share: &Share, dir: u64, name: &str) -> Option<Result<u64, Errno>> {
    let name = [name.as_bytes(), b"\0"].concat();
    let answer = ask(share, &request(Opcode::Lookup, dir, &[&name]))?;
    Some(answer.map(|bytes| wire::EntryOut::read_from_prefix(&bytes).unwrap().0.nodeid))
}

fn read(share: &Share, node: u64, fh: u64, size: u32) -> Option<Result<Vec<u8>, Errno>> {
    let asked = wire::ReadIn {
        fh,
        size,
        ..wire::ReadIn::default()
    };
    ask(share, &request(Opcode::Read, node, &[asked.as_bytes()]))
}

/// A filesystem in memory that is mounted for as long as this is kept; None where nobody lets us.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn at(path: &Path, kind: &str) -> Option<Self> {
        match rustix::mount::mount("test", path, kind, MountFlags::empty(), None) {
            Ok(()) => Some(Self(path.to_owned())),
            Err(errno) => {
                eprintln!("skipped: no {kind} can be mounted here: {errno}");
                None
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn what_takes_no_time_is_answered_as_ever() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("file"), "content").unwrap();
    let share = share(&dir, some_limits());
    let node = lookup(&share, ROOT_ID, "file").unwrap().unwrap();
    assert_eq!(Guest::new(&share).lookup(ROOT_ID, c"file"), Ok(node));
    let asked = wire::OpenIn::default();
    let opened = ask(&share, &request(Opcode::Open, node, &[asked.as_bytes()]));
    let opened = opened.unwrap().unwrap();
    let fh = wire::OpenOut::read_from_prefix(&opened).unwrap().0.fh;
    Guest::new(&share).read(node, fh).unwrap();
    for size in [4096, 3] {
        let content = &b"content"[..7.min(size)];
        // Some filesystems do not tell what of a file is in memory.
        if let Some(read) = read(&share, node, fh, size as u32) {
            assert_eq!(read.unwrap(), content);
        }
    }
    let name = [b"nothing\0".as_slice()];
    let missing = ask(&share, &request(Opcode::Unlink, ROOT_ID, &name));
    assert_eq!(missing.unwrap(), Err(Errno::NOENT));
    let gone = ask(
        &share,
        &request(
            Opcode::Getattr,
            999,
            &[wire::GetattrIn::default().as_bytes()],
        ),
    );
    assert_eq!(gone.unwrap(), Err(Errno::STALE));
    let closed = wire::ReleaseIn {
        fh,
        ..wire::ReleaseIn::default()
    };
    let closed = ask(
        &share,
        &request(Opcode::Release, node, &[closed.as_bytes()]),
    );
    assert_eq!(closed.unwrap(), Ok(Vec::new()));
    assert_eq!(share.usage().2, 0, "it is open still");
}

#[test]
fn what_waits_or_needs_more_room_is_left_for_others() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("file"), [7; 1000]).unwrap();
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT_ID, c"file").unwrap();
    let fh = guest.open(node, libc::O_RDWR).unwrap();
    let body = [0; 200];
    for opcode in [
        Opcode::Fsync,
        Opcode::Syncfs,
        Opcode::Fallocate,
        Opcode::CopyFileRange,
        Opcode::Setlk,
        Opcode::Setlkw,
        Opcode::Interrupt,
        Opcode::Init,
        Opcode::Destroy,
    ] {
        assert_eq!(
            ask(&share, &request(opcode, node, &[&body])),
            None,
            "{opcode:?}"
        );
    }
    assert_eq!(read(&share, node, fh, ROOM as u32 + 1), None);
    assert_eq!(
        ask(&share, &request(Opcode::Read, node, &[&body[..10]])),
        None
    );
    for nonsense in [&b""[..], &[0; 39], &[0xff; 40], &[0; 40]] {
        assert_eq!(ask(&share, nonsense), None);
    }
}

#[test]
fn data_that_has_to_come_from_a_disk_is_left_for_others() {
    // Not the directory for temporary files, which may be in memory.
    let dir = TempDir::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = dir.path().join("file");
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(&[7; 100_000]).unwrap();
    file.sync_all().unwrap();
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT_ID, c"file").unwrap();
    let fh = guest.open(node, libc::O_RDONLY).unwrap();
    guest.read(node, fh).unwrap();
    if read(&share, node, fh, 4096).is_none() {
        return eprintln!("skipped: this filesystem does not tell what is in memory");
    }
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    assert_eq!(read(&share, node, fh, 4096), None);
    guest.read(node, fh).unwrap();
    assert_eq!(read(&share, node, fh, 4096).unwrap().unwrap(), [7; 4096]);
}

#[test]
fn what_is_mounted_below_is_near_only_if_it_is_known_to_be() {
    let dir = TempDir::new().unwrap();
    for name in ["memory", "kernel"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    let Some(_memory) = Mounted::at(&dir.path().join("memory"), "tmpfs") else {
        return;
    };
    // Any that is none of this host's memory or disks.
    let Some(_kernel) = Mounted::at(&dir.path().join("kernel"), "proc") else {
        return;
    };
    let share = share(&dir, some_limits());
    let mut guest = Guest::new(&share);
    let attributes = |node| {
        let asked = wire::GetattrIn::default();
        ask(&share, &request(Opcode::Getattr, node, &[asked.as_bytes()]))
    };
    for (name, is_near) in [("memory", true), ("kernel", false)] {
        assert_eq!(lookup(&share, ROOT_ID, name), None, "{name}");
        let c_name = std::ffi::CString::new(name).unwrap();
        let node = guest.lookup(ROOT_ID, &c_name).unwrap();
        assert_eq!(attributes(node), None, "{name}");
        // By whoever may wait it is found out.
        guest.lookup(ROOT_ID, &c_name).unwrap();
        assert_eq!(attributes(node).is_some(), is_near, "{name}");
        assert_eq!(lookup(&share, ROOT_ID, name).is_some(), is_near, "{name}");
    }
    // A listing says what is there, and leaves it to others to say more.
    let asked = wire::ReadIn {
        size: 4096,
        ..wire::ReadIn::default()
    };
    let listed = ask(
        &share,
        &request(Opcode::Readdirplus, ROOT_ID, &[asked.as_bytes()]),
    );
    let listed = listed.unwrap().unwrap();
    assert!(listed.windows(6).any(|bytes| bytes == b"kernel"));
}
