//! The POSIX filesystem test suite (see `docs/pjdfstest.md`), where `MVM_PJDFSTEST` says where it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use share::{Cache, Options};

use crate::mount::Mounted;

/// What the suite is told.
fn configuration(remount: bool) -> String {
    include_str!("../../../tests/pjdfstest.toml")
        .replace("REMOUNT", if remount { "true" } else { "false" })
        .replace("USERS", r#"[["nobody", "nogroup"], ["daemon", "daemon"]]"#)
}

/// Somebody on the host without privileges.
const USER: (u32, u32) = (1234, 1234);

/// Runs the cases whose names match; their names and what came of them.
fn run(suite: &Path, at: &Path, pattern: &[&str], remount: bool) -> Vec<(String, String)> {
    let dir = tempfile::tempdir().unwrap();
    let told = dir.path().join("pjdfstest.toml");
    fs::write(&told, configuration(remount)).unwrap();
    let output = Command::new(suite)
        .arg("-c")
        .arg(&told)
        .arg("-p")
        .arg(at)
        // Another filesystem, wherever the mount is.
        .args(["-s", "/dev/shm"])
        .args(pattern)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    said.lines()
        .filter_map(
            |line| match line.split_whitespace().collect::<Vec<_>>()[..] {
                [name, outcome @ ("ok" | "FAILED" | "skipped")] => {
                    Some((name.into(), outcome.into()))
                }
                _ => None,
            },
        )
        .collect()
}

/// How many cases ended like that.
fn count(outcomes: &[(String, String)], what: &str) -> usize {
    outcomes
        .iter()
        .filter(|(_, outcome)| outcome == what)
        .count()
}

#[test]
fn the_posix_filesystem_test_suite_passes() {
    let Some(suite) = std::env::var_os("MVM_PJDFSTEST").map(PathBuf::from) else {
        eprintln!("skipped: MVM_PJDFSTEST does not say where pjdfstest is");
        return;
    };
    for ids in [None, Some(USER)] {
        for cache in [Cache::Auto, Cache::Strict, Cache::Private] {
            let options = Options {
                cache,
                ..Options::default()
            };
            let mounted = match ids {
                None => Mounted::new(options),
                Some(ids) => Mounted::rootless(options, ids),
            };
            let Some(mounted) = mounted else {
                return;
            };
            // A case of the suite leaves a file open, after which nothing can be mounted read-only: those
            // that need it run by themselves.
            let all = run(&suite, &mounted.at, &[], false);
            let remounting = run(&suite, &mounted.at, &["erofs"], true);
            let who = ids.map_or("root".into(), |(uid, _)| format!("user {uid}"));
            println!(
                "{cache:?} by {who}: {} passed, {} failed, {} skipped; {} of {} that mount passed",
                count(&all, "ok"),
                count(&all, "FAILED"),
                count(&all, "skipped"),
                count(&remounting, "ok"),
                remounting.len(),
            );
            let failed = [&all[..], &remounting].concat();
            let failed: Vec<_> = failed
                .iter()
                .filter(|(_, outcome)| outcome == "FAILED")
                .collect();
            assert!(failed.is_empty(), "{cache:?} by {who}: {failed:?}");
            let skipped: Vec<_> = all
                .iter()
                .filter(|(name, outcome)| outcome == "skipped" && !name.contains("erofs"))
                .map(|(name, _)| name.as_str())
                .collect();
            assert_eq!(skipped, ["link::link_count_max"]);
            assert!(count(&all, "ok") > 300 && count(&remounting, "ok") > 10);
        }
    }
}
