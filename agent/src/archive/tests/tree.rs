//! Whole trees: what is in them comes out again.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{
    CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags, chown, fgetxattr, fsetxattr,
    makedev, mkdirat, mkfifoat, mknodat, openat,
};

use super::*;

fn mode(path: &Path) -> u32 {
    path.symlink_metadata().unwrap().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn set_modified(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::utimensat(CWD, path, &times, flags).unwrap();
}

fn modified(path: &Path) -> (i64, i64) {
    let metadata = path.symlink_metadata().unwrap();
    (metadata.mtime(), metadata.mtime_nsec())
}

#[test]
fn content_permissions_and_times_are_kept() {
    let temporary = tempfile::tempdir().unwrap();
    let (from, to) = (temporary.path().join("from"), temporary.path().join("to"));
    fs::create_dir_all(from.join("closed/below")).unwrap();
    fs::create_dir(from.join("empty")).unwrap();
    let large: Vec<u8> = (0..700_001u32).map(|i| (i * 7 % 251) as u8).collect();
    fs::write(from.join("large"), &large).unwrap();
    fs::write(from.join("closed/below/small"), "small").unwrap();
    fs::write(from.join("nothing"), "").unwrap();
    symlink("../elsewhere/not there", from.join("link")).unwrap();
    set_mode(&from.join("large"), 0o640);
    set_mode(&from.join("nothing"), 0o755);
    set_mode(&from.join("closed"), 0o555);
    set_mode(&from.join("empty"), 0o1777);
    for (seconds, name) in [
        (1_700_000_000, "large"),
        (-5, "nothing"),
        (1 << 35, "link"),
        (77, "closed/below/small"),
        (78, "closed"),
        (79, "empty"),
        (80, ""),
    ] {
        set_modified(&from.join(name), seconds, 123_456_789);
    }

    let unpacked = copy(&from, &to, None, PLAIN);
    let summary = unpacked.result.unwrap();
    assert_eq!((summary.members, summary.bytes), (8, 700_006));
    assert_eq!(unpacked.notes, [""; 0]);
    assert!(fs::read(to.join("large")).unwrap() == large);
    assert_eq!(fs::read(to.join("closed/below/small")).unwrap(), b"small");
    assert_eq!(
        fs::read_link(to.join("link")).unwrap(),
        Path::new("../elsewhere/not there")
    );
    assert_eq!(names(&to), names(&from));
    for name in names(&from).iter().chain([&String::new()]) {
        let (from, to) = (from.join(name), to.join(name));
        assert_eq!(mode(&to), mode(&from), "mode of {name:?}");
        assert_eq!(modified(&to), modified(&from), "time of {name:?}");
    }
    set_mode(&from.join("closed"), 0o755);
    set_mode(&to.join("closed"), 0o755);
}

#[test]
fn names_are_any_bytes_of_any_length() {
    let temporary = tempfile::tempdir().unwrap();
    let (from, to) = (temporary.path().join("from"), temporary.path().join("to"));
    fs::create_dir(&from).unwrap();
    let longest = vec![b'n'; 255];
    for name in [
        &b"new\nline"[..],
        b"\xff\xfe not UTF-8 \x01",
        b"-rf",
        b" ",
        b"...",
        b"path=1 5",
        &longest,
    ] {
        let directory = from.join(OsStr::from_bytes(name));
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join(OsStr::from_bytes(name)), name).unwrap();
        symlink(OsStr::from_bytes(name), directory.join("link")).unwrap();
    }
    let unpacked = copy(&from, &to, None, PLAIN);
    unpacked.result.unwrap();
    assert_eq!(names(&to).len(), 7 * 3);
    for entry in fs::read_dir(&to).unwrap() {
        let entry = entry.unwrap();
        let content = fs::read(entry.path().join(entry.file_name())).unwrap();
        assert_eq!(content, entry.file_name().as_bytes());
        let target = fs::read_link(entry.path().join("link")).unwrap();
        assert_eq!(target.as_os_str(), entry.file_name());
    }
}

