//! What programs expect of files, checked by programs in a guest, and afterwards on the host.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::getuid;
use tests::host::run_in;
use tests::process::Input;
use tests::python::{converse, has_python, python};
use tests::{Guest, User};

/// Nobody else's number on the host.
const USER: u32 = 4324;

const DATA: &str = include_str!("programs/data.py");
const PERMISSION: &str = include_str!("programs/permission.py");

/// Whoever gets these files on the host finds what the guest has left in them.
#[track_caller]
fn look_at(dir: &Path, uid: u32) {
    let at = |name: &str| dir.join(name);
    let about = |name: &str| fs::metadata(at(name)).unwrap();
    let mapped = fs::read(at("mapped")).unwrap();
    for page in (0..mapped.len()).step_by(4096) {
        let expected = if page == 12288 { b"xy" } else { b"ab" };
        assert_eq!(&mapped[page..page + 2], expected, "mapped at {page}");
    }
    let log = fs::read_to_string(at("log")).unwrap();
    assert_eq!(log.lines().count(), 160, "lines that were appended");
    assert_eq!(fs::read_to_string(at("named")).unwrap(), "content");
    let sparse = about("sparse");
    assert_eq!(sparse.len(), (5 << 30) + 4096 + 3);
    assert!(sparse.blocks() < 1024, "{} blocks", sparse.blocks());
    let times = about("times");
    assert_eq!(
        (times.mtime(), times.mtime_nsec()),
        (-4, 1),
        "before 1970, to the nanosecond"
    );
    let longest = [b'n'; 255];
    for name in [&longest[..], b"\xff\xfe not UTF-8 \x80", b"new\nline"] {
        let content = fs::read(dir.join("names").join(OsStr::from_bytes(name))).unwrap();
        assert_eq!(content, name, "the file that is named for its content");
    }
    let mut value = [0; 4096];
    let length = rustix::fs::getxattr(at("attributes"), c"user.mine", &mut value[..]).unwrap();
    assert_eq!(length, 2048, "the length of an attribute");
    for (name, about) in [("log", about("log")), ("sparse", sparse)] {
        assert_eq!(about.uid(), uid, "the owner of {name} on the host");
    }
}

#[test]
fn programs_find_in_a_folder_what_a_filesystem_has() {
    if !has_python("programs_find_in_a_folder_what_a_filesystem_has") {
        return;
    }
    let caches = ["auto", "strict", "private"];
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::of_host(dir.path())
        .option("--no-host-path", ".")
        .option("-u", "root");
    let mut script = "set -e".to_owned();
    for cache in caches {
        fs::create_dir(dir.path().join(cache)).unwrap();
        let folder = format!("{0}/{cache}:/{cache}:cache={cache}", dir.path().display());
        guest = guest.option("-v", folder);
        script += &format!("; \"$@\" /{cache}");
    }
    let program = python(DATA, &[]);
    let mut words = vec!["sh", "-c", &script, "sh"];
    words.extend(program.iter().map(String::as_str));
    let output = guest.start(&words).wait();
    assert!(!output.text().contains("WRONG "), "{output}");
    output.expect_code(0);
    for cache in caches {
        look_at(&dir.path().join(cache), getuid().as_raw());
    }
}

#[test]
fn a_folder_of_a_user_without_privileges_has_it_too_but_what_is_taken_away() {
    let test = "a_folder_of_a_user_without_privileges_has_it_too_but_what_is_taken_away";
    if !has_python(test) {
        return;
    }
    let Some(user) = User::new(test, USER) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    user.give(dir.path());
    let program = python(&format!("{DATA}\n{PERMISSION}"), &["/project"]);
    let words: Vec<_> = program.iter().map(String::as_str).collect();
    let running = Guest::of_host(dir.path())
        .by(&user)
        .option("--no-host-path", ".")
        .option("-u", "root")
        .option("-v", format!("{}:/project", dir.path().display()))
        .flag("-i")
        .input(Input::Open)
        .start(&words);
    converse(running, |what| match what {
        "take dir away" => run_in(dir.path(), "chown -R 0:0 dir; chmod 700 dir dir/file"),
        "give dir back" => user.give(&dir.path().join("dir")),
        _ => panic!("{what:?}?"),
    });
    look_at(dir.path(), USER);
    let about = |name: &str| fs::symlink_metadata(dir.path().join(name)).unwrap();
    assert_eq!(
        about("owned").mode() & 0o6000,
        0,
        "no set-id bit on the host"
    );
    assert!(about("device").is_file(), "no device on the host");
    for name in ["owned", "device"] {
        assert_eq!(about(name).uid(), USER, "the owner of {name} on the host");
    }
}
