//! The POSIX filesystem test suite (see `docs/pjdfstest.md`) by way of the agent, where `MVM_PJDFSTEST` says
//! where it is: what the agent answers of its own accord has to be what the host would have said.

use std::env;
use std::fs;
use std::process::Command;

use share::Options;

use super::{Asked, Folder, Place};
use crate::tests::run_outside;

#[test]
fn the_posix_filesystem_test_suite_passes() {
    let Some(suite) = env::var_os("MVM_PJDFSTEST") else {
        eprintln!("skipped: MVM_PJDFSTEST does not say where pjdfstest is");
        return;
    };
    let (source, at, other) = (Place::new(), Place::new(), Place::new());
    let Some(_folder) = Folder::mount(source.path(), &Asked::at(at.path()), Options::default())
    else {
        return;
    };
    let configuration = include_str!("../../../../tests/pjdfstest.toml")
        .replace("REMOUNT", "false")
        .replace("USERS", r#"[["nobody", "nogroup"], ["daemon", "daemon"]]"#);
    let told = other.path().join("pjdfstest.toml");
    fs::write(&told, configuration).unwrap();
    let mut run = Command::new(suite);
    run.arg("-c").arg(&told).arg("-p").arg(at.path());
    // Another filesystem, wherever the mount is.
    run.args(["-s", "/dev/shm"]);
    let (_, said) = run_outside(&mut run).unwrap();
    let ended = |outcome: &str| said.lines().filter(|line| line.ends_with(outcome)).count();
    let failed = said.lines().filter(|line| line.ends_with("FAILED"));
    assert_eq!(failed.collect::<Vec<_>>(), [""; 0], "{said}");
    assert!(ended("ok") > 300, "{said}");
}
