//! Disk images, made on demand and once: a small busybox system and a Debian one, in every filesystem
//! that a root can have, whole and partitioned.
//!
//! They are kept below the target directory, so a second test run finds them. Tests that write take
//! a copy.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FlockOperation, flock};

use crate::guest::Guest;
use crate::host::{self, must_succeed, tool_command};

/// To be raised when a recipe changes, so that images of an older one are not found.
const RECIPES: u32 = 2;

/// What a Debian system has besides the base.
const DEBIAN_PACKAGES: &str =
    "--include=fio,less,openssh-client,openssh-server,procps,python3,socat,vim-tiny";

/// A filesystem that a root can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filesystem {
    /// Writable.
    Ext4,
    /// Read-only, compressed.
    Squashfs,
    /// Read-only.
    Erofs,
}

/// A kind of partition table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// GUID partition table.
    Gpt,
    /// Master boot record.
    Mbr,
}

impl Filesystem {
    /// Its name for mount(2).
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Squashfs => "squashfs",
            Self::Erofs => "erofs",
        }
    }

    /// Packs `tree` into the new file `image`.
    pub fn pack(self, tree: &Path, image: &Path, ext4_size: &str) {
        let mut command;
        match self {
            Self::Ext4 => {
                command = tool_command("mkfs.ext4", "e2fsprogs");
                command.args(["-q", "-F", "-E", "root_owner=0:0", "-d"]);
                command.args([tree, image]).arg(ext4_size);
            }
            Self::Squashfs => {
                command = tool_command("mksquashfs", "squashfs-tools");
                // gzip: the one compression that every kernel with squashfs can read.
                command
                    .args([tree, image])
                    .args(["-quiet", "-no-progress", "-comp", "gzip"]);
            }
            Self::Erofs => {
                command = tool_command("mkfs.erofs", "erofs-utils");
                command.args([image, tree]);
            }
        }
        must_succeed(command);
    }
}

/// A busybox system in a filesystem of its own.
pub fn small(filesystem: Filesystem) -> PathBuf {
    made(&format!("small.{}", filesystem.name()), |image| {
        let tree = tempfile::tempdir().expect("a temporary directory can be made");
        plant_busybox(tree.path());
        filesystem.pack(tree.path(), image, "64M");
    })
}

/// A busybox system in a directory.
pub fn small_tree() -> tempfile::TempDir {
    let tree = tempfile::tempdir().expect("a temporary directory can be made");
    plant_busybox(tree.path());
    tree
}

/// A Debian system with what tests run in it; None, said aloud, where `test` lacks the root it takes to make one.
pub fn debian(filesystem: Filesystem, test: &str) -> Option<PathBuf> {
    if !host::is_root() {
        host::skipped(test, "only root can unpack a Debian tree");
        return None;
    }
    let tree = made("debian", |tree| {
        let mut command = tool_command("mmdebstrap", "mmdebstrap");
        command.args([
            "--quiet",
            "--variant=minbase",
            DEBIAN_PACKAGES,
            "--format=directory",
        ]);
        command.arg(debian_suite()).arg(tree);
        // The network may be slow, and so may this machine.
        let process = crate::Running::start(command, Vec::new());
        process.wait_at_most(5 * host::LIMIT).expect_code(0);
    });
    Some(made(&format!("debian.{}", filesystem.name()), |image| {
        filesystem.pack(&tree, image, "1G");
    }))
}

/// An image whose first partition is for firmware, and whose second holds the small system.
pub fn partitioned(table: Table, filesystem: Filesystem) -> PathBuf {
    const MIB: u64 = 1 << 20;
    let (label, kinds) = match table {
        Table::Gpt => ("gpt", ["uefi", "linux"]),
        Table::Mbr => ("dos", ["ef", "83"]),
    };
    made(&format!("small.{}.{label}", filesystem.name()), |image| {
        let content = small(filesystem);
        let len = fs::metadata(&content).expect("the image is there").len();
        let disk = File::create(image).expect("an image can be made");
        disk.set_len(len + 8 * MIB)
            .expect("an image can be given a size");
        let layout = format!(
            "label: {label}\nstart=1MiB, size=1MiB, type={}\nstart=2MiB, size={}, type={}\n",
            kinds[0],
            len.div_ceil(512),
            kinds[1]
        );
        let mut command = tool_command("sfdisk", "fdisk");
        command
            .args(["--quiet", "--no-reread", "--no-tell-kernel"])
            .arg(image);
        crate::Running::start(command, layout.into_bytes())
            .wait()
            .expect_code(0);
        let mut command = Command::new("dd");
        command
            .arg(operand("if=", &content))
            .arg(operand("of=", image));
        command.args(["bs=1M", "seek=2", "conv=notrunc,sparse", "status=none"]);
        must_succeed(command);
    })
}

