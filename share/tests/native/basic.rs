//! What every filesystem does.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use share::Options;

use crate::mount::Mounted;

#[test]
fn files_and_directories_come_and_go() {
    let Some(mounted) = Mounted::new(Options::default()) else {
        return;
    };
    let at = |name: &str| mounted.at.join(name);
    let on_host = |name: &str| mounted.source.join(name);
    fs::write(at("file"), "content").unwrap();
    assert_eq!(fs::read_to_string(on_host("file")).unwrap(), "content");
    fs::create_dir_all(at("a/b/c")).unwrap();
    fs::rename(at("file"), at("a/b/c/renamed")).unwrap();
    assert_eq!(
        fs::read_to_string(on_host("a/b/c/renamed")).unwrap(),
        "content"
    );
    fs::hard_link(at("a/b/c/renamed"), at("link")).unwrap();
    assert_eq!(fs::metadata(at("link")).unwrap().nlink(), 2);
    std::os::unix::fs::symlink("a/b", at("symlink")).unwrap();
    assert_eq!(
        fs::read_to_string(at("symlink/c/renamed")).unwrap(),
        "content"
    );
    fs::set_permissions(at("link"), fs::Permissions::from_mode(0o640)).unwrap();
    assert_eq!(
        fs::metadata(on_host("link")).unwrap().mode() & 0o7777,
        0o640
    );
    let mut names: Vec<_> = fs::read_dir(&mounted.at)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["a", "link", "symlink"]);
    File::options()
        .write(true)
        .open(at("link"))
        .unwrap()
        .set_len(3)
        .unwrap();
    assert_eq!(fs::read(on_host("link")).unwrap(), b"con");
    fs::remove_file(at("link")).unwrap();
    fs::remove_dir_all(at("a")).unwrap();
    fs::remove_file(at("symlink")).unwrap();
    assert_eq!(fs::read_dir(&mounted.source).unwrap().count(), 0);
}
