//! Archives that lie, and destinations that change: nothing outside of the destination is touched.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;

use tar::{EntryType, Header};
use tempfile::TempDir;

use super::super::pax;
use super::*;

/// An archive written by hand.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    /// A tree, as the packing side begins one.
    fn tree() -> Self {
        Self::default().member("./", EntryType::Directory, "", b"")
    }

    fn member(mut self, name: &str, kind: EntryType, target: &str, content: &[u8]) -> Self {
        let mut header = Header::new_ustar();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o6777);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str) -> Self {
        self.member(name, EntryType::Regular, "", b"hostile")
    }

    fn link(self, name: &str, target: &str) -> Self {
        self.member(name, EntryType::Symlink, target, b"")
    }

    fn directory(self, name: &str) -> Self {
        self.member(name, EntryType::Directory, "", b"")
    }

    fn records(self, records: &[(&[u8], &[u8])]) -> Self {
        let mut text = Vec::new();
        for (keyword, value) in records {
            pax::push(&mut text, keyword, value);
        }
        self.member("pax", EntryType::XHeader, "", &text)
    }

    fn wire(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        framed(&self.0)
    }
}

/// A destination, with something beside it that has to stay as it is.
struct Scene(TempDir);

impl Scene {
    fn new() -> Self {
        let scene = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(scene.path("outside/kept")).unwrap();
        fs::write(scene.path("outside/secret"), "secret").unwrap();
        fs::create_dir(scene.path("to")).unwrap();
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn unpack(&self, tar: Tar, landing: &Landing) -> Unpacked {
        let unpacked = unpack(&tar.wire(), &self.path("to"), landing, PLAIN);
        assert_eq!(names(&self.path("outside")), ["kept", "secret"]);
        assert_eq!(
            names(self.0.path())
                .iter()
                .filter(|n| !n.contains('/'))
                .count(),
            2
        );
        let secret = self.path("outside/secret").metadata().unwrap();
        assert_eq!(fs::read(self.path("outside/secret")).unwrap(), b"secret");
        assert_eq!((secret.nlink(), secret.mode() & 0o7000), (1, 0));
        unpacked
    }
}

#[test]
fn names_that_lead_out_are_refused() {
    let scene = Scene::new();
    for name in [
        "../outside/new",
        "./../outside/new",
        "a/../../outside/new",
        "..",
        "a/..",
        "/outside",
        "//outside",
    ] {
        for landing in [Landing::Members, Landing::Tree(None)] {
            let error = scene.unpack(Tar::tree().file(name), &landing).error();
            assert!(error.contains("the archive holds"), "{name}: {error}");
        }
    }
    let tar = Tar::tree()
        .records(&[(b"path", b"../outside/new")])
        .file("x");
    let error = scene.unpack(tar, &Landing::Members).error();
    assert!(error.contains("leads upwards"), "{error}");
    let tar = Tar::tree().records(&[(b"path", b"a\0b")]).file("x");
    let error = scene.unpack(tar, &Landing::Members).error();
    assert!(error.contains("zero byte"), "{error}");
    assert_eq!(names(&scene.path("to")), [""; 0]);
}

#[test]
fn symlinks_of_the_archive_are_not_followed() {
    let scene = Scene::new();
    let outside = scene.path("outside").display().to_string();
    for tar in [
        Tar::tree().link("a", &outside).file("a/new"),
        Tar::tree().link("a", "../outside").file("a/new"),
        Tar::tree().link("a", "../outside").directory("a"),
        Tar::tree().link("a", "../outside").directory("a/kept/new"),
        Tar::tree()
            .directory("d")
            .link("d/up", "..")
            .file("d/up/new"),
    ] {
        let error = scene.unpack(tar, &Landing::Members).error();
        assert!(error.contains("is a symlink or a file"), "{error}");
        fs::remove_dir_all(scene.path("to")).unwrap();
        fs::create_dir(scene.path("to")).unwrap();
    }
    // A file in the place of a link replaces the link.
    let tar = Tar::tree().link("a", "../outside/secret").file("a");
    scene.unpack(tar, &Landing::Members).result.unwrap();
    assert_eq!(fs::read(scene.path("to/a")).unwrap(), b"hostile");
}

#[test]
fn symlinks_of_the_destination_are_not_followed() {
    let scene = Scene::new();
    symlink("../outside", scene.path("to/out")).unwrap();
    for tar in [
        Tar::tree().file("out/new"),
        Tar::tree().directory("out").file("out/new"),
        Tar::tree().file("out/kept/new"),
    ] {
        let error = scene.unpack(tar, &Landing::Tree(None)).error();
        assert!(
            error.contains(
                "to/out\" is a symlink or a file, and a directory cannot be copied onto it"
            ),
            "{error}"
        );
    }
}

#[test]
fn hard_links_reach_nothing_outside() {
    let scene = Scene::new();
    let outside = scene.path("outside/secret").display().to_string();
    symlink("../outside", scene.path("to/out")).unwrap();
    for target in [
        outside.as_str(),
        "../outside/secret",
        "out/secret",
        "",
        ".",
        "missing",
    ] {
        let tar = Tar::tree().member("new", EntryType::Link, target, b"");
        let error = scene.unpack(tar, &Landing::Members).error();
        assert!(
            error.contains("cannot be linked") || error.contains("leads nowhere"),
            "{target}: {error}"
        );
    }
    // A link to a link is a link, and does not lead through it.
    let tar = Tar::tree()
        .link("a", "../outside/secret")
        .member("b", EntryType::Link, "a", b"")
        .file("b");
    scene.unpack(tar, &Landing::Members).result.unwrap();
    assert!(scene.path("to/a").symlink_metadata().unwrap().is_symlink());
    // The top of an archive is no link to anywhere.
    let tar = Tar::default().member(".", EntryType::Link, "secret", b"");
    let error = scene
        .unpack(tar, &Landing::Tree(Some(b"n".to_vec())))
        .error();
    assert!(error.contains("a link to what is not in it"), "{error}");
}

#[test]
fn a_tree_is_what_was_asked_for_and_nothing_beside_it() {
    let scene = Scene::new();
    let named = Landing::Tree(Some(b"name".to_vec()));
    for (tar, is_fine, left) in [
        (Tar::default(), false, &[][..]),
        (Tar::default().file("other"), false, &[]),
        (Tar::default().file("."), true, &["name"]),
        (Tar::default().file(".").file("other"), false, &["name"]),
        (Tar::tree().file("other"), true, &["name", "name/other"]),
    ] {
        let unpacked = scene.unpack(tar, &named);
        assert_eq!(unpacked.result.is_ok(), is_fine, "{:?}", unpacked.result);
        assert_eq!(names(&scene.path("to")), left);
        fs::remove_dir_all(scene.path("to")).unwrap();
        fs::create_dir(scene.path("to")).unwrap();
    }
}

#[test]
fn no_set_id_bit_and_no_device_comes_unasked() {
    let scene = Scene::new();
    let tar = Tar::tree()
        .file("program")
        .directory("d")
        .member("null", EntryType::Char, "", b"")
        .member("disk", EntryType::Block, "", b"")
        .member("odd", EntryType::new(b'Q'), "", b"content")
        .member("pipe", EntryType::Fifo, "", b"");
    let unpacked = scene.unpack(tar, &Landing::Members);
    unpacked.result.unwrap();
    assert_eq!(names(&scene.path("to")), ["d", "pipe", "program"]);
    for name in ["program", "d", "pipe"] {
        let mode = scene.path("to").join(name).metadata().unwrap().mode();
        assert_eq!(mode & 0o7777, 0o777, "{name}");
    }
    assert_eq!(unpacked.notes.len(), 3, "{:?}", unpacked.notes);
}

#[test]
fn headers_have_bounds() {
    let scene = Scene::new();
    let huge = vec![b'x'; (1 << 20) + 1];
    let sized = |size: &'static [u8]| Tar::tree().records(&[(b"size", size)]);
    let sparse = |map: &[u8], size: &'static [u8]| {
        let records: [(&[u8], &[u8]); 4] = [
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", b"s"),
            (b"GNU.sparse.realsize", size),
        ];
        let mut map = map.to_vec();
        map.resize(512, 0);
        Tar::tree()
            .records(&records)
            .member("s", EntryType::Regular, "", &map)
    };
    for (tar, expected) in [
        (Tar::tree().records(&[(b"path", &huge)]), "1 MiB"),
        (
            Tar::tree().member("x", EntryType::GNULongName, "", &huge),
            "1 MiB",
        ),
        (
            sized(b"18446744073709551615").file("x"),
            "ends in the middle",
        ),
        (sized(b"-1").file("x"), "a number"),
        (sized(b"1e3").file("x"), "a number"),
        (
            Tar::tree().records(&[(b"uid", b"4294967295")]).file("x"),
            "a number",
        ),
        (
            Tar::tree().member("x", EntryType::Link, "y", b"content"),
            "a number",
        ),
        (
            Tar::tree().member("x", EntryType::XHeader, "", b"no"),
            "list",
        ),
        (Tar::tree().records(&[(b"a", b"b")]), "ends in the middle"),
        (
            Tar::tree()
                .records(&[(b"a", b"b")])
                .records(&[(b"a", b"b")])
                .file("x"),
            "two extended headers",
        ),
        (sparse(b"99999999\n", b"1"), "too many parts"),
        (sparse(b"1\n0\n512\n", b"511"), "map"),
        (sparse(b"2\n512\n0\n0\n0\n", b"512"), "map"),
        (sparse(b"1\n18446744073709551615\n2\n", b"9"), "map"),
        (sparse(b"1\n0\nx\n", b"9"), "map"),
        (sparse(b"1", b"9"), "map"),
        (sparse(b"0\n", b"9223372036854775808"), "cannot be written"),
        (
            Tar::tree()
                .records(&[(b"GNU.sparse.map", b"0,1")])
                .file("s"),
            "obsolete",
        ),
    ] {
        let error = scene.unpack(tar, &Landing::Members).error();
        assert!(error.contains(expected), "{expected}: {error}");
        assert_eq!(names(&scene.path("to")), [""; 0], "{expected}");
    }
}

