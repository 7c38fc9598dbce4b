//! Wrong input of every kind: one clear sentence, an exit code, and nothing left behind.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tests::image::{self, Filesystem};
use tests::{Guest, Output, host, kernel};

/// The machine must be refused with this code and one sentence that has `text` in it.
#[track_caller]
fn expect_refused(output: &Output, text: &str) {
    output
        .expect_code(125)
        .expect_stdout("")
        .expect_in_stderr(text)
        .expect_in_stderr("mvm: ");
    let errors = output.errors();
    let lines = errors
        .lines()
        .filter(|line| !line.contains("(starting it once)"))
        .count();
    assert_eq!(lines, 1, "one sentence is wanted: {output}");
}

fn file(dir: &TempDir, name: &str, content: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

fn sparse(dir: &TempDir, name: &str, len: u64) -> PathBuf {
    let path = dir.path().join(name);
    File::create(&path).unwrap().set_len(len).unwrap();
    path
}

/// The kernel that machines boot by default.
fn default_vmlinux() -> PathBuf {
    image::busybox();
    let kernels = host::mvm_json(&["kernel", "ls", "--format", "json"]);
    let name = kernels[0]["name"].as_str().expect("there is a kernel");
    kernel::cache_dir().join(name).join("vmlinux")
}

#[test]
fn a_kernel_that_is_none_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let vmlinux = fs::read(default_vmlinux()).unwrap();
    let mut foreign = vmlinux.clone();
    // e_machine of the ELF header: EM_AARCH64.
    foreign[18..20].copy_from_slice(&183u16.to_le_bytes());
    for (kernel, text) in [
        (dir.path().join("missing"), "missing"),
        (dir.path().to_owned(), "kernel"),
        (file(&dir, "empty", b""), "empty"),
        (file(&dir, "text", b"this is no kernel\n"), "not a kernel"),
        (file(&dir, "script", b"#!/bin/sh\nexit 0\n"), "not a kernel"),
        (
            file(&dir, "truncated", &vmlinux[..vmlinux.len() / 2]),
            "truncated",
        ),
        (file(&dir, "header", &vmlinux[..100]), "truncated"),
        (file(&dir, "foreign", &foreign), "aarch64"),
    ] {
        let output = Guest::new().kernel(&kernel).run("true");
        output.expect_code(125);
        expect_refused(&output, text);
    }
}

#[test]
fn a_truncated_bzimage_is_refused() {
    let Some(vmlinuz) = kernel::packaged("6.1", "a_truncated_bzimage_is_refused") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let content = fs::read(vmlinuz).unwrap();
    for len in [700, content.len() / 2] {
        let output = Guest::new()
            .kernel(file(&dir, "vmlinuz", &content[..len]))
            .run("true");
        expect_refused(&output, "truncated");
    }
}

#[test]
fn an_initramfs_that_is_missing_or_too_large_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let output = Guest::new()
        .option("--initrd", dir.path().join("missing"))
        .boot();
    expect_refused(&output, "missing");
    let large = sparse(&dir, "large", 300 << 20);
    let output = Guest::new().memory("128M").option("--initrd", large).boot();
    expect_refused(&output, "does not fit");
}

#[test]
fn a_root_that_is_none_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut qcow2 = b"QFI\xfb\0\0\0\x03".to_vec();
    qcow2.resize(1 << 20, 0);
    let mut xfs = b"XFSB".to_vec();
    xfs.resize(1 << 20, 0);
    let garbage = fs::read(image::random(dir.path(), 1 << 20)).unwrap();
    let ext4 = fs::read(image::small(Filesystem::Ext4)).unwrap();
    let mut corrupt = ext4.clone();
    // The number of blocks, in the superblock.
    corrupt[1024 + 4..1024 + 8].fill(0xff);
    for (root, text) in [
        (dir.path().join("missing"), "does not exist"),
        (file(&dir, "empty", b""), "empty"),
        (sparse(&dir, "blank", 1 << 20), "blank"),
        (file(&dir, "garbage", &garbage), "filesystem"),
        (file(&dir, "qcow2", &qcow2), "qcow2"),
        (file(&dir, "xfs", &xfs), "xfs"),
        (file(&dir, "corrupt", &corrupt), "corrupt"),
        (
            file(&dir, "truncated", &ext4[..ext4.len() / 2]),
            "truncated",
        ),
    ] {
        expect_refused(&Guest::new().rootfs(&root).run("true"), text);
    }
}