/// A copy of `image` in `dir`, to be written to.
pub fn copy(image: &Path, dir: &Path) -> PathBuf {
    let to = dir.join(image.file_name().expect("an image has a name"));
    let mut command = Command::new("cp");
    command.args(["--sparse=always", "--"]).args([image, &to]);
    must_succeed(command);
    to
}

/// An initramfs whose /init is the shell script `init`, with busybox beside it.
pub fn initramfs(dir: &Path, init: &str) -> PathBuf {
    let tree = dir.join("initramfs");
    plant_busybox(&tree);
    fs::write(tree.join("init"), format!("#!/bin/sh\n{init}")).expect("a file can be written");
    let mut command = Command::new("chmod");
    command.arg("755").arg(tree.join("init"));
    must_succeed(command);
    let image = dir.join("initramfs.cpio");
    let mut command = Command::new(tree.join("bin/busybox"));
    command.args([
        "sh",
        "-c",
        "cd \"$0\" && find . | \"$0/bin/busybox\" cpio -o -H newc >\"$1\"",
    ]);
    command.args([&tree, &image]);
    must_succeed(command);
    image
}

/// The digest of a file's content.
pub fn sha256(path: &Path) -> String {
    let mut command = tool_command("sha256sum", "coreutils");
    command.arg(path);
    let output = crate::Running::start(command, Vec::new()).wait();
    output.expect_code(0);
    let text = output.text();
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// A file of `len` random bytes in `dir`.
pub fn random(dir: &Path, len: u64) -> PathBuf {
    let path = dir.join("random");
    let mut source = std::io::Read::take(File::open("/dev/urandom").expect("there is chance"), len);
    let mut file = File::create(&path).expect("a file can be made");
    std::io::copy(&mut source, &mut file).expect("a file can be written");
    path
}

/// The static busybox that mvm's built-in root is made of.
pub fn busybox() -> PathBuf {
    let path = crate::kernel::cache_dir().join("busybox/busybox");
    if !path.is_file() {
        // The first machine with the built-in root fetches it.
        Guest::new().run("true").expect_code(0);
    }
    assert!(
        path.is_file(),
        "{} is not there after a machine has run",
        path.display()
    );
    path
}

fn plant_busybox(tree: &Path) {
    for dir in [
        "bin",
        "sbin",
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "etc",
        "root",
        "home/alice",
    ] {
        fs::create_dir_all(tree.join(dir)).expect("a directory can be made");
    }
    let program = tree.join("bin/busybox");
    fs::copy(busybox(), &program).expect("busybox can be copied");
    let mut command = Command::new(&program);
    command.arg("--list");
    let applets = crate::Running::start(command, Vec::new()).wait();
    applets.expect_code(0);
    for applet in applets.text().lines().filter(|name| *name != "busybox") {
        symlink("busybox", tree.join("bin").join(applet)).expect("a link can be made");
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n";
    let group = "root:x:0:\nalice:x:1000:\nstaff:x:50:alice\n";
    fs::write(tree.join("etc/passwd"), passwd).expect("a file can be written");
    fs::write(tree.join("etc/group"), group).expect("a file can be written");
}

/// The file or directory `name`, made by `recipe` where it is not there yet.
pub fn made(name: &str, recipe: impl FnOnce(&Path)) -> PathBuf {
    let dir = images_dir();
    let path = dir.join(name);
    if path.exists() {
        return path;
    }
    let lock = File::create(dir.join(format!("{name}.lock"))).expect("a lock can be made");
    flock(&lock, FlockOperation::LockExclusive).expect("a lock can be taken");
    if !path.exists() {
        let partial = dir.join(format!("{name}.partial"));
        // Of a run that was killed.
        let _ = fs::remove_file(&partial);
        let _ = fs::remove_dir_all(&partial);
        recipe(&partial);
        fs::rename(&partial, &path).expect("a finished image can be given its name");
    }
    path
}

fn images_dir() -> PathBuf {
    // target/triple/profile/[deps/]test
    let test = std::env::current_exe().expect("a test knows its own file");
    let mut dirs = test.ancestors().skip(1);
    let target = dirs
        .find(|dir| !dir.ends_with("deps"))
        .and_then(Path::parent)
        .expect("a test is below the target directory");
    let dir = target.join(format!("e2e-images-{RECIPES}"));
    fs::create_dir_all(&dir).expect("the directory of images can be made");
    dir
}

fn operand(name: &str, path: &Path) -> std::ffi::OsString {
    let mut word = std::ffi::OsString::from(name);
    word.push(path);
    word
}

/// The release of Debian that the host is of, or the newest one that the tests know.
pub fn debian_suite() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let value = |name| release.lines().find_map(|line| line.strip_prefix(name));
    match (value("ID="), value("VERSION_CODENAME=")) {
        (Some("debian"), Some(suite)) => suite.to_owned(),
        _ => "bookworm".to_owned(),
    }
}