#[test]
fn a_tree_deeper_than_any_path_comes_out_whole() {
    const DEPTH: usize = 1000;
    let temporary = tempfile::tempdir().unwrap();
    let (from, to) = (temporary.path().join("from"), temporary.path().join("to"));
    fs::create_dir(&from).unwrap();
    let mut here = File::open(&from).unwrap();
    for _ in 0..DEPTH {
        mkdirat(&here, "down", Mode::RWXU).unwrap();
        here = step(&here);
    }
    let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    let bottom = openat(&here, "bottom", flags, Mode::RUSR | Mode::WUSR).unwrap();
    File::from(bottom).write_all(b"deep").unwrap();
    // More in directories on the way, which are come back to.
    fs::create_dir(from.join("down/down/other")).unwrap();
    fs::write(from.join("down/down/other/file"), "").unwrap();

    let unpacked = copy(&from, &to, None, PLAIN);
    assert_eq!(unpacked.result.unwrap().members, DEPTH as u64 + 1 + 1 + 2);
    let mut here = File::open(&to).unwrap();
    for _ in 0..DEPTH {
        here = step(&here);
    }
    let bottom = openat(&here, "bottom", rustix::fs::OFlags::RDONLY, Mode::empty()).unwrap();
    let mut content = String::new();
    File::from(bottom).read_to_string(&mut content).unwrap();
    assert_eq!(content, "deep");
    assert!(to.join("down/down/other/file").exists());
}

fn step(directory: &File) -> File {
    chain_open(directory, "down")
}

fn chain_open(directory: impl AsFd, name: &str) -> File {
    super::super::chain::open(directory, name.as_bytes())
        .unwrap()
        .into()
}

#[test]
fn hard_links_stay_links_to_one_file() {
    let temporary = tempfile::tempdir().unwrap();
    let (from, to) = (temporary.path().join("from"), temporary.path().join("to"));
    fs::create_dir_all(from.join("a/b")).unwrap();
    fs::write(from.join("one"), "content").unwrap();
    fs::hard_link(from.join("one"), from.join("two")).unwrap();
    fs::hard_link(from.join("one"), from.join("a/b/three")).unwrap();
    // A link to outside of the tree is a file of its own.
    fs::hard_link(from.join("one"), temporary.path().join("outside")).unwrap();
    symlink("x", from.join("link")).unwrap();
    fs::hard_link(from.join("link"), from.join("link2")).unwrap();

    for _ in 0..2 {
        // The second time over what is there already.
        let landing = Landing::Tree(None);
        unpack(&packed(&from), &to, &landing, PLAIN).result.unwrap();
        let inode = |name: &str| to.join(name).symlink_metadata().unwrap().ino();
        assert_eq!(inode("one"), inode("two"));
        assert_eq!(inode("one"), inode("a/b/three"));
        assert_eq!(inode("link"), inode("link2"));
        assert_eq!(to.join("one").metadata().unwrap().nlink(), 3);
        assert_eq!(names(&to), names(&from), "nothing temporary is left");
    }
}

#[test]
fn a_sparse_file_stays_sparse() {
    const SIZE: u64 = 6 << 30;
    let temporary = tempfile::tempdir().unwrap();
    let (from, to) = (temporary.path().join("from"), temporary.path().join("to"));
    fs::create_dir(&from).unwrap();
    let file = File::create(from.join("sparse")).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(b"first", 1 << 20).unwrap();
    file.write_all_at(b"over 4 GiB", (5 << 30) + 1000).unwrap();
    file.write_all_at(b"end", SIZE - 3).unwrap();
    let hole = File::create(from.join("hole")).unwrap();
    hole.set_len(SIZE).unwrap();

    let wire = packed(&from);
    let landing = Landing::Tree(None);
    unpack(&wire, &to, &landing, PLAIN).result.unwrap();
    for name in ["sparse", "hole"] {
        let (old, new) = (
            from.join(name).metadata().unwrap(),
            to.join(name).metadata().unwrap(),
        );
        assert_eq!(new.len(), SIZE);
        if old.blocks() * 512 < SIZE / 2 {
            assert!(new.blocks() * 512 < SIZE / 2, "{name} has become dense");
        }
    }
    let read = |at: u64, len: usize| {
        let mut buffer = vec![0; len];
        let file = File::open(to.join("sparse")).unwrap();
        file.read_exact_at(&mut buffer, at).unwrap();
        buffer
    };
    assert_eq!(read((1 << 20) - 1, 7), b"\0first\0");
    assert_eq!(read((5 << 30) + 1000, 10), b"over 4 GiB");
    assert_eq!(read(SIZE - 4, 4), b"\0end");
}

