//! A destination without room.

use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use super::*;

/// Tells this test that it runs where it may mount, and which directory is to be full.
const INSIDE: &str = "MVM_TEST_FULL_DISK";

/// The size of the filesystem that gets full.
const SIZE: &str = "size=512k";

#[test]
fn a_full_disk_ends_the_copy_and_leaves_no_part_of_a_file() {
    if let Some(to) = env::var_os(INSIDE) {
        return fill(PathBuf::from(to));
    }
    let temporary = tempfile::tempdir().unwrap();
    // A mount namespace of its own, which anybody may have with a user namespace.
    let own = |script: &str| {
        let mut command = Command::new("unshare");
        command.args([
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-ec",
            script,
            "sh",
        ]);
        command
    };
    let mounted = "mount -t tmpfs -o $1 none $2";
    let mut possible = own(mounted);
    let possible = possible.arg(SIZE).arg(temporary.path()).output();
    if !possible.is_ok_and(|output| output.status.success()) {
        eprintln!("no filesystem can be mounted here, so none gets full");
        return;
    }
    let again = own(&format!("{mounted}; exec $3 --exact $4 --nocapture"))
        .arg(SIZE)
        .arg(temporary.path())
        .arg(env::current_exe().unwrap())
        .arg("archive::tests::full::a_full_disk_ends_the_copy_and_leaves_no_part_of_a_file")
        .env(INSIDE, temporary.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&again.stdout);
    assert!(
        again.status.success() && said.contains("1 passed"),
        "{again:?}"
    );
}

fn fill(to: PathBuf) {
    let temporary = tempfile::tempdir().unwrap();
    let from = temporary.path().join("from");
    fs::create_dir(&from).unwrap();
    fs::write(from.join("large"), vec![1; 4 << 20]).unwrap();
    for name in ["new", "old"] {
        let to = to.join(name);
        let is_old = name == "old";
        if is_old {
            fs::create_dir(&to).unwrap();
            fs::write(to.join("large"), "old").unwrap();
        }
        let error = copy(&from, &to, None, PLAIN).error();
        assert!(
            error.contains("large\" cannot be written: No space left on device"),
            "{error}"
        );
        let left: &[&str] = if is_old { &["large"] } else { &[] };
        assert_eq!(names(&to), left);
        if is_old {
            assert_eq!(fs::read(to.join("large")).unwrap(), b"old");
        }
        // Directories are not left as closed as they were while they were filled.
        assert_eq!(
            to.metadata().unwrap().mode(),
            from.metadata().unwrap().mode()
        );
    }
}
