//! Root filesystems from disk images: every filesystem, whole disks and partitions, kept or changed.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tests::image::{self, Filesystem, Table, sha256};
use tests::{Guest, Machines};

const FILESYSTEMS: [Filesystem; 3] = [Filesystem::Ext4, Filesystem::Squashfs, Filesystem::Erofs];

#[test]
fn every_filesystem_is_a_root_that_can_be_written_and_stays_as_it_is() {
    for filesystem in FILESYSTEMS {
        let image = image::small(filesystem);
        let before = sha256(&image);
        let output = Guest::new().rootfs_read_only(&image).run(
            "grep -c alice /etc/passwd; echo new >/root/file && rm /etc/group && cat /root/file",
        );
        output
            .expect_code(0)
            .expect_stdout("1\nnew\n")
            .expect_stderr("");
        assert_eq!(
            sha256(&image),
            before,
            "the {} image after :ro",
            filesystem.name()
        );
    }
}

#[test]
fn filesystems_without_a_writable_form_need_no_ro() {
    for filesystem in [Filesystem::Squashfs, Filesystem::Erofs] {
        let image = image::small(filesystem);
        let before = sha256(&image);
        let output = Guest::new()
            .rootfs(&image)
            .run("echo new >/etc/passwd && cat /etc/passwd");
        output.expect_code(0).expect_stdout("new\n");
        assert_eq!(sha256(&image), before, "the {} image", filesystem.name());
    }
}

#[test]
fn the_first_linux_partition_is_the_root() {
    for table in [Table::Gpt, Table::Mbr] {
        let image = image::partitioned(table, Filesystem::Ext4);
        let output = Guest::new()
            .rootfs_read_only(&image)
            .run("grep -c alice /etc/passwd; cat /sys/block/vda/vda2/partition");
        output.expect_code(0).expect_stdout("1\n2\n");
    }
    let image = image::partitioned(Table::Gpt, Filesystem::Squashfs);
    let output = Guest::new().rootfs(&image).run("grep -c alice /etc/passwd");
    output.expect_code(0).expect_stdout("1\n");
}

#[test]
fn what_is_written_to_a_root_is_there_in_the_next_machine() {
    let dir = tempfile::tempdir().unwrap();
    let image = image::copy(&image::small(Filesystem::Ext4), dir.path());
    let output = Guest::new().rootfs(&image).run("echo kept >/root/file");
    output
        .expect_code(0)
        .expect_stdout("")
        .expect_stderr("")
        .expect_nothing_left();
    let output = Guest::new()
        .rootfs(&image)
        .run("cat /root/file; mount | grep ' / ' | cut -d' ' -f5");
    output.expect_code(0).expect_stdout("kept\next4\n");
}

#[test]
fn an_image_in_use_is_refused_to_a_second_machine() {
    let dir = tempfile::tempdir().unwrap();
    let image = image::copy(&image::small(Filesystem::Ext4), dir.path());
    let first = Guest::new()
        .rootfs(&image)
        .start(&["sh", "-c", "echo up; exec sleep 1000"]);
    first.expect_stdout("up");
    for second in [
        Guest::new().rootfs(&image),
        Guest::new().rootfs_read_only(&image),
        Guest::new().disk(&image),
    ] {
        let output = second.run("true");
        output
            .expect_code(125)
            .expect_stdout("")
            .expect_in_stderr("in use by another machine");
        output.expect_nothing_left();
    }
    first.signal(rustix::process::Signal::TERM);
    first.wait().expect_code(143);
    Guest::new()
        .rootfs_read_only(&image)
        .run("true")
        .expect_code(0);
}

#[test]
fn machines_share_an_image_that_both_only_read() {
    let image = image::small(Filesystem::Erofs);
    let first = Guest::new()
        .rootfs(&image)
        .start(&["sh", "-c", "echo up; exec sleep 1000"]);
    first.expect_stdout("up");
    Guest::new().rootfs(&image).run("true").expect_code(0);
}

#[test]
fn a_directory_is_a_root_that_can_be_written_and_stays_as_it_is() {
    let tree = image::small_tree();
    let output = Guest::new().rootfs(tree.path()).run(
        "grep -c alice /etc/passwd; echo new >/root/file && rm /etc/group && cat /root/file
         mount | grep ' / ' | cut -d' ' -f5; stat -c %u /bin/busybox",
    );
    output
        .expect_code(0)
        .expect_stdout("1\nnew\noverlay\n0\n")
        .expect_nothing_left();
    assert!(!tree.path().join("root/file").exists());
    assert!(tree.path().join("etc/group").exists());
}