#[test]
fn a_file_with_many_holes_comes_out_the_same() {
    let temporary = tempfile::tempdir().unwrap();
    let (from, to) = (temporary.path().join("from"), temporary.path().join("to"));
    let mut file = File::create(&from).unwrap();
    for part in 0..500u64 {
        file.seek(SeekFrom::Start(part * 16384 + 4096)).unwrap();
        file.write_all(&[(part % 255) as u8 + 1; 5000]).unwrap();
    }
    copy(&from, &to, None, PLAIN).result.unwrap();
    assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
}

#[test]
fn pipes_are_made_and_sockets_left_out_with_a_note() {
    let temporary = tempfile::tempdir().unwrap();
    let (from, to) = (temporary.path().join("from"), temporary.path().join("to"));
    fs::create_dir(&from).unwrap();
    mkfifoat(CWD, from.join("pipe"), Mode::RWXU).unwrap();
    set_mode(&from.join("pipe"), 0o622);
    let _socket = UnixListener::bind(from.join("socket")).unwrap();
    let unpacked = copy(&from, &to, None, PLAIN);
    unpacked.result.unwrap();
    assert_eq!(names(&to), ["pipe"]);
    assert!(to.join("pipe").metadata().unwrap().file_type().is_fifo());
    assert_eq!(mode(&to.join("pipe")), 0o622);
    let [note] = unpacked.notes.as_slice() else {
        panic!("{:?}", unpacked.notes);
    };
    assert!(
        note.contains("socket") && note.contains("left out"),
        "{note}"
    );
}

#[test]
fn owners_and_set_id_bits_are_kept_only_where_asked_for() {
    let temporary = tempfile::tempdir().unwrap();
    let (from, plain) = (temporary.path().join("from"), temporary.path().join("p"));
    let owned = temporary.path().join("o");
    fs::create_dir(&from).unwrap();
    fs::write(from.join("program"), "").unwrap();
    symlink("x", from.join("link")).unwrap();
    let can_own = is_root();
    if can_own {
        for name in ["", "program"] {
            let ids = (Uid::from_raw(3_000_000), Gid::from_raw(54321));
            chown(from.join(name), Some(ids.0), Some(ids.1)).unwrap();
        }
        std::os::unix::fs::lchown(from.join("link"), Some(7), Some(8)).unwrap();
    }
    set_mode(&from.join("program"), 0o6755);
    set_mode(&from, 0o2755);

    copy(&from, &plain, None, PLAIN).result.unwrap();
    assert_eq!(mode(&plain.join("program")), 0o755);
    assert_eq!(mode(&plain), 0o755);
    let own = temporary.path().metadata().unwrap();
    for name in ["", "program", "link"] {
        let metadata = plain.join(name).symlink_metadata().unwrap();
        assert_eq!(metadata.uid(), own.uid(), "{name:?}");
    }

    let unpacked = copy(&from, &owned, None, OWNED);
    unpacked.result.unwrap();
    assert_eq!(unpacked.notes, [""; 0]);
    assert_eq!(mode(&owned.join("program")), 0o6755);
    assert_eq!(mode(&owned), 0o2755);
    for name in ["", "program", "link"] {
        let (old, new) = (
            from.join(name).symlink_metadata().unwrap(),
            owned.join(name).symlink_metadata().unwrap(),
        );
        assert_eq!((new.uid(), new.gid()), (old.uid(), old.gid()), "{name:?}");
    }
}

