//! What is worked on: trees of files, a crate, and an image that guests have as their root. Made once, where
//! `mmdebstrap` and git are, and kept below the target directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tests::host::{must_succeed, tool_command};
use tests::image::{self, Filesystem};

/// How much there is of everything, and by how much less it was asked for.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// What all is divided by.
    pub divisor: u64,
}

impl Size {
    /// Files of the tree that is looked at.
    pub fn tree(self) -> u64 {
        70_000 / self.divisor
    }

    /// Small files that are unpacked.
    pub fn small(self) -> u64 {
        40_000 / self.divisor
    }

    /// Bytes of the large file.
    pub fn large(self) -> u64 {
        (1024 / self.divisor) << 20
    }
}

/// The material in the file system.
#[derive(Debug)]
pub struct Material {
    /// The guests' root: an image with ext4, which has the rest in `/bench`.
    pub image: PathBuf,
    /// The tree as an archive.
    pub tree: PathBuf,
}

/// Makes it, unless it is there.
pub fn prepare(size: Size) -> Material {
    let dir = image::made(&format!("bench-folder.{}", size.divisor), |dir| {
        fs::create_dir_all(dir.join("bench")).expect("a directory can be made");
        pack_tree(&dir.join("bench"), size.tree());
        pack_small(&dir.join("bench"), size.small());
        write_crate(&dir.join("bench/crate"));
    });
    let image = image::made(&format!("bench-folder.{}.ext4", size.divisor), |image| {
        let debian = image::made("bench-folder.debian", install);
        let tree = tempfile::tempdir().expect("a temporary directory can be made");
        let root = tree.path().join("root");
        must_succeed(words("cp", &["-a".as_ref(), &debian, &root]));
        must_succeed(words("cp", &["-a".as_ref(), &dir.join("bench"), &root]));
        Filesystem::Ext4.pack(&root, image, "3G");
    });
    Material {
        image,
        tree: dir.join("bench/tree.tar"),
    }
}

fn words(program: &str, paths: &[&Path]) -> Command {
    let mut command = Command::new(program);
    command.args(paths);
    command
}

fn install(tree: &Path) {
    let mut command = tool_command("mmdebstrap", "mmdebstrap");
    command.args(["--quiet", "--variant=minbase", "--format=directory"]);
    command.arg("--include=git,cargo,gcc,libc6-dev");
    command.arg(image::debian_suite()).arg(tree);
    let process = tests::Running::start(command, Vec::new());
    process.wait_at_most(5 * tests::host::LIMIT).expect_code(0);
}

/// Text that is not the same in any two files, 200 to 2,200 bytes.
fn content(number: u64) -> String {
    let line = format!("file {number}, line after line\n");
    let lines = 1 + number.wrapping_mul(0x9e37_79b9) % 64;
    line.repeat(lines as usize)
}

/// `count` files below `dir`, `each` in a directory, with directories two levels deep.
fn plant(dir: &Path, count: u64, each: u64) {
    for number in 0..count {
        let at = number / each;
        let parent = dir.join(format!("part{}/dir{}", at / 10, at % 10));
        if number % each == 0 {
            fs::create_dir_all(&parent).expect("a directory can be made");
        }
        let file = parent.join(format!("file{number}.txt"));
        fs::write(file, content(number)).expect("a file can be written");
    }
}

fn archive(bench: &Path, name: &str) {
    let mut command = Command::new("tar");
    command
        .arg("cf")
        .arg(bench.join(format!("{name}.tar")))
        .arg("-C")
        .arg(bench)
        .arg(name);
    must_succeed(command);
    fs::remove_dir_all(bench.join(name)).expect("a directory can be removed");
}

/// A repository, whose index is right wherever it is unpacked.
fn pack_tree(bench: &Path, count: u64) {
    let tree = bench.join("tree");
    plant(&tree, count, 100);
    let git = |arguments: &[&str]| {
        let mut command = tool_command("git", "git");
        command.args(["-c", "user.name=bench", "-c", "user.email=bench@localhost"]);
        // Git would start one of its own beside the one that is asked for.
        command.args(["-c", "gc.auto=0"]);
        command.arg("-C").arg(&tree).args(arguments);
        must_succeed(command);
    };
    git(&["init", "--quiet", "--initial-branch=main"]);
    // Neither inode numbers nor times of change outlive an archive.
    git(&["config", "core.checkStat", "minimal"]);
    git(&["config", "core.trustctime", "false"]);
    git(&["add", "--all"]);
    git(&["commit", "--quiet", "--message=all"]);
    git(&["gc", "--quiet"]);
    archive(bench, "tree");
}

fn pack_small(bench: &Path, count: u64) {
    plant(&bench.join("small"), count, 20);
    archive(bench, "small");
}

/// A small crate without dependencies.
fn write_crate(dir: &Path) {
    fs::create_dir_all(dir.join("src")).expect("a directory can be made");
    let manifest = "[package]\nname = \"small\"\nversion = \"0.1.0\"\nedition = \"2021\"\n";
    fs::write(dir.join("Cargo.toml"), manifest).expect("a file can be written");
    let mut main = String::from("fn main() {\n    println!(\"{}\", f0(1));\n}\n");
    for number in 0..50 {
        let next = match number {
            49 => "x".to_owned(),
            _ => format!("f{}(x + 1)", number + 1),
        };
        main += &format!("fn f{number}(x: u64) -> u64 {{\n    {next}\n}}\n");
    }
    fs::write(dir.join("src/main.rs"), main).expect("a file can be written");
}