#[test]
fn a_root_that_is_corrupt_inside_is_told_by_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let image = image::copy(&image::small(Filesystem::Ext4), dir.path());
    let file = File::options().write(true).open(&image).unwrap();
    // Behind the superblock, which is fine: the group descriptors, bitmaps and inodes.
    file.write_all_at(&vec![0xa5; 4 << 20], 4096).unwrap();
    let output = Guest::new().rootfs(&image).run("true");
    output
        .expect_code(125)
        .expect_stdout("")
        .expect_in_stderr("ext4")
        .expect_nothing_left();
}

#[test]
fn a_root_without_permission_is_refused() {
    if host::is_root() {
        host::skipped(
            "a_root_without_permission_is_refused",
            "root may read everything",
        );
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = image::copy(&image::small(Filesystem::Ext4), dir.path());
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o000);
    fs::set_permissions(&image, mode).unwrap();
    expect_refused(&Guest::new().rootfs(&image).run("true"), "no permission");
}

#[test]
fn a_size_that_is_none_is_a_usage_error() {
    for (option, value) in [
        ("--memory", "0"),
        ("--memory", "0M"),
        ("--memory", "1M"),
        ("--memory", "12X"),
        ("--memory", "512"),
        ("--memory", "-1G"),
        ("--memory", "99999999999T"),
        ("--cpus", "0"),
        ("--cpus", "256"),
        ("--cpus", "5000"),
        ("--cpus", "two"),
    ] {
        let word = format!("{option}={value}");
        let output = host::run_mvm(&["run", &word, "--", "true"]);
        output
            .expect_code(2)
            .expect_stdout("")
            .expect_in_stderr(option);
    }
}

#[test]
fn more_memory_than_the_host_has_is_refused() {
    expect_refused(&Guest::new().memory("900T").run("true"), "memory");
    expect_refused(&Guest::new().memory("4T").run("true"), "memory");
}

#[test]
fn a_command_line_that_is_too_long_is_refused() {
    let output = Guest::new().append(&"x".repeat(5000)).run("true");
    expect_refused(&output, "command line");
}

#[test]
fn two_machines_with_one_name_are_one_too_many() {
    let named = || Guest::new().option("--name", "e2e-only-one");
    let first = named().start(&["sh", "-c", "echo up; exec sleep 1000"]);
    first.expect_stdout("up");
    let second = named().run("true");
    expect_refused(&second, "e2e-only-one");
    first.signal(rustix::process::Signal::TERM);
    first.wait().expect_code(143).expect_nothing_left();
    named().run("true").expect_code(0);
}

#[test]
fn disks_and_interfaces_that_are_not_there_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    expect_refused(
        &Guest::new().disk(Path::new("/no/such/disk")).run("true"),
        "does not exist",
    );
    expect_refused(
        &Guest::new().disk(&file(&dir, "empty", b"")).run("true"),
        "empty",
    );
    expect_refused(&Guest::new().disk(dir.path()).run("true"), "directory");
    let output = Guest::new().option("--net", "tap=no-such-tap").run("true");
    expect_refused(&output, "no-such-tap");
}

#[test]
fn a_directory_that_the_guest_lacks_is_told() {
    let output = Guest::new().option("-w", "/no/such/directory").run("true");
    output
        .expect_stdout("")
        .expect_in_stderr("/no/such/directory");
    assert!(
        matches!(output.code(), 125..=127),
        "the exit code of {output}"
    );
}

#[test]
fn a_refused_machine_leaves_nothing() {
    let output = Guest::new().rootfs(Path::new("/no/such/image")).run("true");
    output.expect_code(125).expect_nothing_left();
}
