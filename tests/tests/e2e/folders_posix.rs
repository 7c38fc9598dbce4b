//! The POSIX filesystem test suite on a shared folder (`docs/pjdfstest.md`), where `MVM_PJDFSTEST` says where
//! it is.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use tests::{Guest, host};

/// What the suite needs to be told: two users who are nobody in particular, and what there is to test.
const CONFIGURATION: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
allow_remount = REMOUNT
[dummy_auth]
entries = [["mvm-one", "mvm-one"], ["mvm-two", "mvm-two"]]
"#;

/// An emulated machine takes minutes.
const PATIENCE: Duration = Duration::from_secs(40 * 60);

/// The whole suite, then those of its cases that mount read-only: a case leaves a file open, after which
/// nothing can be mounted read-only.
const SCRIPT: &str = "
for n in 1 2; do
    name=mvm-$([ $n = 1 ] && echo one || echo two)
    echo $name:x:3000$n:3000$n::/:/bin/sh >>/etc/passwd; echo $name:x:3000$n: >>/etc/group
done
mkdir -p /elsewhere && mount -t tmpfs none /elsewhere
cd /project
/suite/pjdfstest -c /suite/whole.toml -p /project -s /elsewhere
/suite/pjdfstest -c /suite/remount.toml -p /project -s /elsewhere erofs
echo the end";

#[test]
fn the_posix_filesystem_test_suite_passes_in_a_guest() {
    let Some(suite) = std::env::var_os("MVM_PJDFSTEST").map(PathBuf::from) else {
        let why = "MVM_PJDFSTEST does not say where pjdfstest is";
        return host::skipped("the_posix_filesystem_test_suite_passes_in_a_guest", why);
    };
    for options in ["", ":locks=host"] {
        let (tools, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::copy(&suite, tools.path().join("pjdfstest")).unwrap();
        for (name, remount) in [("whole", "false"), ("remount", "true")] {
            let text = CONFIGURATION.replace("REMOUNT", remount);
            fs::write(tools.path().join(name).with_extension("toml"), text).unwrap();
        }
        let output = Guest::new()
            .option("-v", format!("{}:/suite:ro", tools.path().display()))
            .option("-v", format!("{}:/project{options}", work.path().display()))
            .start(&["sh", "-c", SCRIPT])
            .wait_at_most(PATIENCE);
        output.expect_code(0).expect_in_stdout("the end\n");
        let said = output.text();
        let outcomes: Vec<(&str, &str)> = said
            .lines()
            .filter_map(
                |line| match line.split_whitespace().collect::<Vec<_>>()[..] {
                    [name, outcome @ ("ok" | "FAILED" | "skipped")] => Some((name, outcome)),
                    _ => None,
                },
            )
            .collect();
        let named = |what: &str| -> Vec<&str> {
            let found = outcomes.iter().filter(|(_, outcome)| *outcome == what);
            found.map(|(name, _)| *name).collect()
        };
        let skipped: Vec<_> = named("skipped")
            .into_iter()
            .filter(|n| !n.contains("erofs"))
            .collect();
        println!(
            "{options} {} passed, not run: {skipped:?}",
            named("ok").len()
        );
        assert_eq!(named("FAILED"), [""; 0], "{options}: {output}");
        assert_eq!(skipped, ["link::link_count_max"], "{options}");
        assert!(named("ok").len() > 300, "{options}: {output}");
    }
}