#[test]
fn attributes_are_kept_where_asked_for() {
    let temporary = tempfile::tempdir().unwrap();
    let (from, to) = (temporary.path().join("from"), temporary.path().join("to"));
    let file = File::create(&from).unwrap();
    let value = b"a\0b\nc=d";
    match fsetxattr(&file, "user.mvm", value, XattrFlags::empty()) {
        Err(rustix::io::Errno::NOTSUP) => return,
        set => set.unwrap(),
    }
    let attribute = |path: &Path| {
        let mut buffer = [0; 64];
        let file = File::open(path).unwrap();
        fgetxattr(&file, "user.mvm", &mut buffer).map(|len| buffer[..len].to_vec())
    };
    copy(&from, &to, None, PLAIN).result.unwrap();
    assert_eq!(attribute(&to), Err(rustix::io::Errno::NODATA));
    copy(&from, &to, None, OWNED).result.unwrap();
    assert_eq!(attribute(&to).unwrap(), value);
}

#[test]
fn devices_are_made_only_where_that_is_allowed() {
    let temporary = tempfile::tempdir().unwrap();
    let from = temporary.path().join("from");
    fs::create_dir(&from).unwrap();
    let device = makedev(1, 3);
    let kind = FileType::CharacterDevice;
    match mknodat(CWD, from.join("null"), kind, Mode::RUSR, device) {
        Err(rustix::io::Errno::PERM) => return,
        made => made.unwrap(),
    }
    set_mode(&from.join("null"), 0o666);

    let plain = temporary.path().join("plain");
    let unpacked = copy(&from, &plain, None, PLAIN);
    unpacked.result.unwrap();
    assert_eq!(names(&plain), [""; 0]);
    assert!(
        unpacked.notes[0].contains("is a device"),
        "{:?}",
        unpacked.notes
    );

    let made = temporary.path().join("made");
    copy(&from, &made, None, OWNED).result.unwrap();
    let metadata = made.join("null").metadata().unwrap();
    assert_eq!(metadata.rdev(), device);
    assert_eq!(metadata.mode() & 0o7777, 0o666);
}

#[test]
fn a_file_whose_size_is_not_known_ahead_is_copied() {
    let temporary = tempfile::tempdir().unwrap();
    let to = temporary.path().join("to");
    copy(Path::new("/proc/self/mounts"), &to, None, PLAIN)
        .result
        .unwrap();
    assert!(fs::read_to_string(&to).unwrap().contains("proc"));
}

#[test]
fn a_file_that_cannot_be_read_ends_the_copy_with_its_name() {
    let temporary = tempfile::tempdir().unwrap();
    let (from, to) = (temporary.path().join("from"), temporary.path().join("to"));
    // A process's memory can be opened, and cannot be read at its start.
    let unpacked = copy(Path::new("/proc/self/mem"), &to, None, PLAIN);
    let error = unpacked.error();
    assert!(
        error.contains("\"/proc/self/mem\" cannot be read"),
        "{error}"
    );
    let error = copy(&from, &to, None, PLAIN).error();
    assert!(
        error.contains("from\" cannot be copied: No such file"),
        "{error}"
    );
    assert!(!to.exists());
}

#[test]
fn a_file_that_shrinks_meanwhile_fails_the_copy_at_its_end() {
    let temporary = tempfile::tempdir().unwrap();
    let (from, to) = (temporary.path().join("from"), temporary.path().join("to"));
    fs::create_dir(&from).unwrap();
    let file = File::create(from.join("shrinking")).unwrap();
    file.set_len(3 << 20).unwrap();
    file.write_all_at(&vec![7; 3 << 20], 0).unwrap();
    // The first chunk is sent when most of the file has not been read yet.
    struct Shrink(Vec<u8>, File);
    impl Write for Shrink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.1.set_len(1 << 20)?;
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut out = ChunkWriter::new(Shrink(Vec::new(), file));
    let options = PackOptions::default();
    let result = super::super::pack(Root::Own, bytes(&from), &options, &mut out);
    let result = result.map_err(|error| error.sentence());
    let wire = out.end(result).unwrap().0;

    let unpacked = unpack(&wire, &to, &Landing::Tree(None), PLAIN);
    let notes = unpacked.notes.concat();
    assert!(notes.contains("changed while it was copied"), "{notes}");
    let error = unpacked.error();
    assert!(error.contains("shrinking\" became shorter"), "{error}");
    let copied = fs::read(to.join("shrinking")).unwrap();
    assert_eq!(copied.len(), 3 << 20);
    assert!(copied[..1 << 20].iter().all(|&byte| byte == 7));
    assert!(copied[1 << 20..].ends_with(&[0; 1 << 10]));
}

