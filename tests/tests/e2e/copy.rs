//! `mvm cp`: what is copied, either way, is what was there, and a copy that cannot be whole says so.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use tests::host::{self, must_succeed};
use tests::{Guest, Machine, Machines, Output, Running, image};

/// `mvm cp` of these words, `@` at the beginning of one being the machine.
fn cp(machines: &Machines, machine: &Machine<'_>, words: &[&str]) -> Output {
    let words: Vec<String> = words
        .iter()
        .map(|word| match word.strip_prefix('@') {
            Some(path) => format!("{machine}:{path}"),
            None => (*word).to_owned(),
        })
        .collect();
    let words: Vec<&str> = ["cp"]
        .into_iter()
        .chain(words.iter().map(String::as_str))
        .collect();
    machines.mvm(&words)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the path is text")
}

/// A tree with one of everything.
fn plant(tree: &Path) {
    fs::create_dir_all(tree.join("sub/empty")).unwrap();
    fs::write(tree.join("file"), "content\n").unwrap();
    fs::write(tree.join("sub/script"), "#!/bin/sh\n").unwrap();
    fs::write(tree.join("sub/a name with ' \" \n and ü"), "odd\n").unwrap();
    symlink("../file", tree.join("sub/link")).unwrap();
    symlink("/nowhere/at/all", tree.join("dangling")).unwrap();
    fs::set_permissions(tree.join("sub/script"), Permissions::from_mode(0o750)).unwrap();
    fs::set_permissions(tree.join("file"), Permissions::from_mode(0o604)).unwrap();
    let sparse = File::create(tree.join("sparse")).unwrap();
    sparse.set_len(512 << 20).unwrap();
    sparse.write_all_at(b"here", 300 << 20).unwrap();
    for (name, second) in [("file", 1_000_000_000), ("sub/script", 1_234_567_890)] {
        let file = File::options().write(true).open(tree.join(name)).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_secs(second))
            .unwrap();
    }
}

#[test]
fn a_tree_is_the_same_there_and_back() {
    let machines = Machines::new();
    let machine = machines.idle(Guest::new());
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    plant(&tree);
    cp(&machines, &machine, &[text(&tree), "@/tmp/tree"]).expect_code(0);
    machine
        .exec("cd /tmp/tree && stat -c '%n %a %Y' file sub/script && readlink sub/link && readlink dangling && cat sub/a*")
        .expect_code(0)
        .expect_stdout("file 604 1000000000\nsub/script 750 1234567890\n../file\n/nowhere/at/all\nodd\n");
    let blocks = machine.exec("stat -c '%s %b' /tmp/tree/sparse").text();
    let blocks: Vec<u64> = blocks
        .split_whitespace()
        .map(|n| n.parse().unwrap())
        .collect();
    assert_eq!(blocks[0], 512 << 20);
    assert!(
        blocks[1] < 2048,
        "{} blocks of a hole are written",
        blocks[1]
    );

    let back = dir.path().join("back");
    cp(&machines, &machine, &["@/tmp/tree", text(&back)]).expect_code(0);
    let mut diff = Command::new("diff");
    diff.args(["-r", "--no-dereference"]).args([&tree, &back]);
    must_succeed(diff);
    for name in ["file", "sub/script", "sparse"] {
        let (sent, came) = (fs::metadata(tree.join(name)), fs::metadata(back.join(name)));
        let (sent, came) = (sent.unwrap(), came.unwrap());
        assert_eq!(came.mode(), sent.mode(), "{name}");
        assert_eq!(came.mtime(), sent.mtime(), "{name}");
        assert!(came.blocks() < 2048, "{name} is not sparse");
    }

    // Into a directory that is there it goes by its own name, and a single file takes a new one.
    cp(&machines, &machine, &[text(&tree.join("file")), "@/tmp/"]).expect_code(0);
    cp(
        &machines,
        &machine,
        &["@/tmp/file", text(&dir.path().join("other"))],
    )
    .expect_code(0);
    assert_eq!(
        fs::read_to_string(dir.path().join("other")).unwrap(),
        "content\n"
    );

    // As an archive on standard output, as other programs read it.
    let archive = Running::start(
        {
            let script = "\"$0\" cp \"$1\" - | tar -t | sort";
            let mut command = Command::new("sh");
            command.args(["-c", script]).arg(host::mvm());
            command.arg(format!("{machine}:/tmp/tree/sub"));
            command.env("XDG_STATE_HOME", machines.state_dir());
            command
        },
        Vec::new(),
    )
    .wait();
    archive.expect_code(0).expect_in_stdout("sub/script\n");
}