#[test]
fn half_an_archive_is_an_error_and_leaves_no_half_file() {
    let scene = Scene::new();
    let whole = Tar::tree().file("first").file("second").0;
    for cut in 0..whole.len() {
        let unpacked = unpack(
            &framed(&whole[..cut]),
            &scene.path("to"),
            &Landing::Members,
            PLAIN,
        );
        unpacked.error();
        for entry in fs::read_dir(scene.path("to")).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(fs::read(&path).unwrap(), b"hostile", "cut at {cut}");
            fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn what_is_no_archive_is_said_to_be_none() {
    let scene = Scene::new();
    for (content, expected) in [
        (&b""[..], "is empty"),
        (b"\x1f\x8b\x08", "gzip -dc"),
        (b"\x28\xb5\x2f\xfd", "zstd -dc"),
        (b"hello", "what should be a tar archive is none"),
    ] {
        let mut content = content.to_vec();
        if !content.is_empty() {
            content.resize(2000, 1);
        }
        let unpacked = unpack(
            &framed(&content),
            &scene.path("to"),
            &Landing::Members,
            PLAIN,
        );
        let error = unpacked.error();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_copy_that_breaks_leaves_the_old_file() {
    let scene = Scene::new();
    fs::write(scene.path("to/old"), "old").unwrap();
    let mut tar = Tar::tree().file("old").0;
    tar.truncate(512 + 512 + 3);
    let mut out = ChunkWriter::new(Vec::new());
    out.write_all(&tar).unwrap();
    let wire = out.end(Err("the machine was stopped".to_owned())).unwrap();
    let error = unpack(&wire, &scene.path("to"), &Landing::Members, PLAIN).error();
    assert_eq!(error, "the machine was stopped");
    assert_eq!(names(&scene.path("to")), ["old"]);
    assert_eq!(fs::read(scene.path("to/old")).unwrap(), b"old");
}
