//! Folders of the host in a guest: files both ways, changes while both look, and what cannot be shared.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use tests::host::{self, eventually};
use tests::{Guest, Machine, Machines, Running};

/// A directory with `src/file`, which says `host`.
fn set_up() -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    fs::create_dir(dir.path().join("src")).unwrap();
    fs::write(dir.path().join("src/file"), "host\n").unwrap();
    dir
}

/// `HOST:GUEST[:OPTIONS]`, HOST being in `dir`.
fn volume(dir: &TempDir, rest: &str) -> String {
    format!("{}/{rest}", dir.path().display())
}

/// Runs a shell's commands in the shared directory on the host.
#[track_caller]
fn on_host(dir: &TempDir, script: &str) {
    host::run_in(&dir.path().join("src"), script);
}

fn read(dir: &TempDir, path: &str) -> String {
    fs::read_to_string(dir.path().join(path)).unwrap_or_default()
}

#[test]
fn files_go_both_ways_with_their_modes_and_owners() {
    let dir = set_up();
    fs::create_dir(dir.path().join("other")).unwrap();
    fs::set_permissions(dir.path().join("src/file"), Permissions::from_mode(0o640)).unwrap();
    let script = "set -e; cat /project/file; stat -c '%u:%g %a' /project/file
        echo guest > /project/new; chmod 751 /project/new; mkdir -p /project/a/b; ln -s file /project/link
        cat /project/link; chown 7:8 /project/new; stat -c '%u:%g' /project/new
        dd if=/dev/zero of=/project/large bs=1M count=5 2>/dev/null
        (echo no > /frozen/new) 2>&1 | grep -o 'Read-only file system'; cat /frozen/file
        cat /etc/deep/single; echo more >> /etc/deep/single
        until grep more /frozen/file; do sleep 0.1; done
        echo made > /made/above/it/here; mv /project/a/b /project/moved; ls /project";
    let output = Guest::new()
        .option("-v", volume(&dir, "src:/project"))
        .option("-v", volume(&dir, "src:/frozen:ro"))
        .option("-v", volume(&dir, "src/file:/etc/deep/single"))
        .option("--volume", volume(&dir, "other:/made/above/it"))
        .run(script);
    output.expect_code(0).expect_stdout(
        "host\n0:0 640\nhost\n7:8\nRead-only file system\nhost\nhost\nmore\n\
         a\nfile\nlarge\nlink\nmoved\nnew\n",
    );
    assert_eq!(read(&dir, "src/file"), "host\nmore\n");
    assert_eq!(read(&dir, "src/new"), "guest\n");
    assert_eq!(read(&dir, "other/here"), "made\n");
    assert!(dir.path().join("src/moved").is_dir());
    assert_eq!(
        fs::metadata(dir.path().join("src/large")).unwrap().len(),
        5 << 20
    );
    let made = fs::metadata(dir.path().join("src/new")).unwrap();
    assert_eq!(made.mode() & 0o7777, 0o751);
    let me = rustix::process::getuid().as_raw();
    assert_eq!(
        (made.uid(), made.gid()),
        (me, rustix::process::getgid().as_raw())
    );
    let link = fs::read_link(dir.path().join("src/link")).unwrap();
    assert_eq!(link, Path::new("file"));
}

#[test]
fn the_user_of_the_command_is_the_one_who_shares() {
    let dir = set_up();
    let script = "set -e; id -u; echo mine > /project/new; stat -c '%u:%g' /project /project/file /project/new
        stat -c '%u:%g' /as/file";
    Guest::new()
        .option("-u", "1000:100")
        .option("-v", volume(&dir, "src:/project"))
        .option("-v", volume(&dir, "src:/as:uid=5,gid=6"))
        .run(script)
        .expect_code(0)
        .expect_stdout("1000\n1000:100\n1000:100\n1000:100\n5:6\n");
    let made = fs::metadata(dir.path().join("src/new")).unwrap();
    assert_eq!(made.uid(), rustix::process::getuid().as_raw());
    Guest::new()
        .option("-u", "nosuchuser")
        .option("-v", volume(&dir, "src:/project"))
        .run("true")
        .expect_code(125)
        .expect_in_stderr("there is no user \"nosuchuser\" in the machine");
}

/// What `mvm mount ls` lists: host, guest and whether it is read-only.
fn listed(machine: &Machine<'_>) -> Vec<(String, String, bool)> {
    let output = machine.mvm("mount ls", &["--format", "json"]);
    output.expect_code(0);
    let list: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let text = |mount: &Value, key: &str| mount[key].as_str().unwrap_or_default().to_owned();
    let list = list.as_array().expect("an array").iter();
    list.map(|mount| {
        let read_only = mount["read_only"].as_bool().expect("a boolean");
        (text(mount, "host"), text(mount, "guest"), read_only)
    })
    .collect()
}