#[test]
fn a_copy_that_cannot_be_whole_says_so() {
    let machines = Machines::new();
    let machine = machines.idle(Guest::new());
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path().join("here");

    let missing = cp(&machines, &machine, &["@/no/such/file", text(&here)]);
    assert_ne!(missing.code(), 0, "{missing}");
    missing.expect_in_stderr("/no/such/file");
    assert!(!here.exists());
    let missing = cp(&machines, &machine, &["/no/such/file", "@/tmp/"]);
    assert_ne!(missing.code(), 0, "{missing}");
    missing.expect_in_stderr("/no/such/file");

    // A full disk in the guest.
    let large = image::random(dir.path(), 8 << 20);
    machine
        .exec("mkdir /tmp/small && mount -t tmpfs -o size=1m none /tmp/small")
        .expect_code(0);
    let full = cp(&machines, &machine, &[text(&large), "@/tmp/small/file"]);
    assert_ne!(full.code(), 0, "{full}");
    full.expect_in_stderr("No space left");
    // The machine goes on, and so does a copy that has room.
    machine.exec("umount /tmp/small").expect_code(0);
    cp(&machines, &machine, &[text(&large), "@/tmp/file"]).expect_code(0);
    machine
        .exec("sha256sum </tmp/file | cut -c1-64")
        .expect_stdout(&format!("{}\n", image::sha256(&large)));
}

#[test]
fn a_full_disk_of_the_host_is_told() {
    const TEST: &str = "a_full_disk_of_the_host_is_told";
    if !host::is_root() {
        host::skipped(TEST, "only root can mount a small disk");
        return;
    }
    let machines = Machines::new();
    let machine = machines.idle(Guest::new());
    machine
        .exec("head -c 8000000 /dev/urandom >/tmp/large")
        .expect_code(0);
    let dir = tempfile::tempdir().unwrap();
    // In a mount namespace of its own, so that nothing stays mounted.
    let script = "mount -t tmpfs -o size=1m none \"$1\" && \"$0\" cp \"$2\" \"$1/file\"";
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", script])
        .arg(host::mvm())
        .arg(dir.path())
        .arg(format!("{machine}:/tmp/large"))
        .env("XDG_STATE_HOME", machines.state_dir());
    let output = Running::start(command, Vec::new()).wait();
    assert_ne!(output.code(), 0, "{output}");
    output.expect_in_stderr("No space left");
    machine.exec("echo alive").expect_stdout("alive\n");
}

#[test]
fn no_symlink_leads_a_copy_out_of_its_destination() {
    let machines = Machines::new();
    let machine = machines.idle(Guest::new());
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    let inside = dir.path().join("inside");
    fs::create_dir(&outside).unwrap();
    fs::create_dir_all(inside.join("tree")).unwrap();
    // The guest's tree has a directory where the host's has a link that leads out.
    symlink(&outside, inside.join("tree/sub")).unwrap();
    machine
        .exec("mkdir -p /tmp/tree/sub && echo evil >/tmp/tree/sub/file")
        .expect_code(0);
    let output = cp(&machines, &machine, &["@/tmp/tree", text(&inside)]);
    assert!(
        fs::read_dir(&outside).unwrap().next().is_none(),
        "a file got out of the destination: {output}"
    );
    // And its own links are links, whatever they point at.
    machine
        .exec(&format!("ln -s {} /tmp/tree/out", outside.display()))
        .expect_code(0);
    let fresh = dir.path().join("fresh");
    cp(&machines, &machine, &["@/tmp/tree", text(&fresh)]).expect_code(0);
    assert!(fresh.join("out").symlink_metadata().unwrap().is_symlink());
    assert_eq!(
        fs::read_to_string(fresh.join("sub/file")).unwrap(),
        "evil\n"
    );

    // An archive that lies: a link to a directory outside, then a file behind it.
    let lie = dir.path().join("lie");
    fs::create_dir(&lie).unwrap();
    symlink("/tmp/victim", lie.join("way")).unwrap();
    let archive = dir.path().join("lie.tar");
    let tar = |words: &[&str]| {
        let mut command = Command::new("tar");
        command.arg("-C").arg(&lie).args(words);
        must_succeed(command);
    };
    tar(&["-cf", text(&archive), "way"]);
    fs::remove_file(lie.join("way")).unwrap();
    fs::create_dir(lie.join("way")).unwrap();
    fs::write(lie.join("way/file"), "evil\n").unwrap();
    tar(&["-rf", text(&archive), "way/file"]);
    machine.exec("mkdir /tmp/victim /tmp/into").expect_code(0);
    let into = format!("{machine}:/tmp/into");
    Running::start(
        machines.command(&["cp", "-", &into]),
        File::open(&archive).unwrap(),
    )
    .wait();
    machine
        .exec("ls -A /tmp/victim")
        .expect_code(0)
        .expect_stdout("");
}