#[test]
fn other_programs_read_the_archive() {
    let temporary = tempfile::tempdir().unwrap();
    let (from, to) = (temporary.path().join("from"), temporary.path().join("to"));
    fs::create_dir_all(from.join("sub")).unwrap();
    fs::create_dir(&to).unwrap();
    let long = "l".repeat(200);
    fs::write(from.join("sub").join(&long), "long").unwrap();
    fs::hard_link(from.join("sub").join(&long), from.join("linked")).unwrap();
    let sparse = File::create(from.join("sparse")).unwrap();
    sparse.set_len(1 << 20).unwrap();
    sparse.write_all_at(b"data", 700_000).unwrap();
    set_modified(&from.join("sparse"), 1_000_000_000, 5);

    let mut archive = Vec::new();
    let mut out = ChunkWriter::new(Vec::new());
    let options = PackOptions {
        name: b"renamed".to_vec(),
        ..PackOptions::default()
    };
    super::super::pack(Root::Own, bytes(&from), &options, &mut out).unwrap();
    let wire = out.end(Ok(())).unwrap();
    let mut chunks = ChunkReader::new(wire.as_slice(), |note| panic!("{note}"));
    chunks.read_to_end(&mut archive).unwrap();
    let file = temporary.path().join("archive.tar");
    fs::write(&file, &archive).unwrap();

    let tar = std::process::Command::new("tar")
        .arg("-xf")
        .arg(&file)
        .arg("-C")
        .arg(&to)
        .output();
    let Ok(output) = tar else {
        return;
    };
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stderr, b"", "{output:?}");
    let to = to.join("renamed");
    assert_eq!(names(&to), names(&from));
    assert!(fs::read(to.join("sparse")).unwrap() == fs::read(from.join("sparse")).unwrap());
    assert_eq!(modified(&to.join("sparse")), (1_000_000_000, 5));
    assert_eq!(
        to.join("linked").metadata().unwrap().ino(),
        to.join("sub").join(&long).metadata().unwrap().ino()
    );
}

#[test]
fn archives_of_other_programs_are_read() {
    let temporary = tempfile::tempdir().unwrap();
    let from = temporary.path().join("from");
    fs::create_dir_all(from.join("sub")).unwrap();
    let long = "l".repeat(150);
    fs::write(from.join("sub").join(&long), "long").unwrap();
    symlink(&long, from.join("sub/link")).unwrap();
    let sparse = File::create(from.join("sparse")).unwrap();
    sparse.set_len(2 << 20).unwrap();
    for part in 0..12 {
        sparse
            .write_all_at(b"data", part * 131_072 + 70_000)
            .unwrap();
    }
    for format in ["gnu", "pax", "oldgnu"] {
        let tar = std::process::Command::new("tar")
            .args(["-S", "-c", "--format", format, "-C"])
            .arg(&from)
            .arg(".")
            .output();
        let Ok(output) = tar else {
            return;
        };
        assert!(output.status.success(), "{output:?}");
        let to = temporary.path().join(format);
        fs::create_dir(&to).unwrap();
        let unpacked = unpack(&framed(&output.stdout), &to, &Landing::Members, PLAIN);
        unpacked.result.unwrap();
        assert_eq!(names(&to), names(&from), "{format}");
        assert!(
            fs::read(to.join("sparse")).unwrap() == fs::read(from.join("sparse")).unwrap(),
            "{format}"
        );
        let target = fs::read_link(to.join("sub/link")).unwrap();
        assert_eq!(target, Path::new(&long), "{format}");
    }
}
