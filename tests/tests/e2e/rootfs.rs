//! Root filesystems from disk images: every filesystem, whole disks and partitions, kept or changed.

use tests::Guest;
use tests::image::{self, Filesystem, Table, sha256};

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
    for (option, value) in [("--init", "/bin/init"), ("--rootfs", "/nowhere/at/all")] {
        let output = Guest::new()
            .rootfs(tree.path())
            .option(option, value)
            .run("true");
        output
            .expect_code(125)
            .expect_stdout("")
            .expect_nothing_left();
    }
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