#[test]
fn folders_come_and_go_and_come_back_with_the_machine() {
    let dir = set_up();
    let machines = Machines::new();
    let machine = machines.idle(Guest::new().option("-v", volume(&dir, "src:/project")));
    let src = volume(&dir, "src");
    assert_eq!(
        listed(&machine),
        [(src.clone(), "/project".to_owned(), false)]
    );

    // Relative to where the words are typed.
    let mut add = machine.command("mount add", &["src:/added/to/it:ro", "src/file:/single:ro"]);
    add.current_dir(dir.path());
    Running::start(add, Vec::new())
        .wait()
        .expect_code(0)
        .expect_stdout("");
    machine
        .exec("cat /added/to/it/file /single; touch /added/to/it/x 2>&1 | grep -o Read-only; true")
        .expect_stdout("host\nhost\nRead-only\n");
    let told = machine.inspect();
    assert_eq!(
        told["machine"]["mounts"].as_array().map(Vec::len),
        Some(3),
        "{told}"
    );
    machine
        .mvm("inspect", &[])
        .expect_in_stdout(&format!("{src} -> /added/to/it (read-only)"));
    let table = machine.mvm("mount ls", &[]);
    table
        .expect_code(0)
        .expect_in_stdout("/added/to/it")
        .expect_in_stdout("0:0");

    let taken = machine.mvm("mount add", &[&format!("{src}:/project")]);
    taken
        .expect_code(125)
        .expect_in_stderr("a folder is shared at /project in the guest already");
    let hidden = machine.mvm("mount add", &[&format!("{src}:/added")]);
    hidden
        .expect_code(125)
        .expect_in_stderr("hides the one at /added/to/it");
    let missing = machine.mvm("mount add", &[&format!("{src}/none:/none")]);
    missing
        .expect_code(125)
        .expect_in_stderr("none cannot be shared: No such file");
    let gone = machine.mvm("mount rm", &["/nothing"]);
    gone.expect_code(125)
        .expect_in_stderr("no folder is shared at /nothing in the guest");

    let user = machine.start(&["sh", "-c", "cd /project; echo in; exec sleep 1000"]);
    user.expect_stdout("in\n");
    let busy = machine.mvm("mount rm", &["/project"]);
    busy.expect_code(125)
        .expect_in_stderr("/project in the guest stays");
    machine.exec("cat /project/file").expect_stdout("host\n");
    machine.mvm("mount rm", &["-f", "/project"]).expect_code(0);
    machine.exec("ls /project").expect_code(0).expect_stdout("");
    drop(user);
    machine.mvm("mount rm", &["/single"]).expect_code(0);

    machine.mvm("restart", &["-t", "1"]).expect_code(0);
    assert_eq!(listed(&machine), [(src, "/added/to/it".to_owned(), true)]);
    machine
        .exec("cat /added/to/it/file")
        .expect_code(0)
        .expect_stdout("host\n");
}

#[test]
fn changes_on_the_host_are_seen_and_heard_in_the_guest() {
    let dir = set_up();
    on_host(&dir, "mkdir -p sub/deep; echo old > sub/known");
    let machines = Machines::new();
    let machine = machines.idle(Guest::new().option("-v", volume(&dir, "src:/project")));
    machine.plant_peer();
    machine
        .exec("cat /project/file /project/sub/known; ls /project/new 2>/dev/null; ls /project")
        .expect_stdout("host\nold\nfile\nsub\n");
    let watching = machine.start(&[
        "/tmp/peer",
        "inotify",
        "/project",
        "/project/sub",
        "/project/sub/deep",
    ]);
    watching.expect_stdout("listening\n");

    on_host(&dir, "echo other > file");
    watching.expect_stdout("MODIFY /project/file\n");
    watching.expect_stdout("CLOSE_WRITE /project/file\n");
    machine.exec("cat /project/file").expect_stdout("other\n");
    on_host(&dir, "echo new > sub/new");
    watching.expect_stdout("CREATE /project/sub/new\n");
    watching.expect_stdout("CLOSE_WRITE /project/sub/new\n");
    machine.exec("cat /project/sub/new").expect_stdout("new\n");
    on_host(&dir, "mv sub/new sub/deep/moved");
    watching.expect_stdout("MOVED_FROM /project/sub/new #0\n");
    watching.expect_stdout("MOVED_TO /project/sub/deep/moved #0\n");
    machine
        .exec("ls /project/sub /project/sub/deep")
        .expect_stdout("/project/sub:\ndeep\nknown\n\n/project/sub/deep:\nmoved\n");
    on_host(&dir, "chmod 700 sub/known");
    watching.expect_stdout("ATTRIB /project/sub/known\n");
    machine
        .exec("stat -c %a /project/sub/known")
        .expect_stdout("700\n");
    on_host(&dir, "rm sub/deep/moved; mkdir sub/dir; rmdir sub/dir");
    watching.expect_stdout("DELETE /project/sub/deep/moved\n");
    watching.expect_stdout("CREATE /project/sub/dir\n");
    watching.expect_stdout("DELETE /project/sub/dir\n");
    machine.exec("ls /project/sub/deep").expect_stdout("");

    // The guest's own changes are heard once, and the host has what the guest did.
    machine.exec("echo guest > /project/own").expect_code(0);
    watching.expect_stdout("CREATE /project/own\n");
    watching.expect_stdout("CLOSE_WRITE /project/own\n");
    on_host(&dir, "echo end > end");
    watching.expect_stdout("CREATE /project/end\n");
    watching.signal(Signal::TERM);
    let heard = watching.wait().text();
    assert_eq!(heard.matches("CREATE /project/own\n").count(), 1, "{heard}");
    assert_eq!(read(&dir, "src/own"), "guest\n");
    on_host(
        &dir,
        "for n in 1 2 3 4 5 6 7 8; do for m in 1 2 3 4 5 6 7 8; do echo $n > burst$n$m; done; done",
    );
    eventually("all of a burst is seen", || {
        let counted = machine.exec("cat /project/burst* | wc -l");
        (counted.text() == "64\n").then_some(())
    });
}