#[test]
fn what_is_written_to_a_directory_is_there_where_that_was_asked_for() {
    let tree = image::small_tree();
    let mut writable = tree.path().as_os_str().to_owned();
    writable.push(":rw");
    let output = Guest::new()
        .option("--rootfs", &writable)
        .run("echo kept >/root/file; chown 7:8 /root/file; rm /etc/group; cat /etc/passwd | wc -l");
    output.expect_code(0).expect_in_stderr("");
    assert!(!tree.path().join("etc/group").exists());
    let output = Guest::new()
        .option("--rootfs", &writable)
        .run("cat /root/file; stat -c %u:%g /root/file; id -un alice");
    output.expect_code(0).expect_stdout("kept\n7:8\nalice\n");
}

#[test]
fn a_directory_that_is_no_root_is_refused() {
    let tree = image::small_tree();
    let refused = |guest: Guest, why: &str| {
        let output = guest.run("true");
        output
            .expect_code(125)
            .expect_stdout("")
            .expect_in_stderr(why)
            .expect_nothing_left();
    };
    let root = || Guest::new().rootfs(tree.path());
    refused(
        root().option("--rootfs", "/nowhere/at/all"),
        "/nowhere/at/all",
    );
    refused(
        root().option("--init", "/nowhere/at/all"),
        "the root filesystem has no /nowhere/at/all to be its init",
    );
    refused(
        root().option("--init", "/etc/passwd"),
        "/etc/passwd cannot be executed as the root's init",
    );
    let empty = tempfile::tempdir().expect("a temporary directory can be made");
    let output = Guest::new().rootfs(empty.path()).run("true");
    output.expect_code(127).expect_stdout("");
}

#[test]
fn a_roots_own_init_can_be_the_first_process() {
    let image = image::small(Filesystem::Squashfs);
    let output = Guest::new()
        .rootfs(&image)
        .option("--init", "/bin/init")
        .run("cat /proc/1/comm; tr '\\0' ' ' </proc/1/cmdline");
    output
        .expect_code(0)
        .expect_in_stdout("init\n")
        .expect_nothing_left();
}

/// A directory that becomes the root as it is, or so that the guest changes it.
fn roots(tree: &Path) -> [OsString; 2] {
    let mut writable = tree.as_os_str().to_owned();
    writable.push(":rw");
    [tree.as_os_str().to_owned(), writable]
}

#[test]
fn a_directorys_own_init_can_be_the_first_process() {
    let tree = image::small_tree();
    for (root, filesystem) in roots(tree.path()).into_iter().zip(["overlay", "fuse.mvm"]) {
        let output = Guest::new()
            .option("--rootfs", root)
            .option("--init", "/bin/init")
            .run(
                "cat /proc/1/comm; mount | grep ' / ' | cut -d' ' -f5
                 echo kept >/root/file; cat /proc/1/root/root/file",
            );
        output
            .expect_code(0)
            .expect_stdout(&format!("init\n{filesystem}\nkept\n"))
            .expect_nothing_left();
    }
    assert!(tree.path().join("root/file").exists());
}

#[test]
fn a_directorys_own_init_ends_the_machine_from_within() {
    let tree = image::small_tree();
    for root in roots(tree.path()) {
        let machines = Machines::new();
        let guest = Guest::new()
            .option("--rootfs", root)
            .option("--init", "/bin/init");
        let machine = machines.run(guest, &[]);
        // It kills whatever runs on its way there, the agent too.
        machine.exec("poweroff");
        machine.mvm("wait", &[]).expect_stdout("0\n");
    }
}

#[test]
fn a_script_can_be_the_init_of_a_directory() {
    let tree = image::small_tree();
    let script = tree.path().join("bin/first");
    // It ends nothing when it is asked to.
    fs::write(
        &script,
        "#!/bin/sh\necho up >/run/up\nwhile :; do sleep 1; done\n",
    )
    .unwrap();
    fs::set_permissions(&script, Permissions::from_mode(0o755)).unwrap();
    for root in roots(tree.path()) {
        let machines = Machines::new();
        let guest = Guest::new()
            .option("--rootfs", root)
            .option("--init", "/bin/first");
        let machine = machines.idle(guest);
        machine
            .exec("until [ -e /run/up ]; do sleep 0.1; done; cat /proc/1/comm")
            .expect_stdout("first\n");
        machine.mvm("stop", &[]).expect_code(0);
        machine.expect_state("exited");
    }
}

#[test]
fn a_machine_that_has_lost_its_root_ends() {
    let tree = image::small_tree();
    let machines = Machines::new();
    let guest = Guest::new()
        .rootfs(tree.path())
        .option("--init", "/bin/init");
    let machine = machines.run(guest, &[]);
    // Only the agent has such a mark in front of its name.
    machine.exec("for p in /proc/[0-9]*; do grep -q '^@' $p/cmdline && kill -9 ${p#/proc/}; done");
    machine.mvm("wait", &[]).expect_stdout("125\n");
    machine
        .mvm("inspect", &[])
        .expect_in_stdout("the guest lost its root");
}
