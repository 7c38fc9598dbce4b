//! Where a copy lands, by what is at the destination: as with `docker cp`.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::*;

/// A file, a directory with a file in it, and a directory to copy to.
struct Scene(TempDir);

impl Scene {
    fn new() -> Self {
        let scene = Self(tempfile::tempdir().unwrap());
        fs::write(scene.path("file"), "new").unwrap();
        fs::create_dir_all(scene.path("tree/sub")).unwrap();
        fs::write(scene.path("tree/sub/inner"), "inner").unwrap();
        fs::create_dir(scene.path("to")).unwrap();
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Copies `from`, as `mvm cp` would name it, to a path below `to`.
    fn copy(&self, from: &str, to: &str) -> Unpacked {
        let name = (!from.ends_with("/.")).then_some(from);
        let from = self.path(from);
        // With its slashes, which a joined path would keep and a normalized one not.
        let to = format!("{}/{to}", self.path("to").display());
        copy(&from, Path::new(&to), name, PLAIN)
    }

    fn below(&self) -> Vec<String> {
        names(&self.path("to"))
    }
}

#[test]
fn a_file_goes_to_a_new_name_or_into_a_directory() {
    let scene = Scene::new();
    for to in ["", "new", "./new2"] {
        scene.copy("file", to).result.unwrap();
    }
    fs::create_dir(scene.path("to/directory")).unwrap();
    scene.copy("file", "directory").result.unwrap();
    scene.copy("file", "directory/").result.unwrap();
    assert_eq!(
        scene.below(),
        ["directory", "directory/file", "file", "new", "new2"]
    );
}

#[test]
fn a_directory_goes_to_a_new_name_or_into_a_directory() {
    let scene = Scene::new();
    for to in ["", "new", "new2/"] {
        scene.copy("tree", to).result.unwrap();
    }
    let expected = [
        "new",
        "new/sub",
        "new/sub/inner",
        "new2",
        "new2/sub",
        "new2/sub/inner",
        "tree",
        "tree/sub",
        "tree/sub/inner",
    ];
    assert_eq!(scene.below(), expected);
}

#[test]
fn a_directorys_content_goes_into_a_directory_that_exists_or_does_not() {
    let scene = Scene::new();
    scene.copy("tree/.", "").result.unwrap();
    scene.copy("tree/.", "new").result.unwrap();
    let expected = ["new", "new/sub", "new/sub/inner", "sub", "sub/inner"];
    assert_eq!(scene.below(), expected);
}

#[test]
fn directories_that_exist_are_merged_and_keep_their_permissions() {
    let scene = Scene::new();
    fs::create_dir_all(scene.path("to/tree/sub")).unwrap();
    fs::write(scene.path("to/tree/sub/inner"), "old").unwrap();
    fs::write(scene.path("to/tree/sub/other"), "other").unwrap();
    let sub = scene.path("to/tree/sub");
    fs::set_permissions(&sub, fs::Permissions::from_mode(0o700)).unwrap();
    scene.copy("tree", "").result.unwrap();
    assert_eq!(
        scene.below(),
        ["tree", "tree/sub", "tree/sub/inner", "tree/sub/other"]
    );
    assert_eq!(fs::read(sub.join("inner")).unwrap(), b"inner");
    assert_eq!(sub.metadata().unwrap().mode() & 0o7777, 0o700);
}

#[test]
fn a_file_that_exists_is_replaced_and_not_written_through() {
    let scene = Scene::new();
    fs::write(scene.path("outside"), "outside").unwrap();
    fs::write(scene.path("to/old"), "old").unwrap();
    fs::hard_link(scene.path("to/old"), scene.path("other name")).unwrap();
    scene.copy("file", "old").result.unwrap();
    assert_eq!(fs::read(scene.path("to/old")).unwrap(), b"new");
    assert_eq!(fs::read(scene.path("other name")).unwrap(), b"old");

    // In a directory, a symlink is one of the things that are replaced.
    symlink(scene.path("outside"), scene.path("to/file")).unwrap();
    scene.copy("file", "").result.unwrap();
    assert!(scene.path("to/file").symlink_metadata().unwrap().is_file());
    assert_eq!(fs::read(scene.path("outside")).unwrap(), b"outside");
    assert_eq!(scene.below(), ["file", "old"]);
}

#[test]
fn a_symlink_that_was_named_is_followed() {
    let scene = Scene::new();
    fs::create_dir(scene.path("elsewhere")).unwrap();
    fs::write(scene.path("elsewhere/target"), "old").unwrap();
    symlink("../elsewhere", scene.path("to/directory")).unwrap();
    symlink("directory/target", scene.path("to/file-link")).unwrap();
    scene.copy("file", "directory").result.unwrap();
    scene.copy("file", "file-link").result.unwrap();
    assert_eq!(names(&scene.path("elsewhere")), ["file", "target"]);
    assert_eq!(fs::read(scene.path("elsewhere/target")).unwrap(), b"new");
    assert_eq!(scene.below(), ["directory", "file-link"]);
}

#[test]
fn what_cannot_be_is_an_error_and_changes_nothing() {
    let scene = Scene::new();
    fs::write(scene.path("to/file"), "old").unwrap();
    fs::create_dir_all(scene.path("to/directory/file")).unwrap();
    symlink("loop", scene.path("to/loop")).unwrap();
    let before = scene.below();
    for (from, to, expected) in [
        (
            "tree",
            "file",
            "is a file, and a directory cannot be copied onto it",
        ),
        (
            "tree/.",
            "file",
            "is a file, and a directory cannot be copied onto it",
        ),
        ("file", "file/", "cannot be reached: Not a directory"),
        ("file", "file/below", "cannot be reached: Not a directory"),
        ("file", "new/", "leave the slash away"),
        (
            "file",
            "missing/new",
            "is in a directory that does not exist",
        ),
        (
            "tree",
            "missing/new",
            "is in a directory that does not exist",
        ),
        ("file", "directory", "cannot be made: Is a directory"),
        (
            "file",
            "loop",
            "cannot be reached: Too many levels of symbolic links",
        ),
    ] {
        let error = scene.copy(from, to).error();
        assert!(error.contains(expected), "{from} to {to}: {error}");
        assert_eq!(scene.below(), before, "{from} to {to}");
    }
    assert_eq!(fs::read(scene.path("to/file")).unwrap(), b"old");

    let error = copy(&scene.path("file"), Path::new("/dev/null"), None, PLAIN).error();
    assert!(
        error.contains("is neither a file nor a directory"),
        "{error}"
    );
    let error = copy(&scene.path("tree"), Path::new(""), None, PLAIN).error();
    assert!(error.contains("does not exist"), "{error}");
}

#[test]
fn an_archive_is_unpacked_only_into_a_directory() {
    let scene = Scene::new();
    let wire = packed(&scene.path("tree"));
    for (to, expected) in [
        ("file", "is no directory"),
        ("missing", "is no directory"),
        ("missing/more", "cannot be opened: No such file"),
    ] {
        let to = scene.path(to);
        let error = unpack(&wire, &to, &Landing::Members, PLAIN).error();
        assert!(error.contains(expected), "{to:?}: {error}");
    }
    let unpacked = unpack(&wire, &scene.path("to"), &Landing::Members, PLAIN);
    unpacked.result.unwrap();
    assert_eq!(scene.below(), ["sub", "sub/inner"]);
}

#[test]
fn a_source_that_is_a_symlink_is_followed_only_where_asked_for() {
    let scene = Scene::new();
    symlink("file", scene.path("link")).unwrap();
    symlink("tree", scene.path("tree-link")).unwrap();
    let pack = |name: &str, follow| {
        let mut out = ChunkWriter::new(Vec::new());
        let options = PackOptions {
            follow,
            ..PackOptions::default()
        };
        let path = format!("{}/{name}", scene.0.path().display());
        super::super::pack(Root::Own, path.as_bytes(), &options, &mut out).unwrap();
        out.end(Ok(())).unwrap()
    };
    for (source, follow, to, kind) in [
        ("link", false, "a", "link"),
        ("link", true, "b", "file"),
        ("tree-link", false, "c", "link"),
        ("tree-link", true, "d", "directory"),
        ("tree-link/", false, "e", "directory"),
        ("tree-link/.", false, "f", "directory"),
    ] {
        let to = scene.path("to").join(to);
        let wire = pack(source, follow);
        unpack(&wire, &to, &Landing::Tree(None), PLAIN)
            .result
            .unwrap();
        let found = to.symlink_metadata().unwrap().file_type();
        let found = match (found.is_symlink(), found.is_dir()) {
            (true, _) => "link",
            (_, true) => "directory",
            _ => "file",
        };
        assert_eq!(found, kind, "{source}, {follow}");
    }
}

#[test]
fn a_tree_is_left_by_no_path_and_no_symlink() {
    let scene = Scene::new();
    fs::create_dir(scene.path("root")).unwrap();
    symlink("/", scene.path("root/slash")).unwrap();
    symlink("../../../..", scene.path("root/up")).unwrap();
    symlink("/file", scene.path("root/absolute")).unwrap();
    fs::write(scene.path("root/file"), "old").unwrap();
    let root = fs::File::open(scene.path("root")).unwrap();
    let wire = packed(&scene.path("file"));
    let to = |path: &str| {
        use std::os::fd::AsFd;
        let chunks = ChunkReader::new(wire.as_slice(), |_| {});
        let landing = Landing::Tree(Some(b"new".to_vec()));
        let root = Root::Tree(root.as_fd());
        super::super::unpack(root, path.as_bytes(), &landing, PLAIN, chunks, &mut |_| {})
    };
    to("/../../one").unwrap();
    to("up/two").unwrap();
    to("slash/up/../three").unwrap();
    to("absolute").unwrap();
    to("/").unwrap();
    assert_eq!(
        names(&scene.path("root")),
        [
            "absolute", "file", "new", "one", "slash", "three", "two", "up"
        ]
    );
    assert_eq!(fs::read(scene.path("root/file")).unwrap(), b"new");
}
