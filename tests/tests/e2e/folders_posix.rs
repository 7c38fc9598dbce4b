//! The POSIX filesystem test suite on a shared folder (`docs/pjdfstest.md`), where `MVM_PJDFSTEST` says where
//! it is.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tests::{Guest, User, host};

/// An emulated machine takes half a minute; a busy one much longer.
const PATIENCE: Duration = Duration::from_secs(20 * 60);

/// Nobody else's number on the host.
const USER: u32 = 4323;

/// The whole suite, then those of its cases that mount read-only: a case leaves a file open, after which
/// nothing can be mounted read-only. It fails where a case does, which its output tells better.
const SCRIPT: &str = "
for n in 1 2; do
    name=mvm-$([ $n = 1 ] && echo one || echo two)
    echo $name:x:3000$n:3000$n::/:/bin/sh >>/etc/passwd; echo $name:x:3000$n: >>/etc/group
done
mkdir -p /elsewhere && mount -t tmpfs none /elsewhere
cd /project; PATH=/suite:$PATH
pjdfstest -c /suite/whole.toml -p /project -s /elsewhere
pjdfstest -c /suite/remount.toml -p /project -s /elsewhere erofs
echo the end";

#[test]
fn the_posix_filesystem_test_suite_passes_in_a_guest() {
    let test = "the_posix_filesystem_test_suite_passes_in_a_guest";
    let Some(suite) = env::var_os("MVM_PJDFSTEST").map(PathBuf::from) else {
        return host::skipped(test, "MVM_PJDFSTEST does not say where pjdfstest is");
    };
    let user = User::new(test, USER);
    let (root, user) = (None, user.as_ref());
    let mut runs = vec![(root, "")];
    if user.is_some() {
        runs.push((user, ""));
    }
    if env::var_os("MVM_TEST_STRESS").is_some() {
        let all = ["", ":cache=strict", ":cache=private", ":locks=host"];
        runs = all
            .iter()
            .flat_map(|options| [(root, *options), (user, *options)])
            .collect();
    }
    for (user, options) in runs {
        passes(&suite, user, options);
    }
}

/// Runs the suite on a folder with these options that `user` serves, or else who runs the tests.
fn passes(suite: &Path, user: Option<&User>, options: &str) {
    let (tools, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::copy(suite, tools.path().join("pjdfstest")).unwrap();
    // A case runs a copy of what is found as this, and busybox knows no such copies.
    fs::copy(host::peer(), tools.path().join("sleep")).unwrap();
    for (name, remount) in [("whole", "false"), ("remount", "true")] {
        let text = include_str!("../../pjdfstest.toml")
            .replace("REMOUNT", remount)
            .replace(
                "USERS",
                r#"[["mvm-one", "mvm-one"], ["mvm-two", "mvm-two"]]"#,
            );
        fs::write(tools.path().join(name).with_extension("toml"), text).unwrap();
    }
    let mut guest = Guest::new()
        .option("-v", format!("{}:/suite:ro", tools.path().display()))
        .option("-v", format!("{}:/project{options}", work.path().display()));
    let mut who = format!("root, {options:?}");
    if let Some(user) = user {
        user.give(tools.path());
        user.give(work.path());
        guest = guest.by(user);
        who = format!("user {USER}, {options:?}");
    }
    let output = guest.start(&["sh", "-c", SCRIPT]).wait_at_most(PATIENCE);
    output.expect_code(0).expect_in_stdout("the end\n");
    let said = output.text();
    let named = |what: &str| -> Vec<&str> {
        let lines = said
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        let outcome = |words: Vec<_>| match words[..] {
            [name, outcome] if outcome == what => Some(name),
            _ => None,
        };
        lines.filter_map(outcome).collect()
    };
    assert_eq!(named("FAILED"), [""; 0], "served by {who}: {output}");
    // Those that mount were passed over in the first run, and passed in the second.
    let (mounting, skipped): (Vec<_>, Vec<_>) = named("skipped")
        .into_iter()
        .partition(|name| name.contains("erofs"));
    assert_eq!(skipped, ["link::link_count_max"], "served by {who}");
    let passed = named("ok");
    assert!(
        mounting.iter().all(|name| passed.contains(name)),
        "served by {who}: {output}"
    );
    assert!(passed.len() > 300, "served by {who}: {output}");
    println!(
        "served by {who}: {} passed, not run: {skipped:?}",
        passed.len()
    );
}
