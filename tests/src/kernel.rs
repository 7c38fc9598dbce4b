//! Kernels for the tests: as distributions package them, and the one that `mvm kernel build` made.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::host::{self, must_succeed, tool_command};
use crate::image;

/// Where mvm keeps kernels.
pub fn cache_dir() -> PathBuf {
    let base = env::var_os("XDG_CACHE_HOME").map_or_else(
        || PathBuf::from(env::var_os("HOME").expect("HOME is set")).join(".cache"),
        PathBuf::from,
    );
    base.join("mvm/kernels")
}

/// The name of the kernel that `mvm kernel build` made; None, said aloud, where it was not run.
pub fn built(test: &str) -> Option<String> {
    let name = find_built();
    if name.is_none() {
        host::skipped(test, "no kernel was built here: `mvm kernel build`");
    }
    name
}

fn find_built() -> Option<String> {
    let kernels = host::mvm_json(&["kernel", "ls", "--format", "json"]);
    let kernels = kernels
        .as_array()
        .expect("kernels are listed in an array")
        .clone();
    let built = kernels
        .into_iter()
        .find(|kernel| kernel["source"] == "built")?;
    Some(
        built["name"]
            .as_str()
            .expect("a kernel has a name")
            .to_owned(),
    )
}

/// The vmlinuz of the distribution's cloud kernel of `series` (`6.1`), with its modules where the
/// package has them; None, said aloud, where the distribution has no such package.
pub fn packaged(series: &str, test: &str) -> Option<PathBuf> {
    let Some(package) = newest_package(series) else {
        host::skipped(
            test,
            &format!("the distribution has no {series} cloud kernel"),
        );
        return None;
    };
    let tree = image::made(&package, |tree| {
        let download = tempfile::tempdir().expect("a temporary directory can be made");
        // apt-get as root fetches as a user of its own, who has to reach the directory.
        must_succeed({
            let mut command = Command::new("chmod");
            command.arg("755").arg(download.path());
            command
        });
        let mut command = tool_command("apt-get", "apt");
        command
            .args(["-q", "download", &package])
            .current_dir(download.path());
        must_succeed(command);
        let deb = fs::read_dir(download.path())
            .expect("a directory can be read")
            .find_map(|entry| Some(entry.ok()?.path()))
            .expect("apt-get has downloaded a package");
        let mut command = tool_command("dpkg-deb", "dpkg");
        command.arg("--extract").args([&deb, tree]);
        must_succeed(command);
    });
    let kernel = fs::read_dir(tree.join("boot"))
        .expect("a kernel's package has a /boot")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|file| {
            file.file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"vmlinuz-"))
        });
    Some(kernel.expect("a kernel's package has a vmlinuz"))
}

fn newest_package(series: &str) -> Option<String> {
    let pattern = format!(
        "^linux-image-{}\\.[^-]*(-[0-9]+)?-cloud-amd64$",
        series.replace('.', "\\.")
    );
    let mut command = tool_command("apt-cache", "apt");
    command.args(["search", "--names-only", &pattern]);
    let found = crate::Running::start(command, Vec::new()).wait();
    found.expect_code(0);
    let text = found.text();
    let names = text.lines().filter_map(|line| line.split(' ').next());
    names.max_by_key(|name| numbers(name)).map(str::to_owned)
}

/// The numbers in a package's name, which tell the newer one.
fn numbers(name: &str) -> Vec<u64> {
    let parts = name.split(|c: char| !c.is_ascii_digit());
    parts.filter_map(|part| part.parse().ok()).collect()
}