#[test]
fn changes_of_a_single_file_are_seen_and_heard_in_the_guest() {
    let dir = set_up();
    let machines = Machines::new();
    let machine = machines.idle(Guest::new().option("-v", volume(&dir, "src/file:/etc/single")));
    machine.plant_peer();
    machine.exec("cat /etc/single").expect_stdout("host\n");
    let watching = machine.start(&["/tmp/peer", "inotify", "/etc/single"]);
    watching.expect_stdout("listening\n");

    on_host(&dir, "echo other > file");
    watching.expect_stdout("MODIFY /etc/single\n");
    watching.expect_stdout("CLOSE_WRITE /etc/single\n");
    machine.exec("cat /etc/single").expect_stdout("other\n");
    on_host(&dir, "chmod 604 file");
    watching.expect_stdout("ATTRIB /etc/single\n");
    machine
        .exec("stat -c %a /etc/single")
        .expect_stdout("604\n");
    // The guest goes on with the one that it has.
    on_host(&dir, "echo new > new; mv new file");
    watching.expect_stdout("ATTRIB /etc/single\n");
    machine
        .exec("cat /etc/single; stat -c %h /etc/single; echo guest >> /etc/single; cat /etc/single")
        .expect_stdout("other\n0\nother\nguest\n");
    assert_eq!(read(&dir, "src/file"), "new\n");
    watching.signal(Signal::TERM);
}

#[test]
fn a_shell_opens_where_the_guest_has_the_callers_directory() {
    let dir = set_up();
    on_host(&dir, "mkdir -p a/b");
    let machines = Machines::new();
    let machine = machines.idle(Guest::new().option("-v", volume(&dir, "src:/project")));
    let mut shell = machine.command("shell", &[]);
    shell.current_dir(dir.path().join("src/a/b"));
    Running::start(shell, b"pwd\n".to_vec())
        .wait()
        .expect_code(0)
        .expect_stdout("/project/a/b\n");
}

#[test]
fn what_cannot_be_shared_is_told_before_a_machine_is_made() {
    let dir = set_up();
    let run = |volumes: &[&str]| {
        let mut words = vec!["run"];
        volumes
            .iter()
            .for_each(|volume| words.extend(["-v", volume]));
        words.extend(["--", "true"]);
        host::run_mvm(&words)
    };
    for (text, why) in [
        ("", "boot messages are shown by --verbose"),
        ("/src", "such as .:/work"),
        ("/src:work", "\"work\" is not an absolute path"),
        (
            "/src:/project:rx",
            "\"rx\" is not an option of a folder: ro, rw, uid=N,",
        ),
        ("/src:/project:uid=me", "\"me\" is not the number"),
        ("/src:/", "it is the machine's root"),
        (":/project", "the path on the host is missing"),
    ] {
        run(&[text]).expect_code(2).expect_in_stderr(why);
    }
    host::run_mvm(&["run", "-v", "--", "true"])
        .expect_code(2)
        .expect_in_stderr("boot messages are shown by --verbose");
    let missing = run(&[&volume(&dir, "none:/project")]);
    missing
        .expect_code(125)
        .expect_in_stderr("none cannot be shared: No such file");
    let src = volume(&dir, "src");
    let twice = run(&[&format!("{src}:/project"), &format!("{src}/file:/project/")]);
    twice
        .expect_code(125)
        .expect_in_stderr("a folder is shared at /project in the guest already");
}
