//! Kernels as they come: packaged by the distribution, built here, added by the user.

use std::fs;
use std::path::Path;
use std::process::Command;

use tests::image::{self, Filesystem};
use tests::{Guest, Output, Running, host, kernel};

/// The issue's own example: the guest's file, and its exit code.
fn prints_os_release_and_exits_7(kernel: &Path, test: &str) {
    let Some(image) = image::debian(Filesystem::Ext4, test) else {
        return;
    };
    let output = Guest::new()
        .kernel(kernel)
        .rootfs_read_only(&image)
        .run("cat /etc/os-release; exit 7");
    output.expect_code(7).expect_stderr("");
    output
        .expect_in_stdout("PRETTY_NAME=\"Debian GNU/Linux")
        .expect_in_stdout("\nID=debian\n");
}

#[test]
fn the_packaged_6_1_cloud_kernel_boots_debian() {
    const TEST: &str = "the_packaged_6_1_cloud_kernel_boots_debian";
    if let Some(vmlinuz) = kernel::packaged("6.1", TEST) {
        prints_os_release_and_exits_7(&vmlinuz, TEST);
    }
}

#[test]
fn the_packaged_6_12_cloud_kernel_boots_debian() {
    const TEST: &str = "the_packaged_6_12_cloud_kernel_boots_debian";
    if let Some(vmlinuz) = kernel::packaged("6.12", TEST) {
        prints_os_release_and_exits_7(&vmlinuz, TEST);
    }
}

#[test]
fn the_built_kernel_boots_debian() {
    const TEST: &str = "the_built_kernel_boots_debian";
    if let Some(name) = kernel::built(TEST) {
        prints_os_release_and_exits_7(Path::new(&name), TEST);
    }
}

#[test]
fn the_packaged_kernels_load_what_each_filesystem_needs() {
    const TEST: &str = "the_packaged_kernels_load_what_each_filesystem_needs";
    for series in ["6.1", "6.12"] {
        let Some(vmlinuz) = kernel::packaged(series, TEST) else {
            continue;
        };
        for filesystem in [Filesystem::Squashfs, Filesystem::Erofs] {
            let image = image::small(filesystem);
            let output = Guest::new().kernel(&vmlinuz).rootfs(&image).run("uname -r");
            output
                .expect_code(0)
                .expect_in_stdout(&format!("{series}."));
        }
    }
}

#[test]
fn a_built_kernel_is_listed_first_and_fit_for_all_purposes() {
    const TEST: &str = "a_built_kernel_is_listed_first_and_fit_for_all_purposes";
    let Some(name) = kernel::built(TEST) else {
        return;
    };
    let kernels = host::mvm_json(&["kernel", "ls", "--format", "json"]);
    assert_eq!(
        kernels[0]["name"],
        name.as_str(),
        "the kernel that is listed first"
    );
    let file = kernel::cache_dir().join(&name).join("vmlinux");
    let file = file.to_str().unwrap();
    let words = [
        "kernel", "check", file, "--for", "boot", "--for", "share", "--for", "docker",
    ];
    host::run_mvm(&words).expect_code(0);
}

#[test]
fn a_check_names_what_a_kernel_lacks() {
    let Some(vmlinuz) = kernel::packaged("6.1", "a_check_names_what_a_kernel_lacks") else {
        return;
    };
    let vmlinuz = vmlinuz.to_str().unwrap();
    host::run_mvm(&["kernel", "check", vmlinuz, "--for", "boot"]).expect_code(0);
    let lacks = host::mvm_json(&[
        "kernel", "check", vmlinuz, "--for", "boot", "--format", "json",
    ]);
    assert!(lacks.is_array(), "what is lacking is a list: {lacks}");
}

/// `mvm kernel` with a cache of its own.
fn in_cache(cache: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(host::mvm());
    command.arg("kernel").args(words);
    command
        .env("XDG_CACHE_HOME", cache)
        .env("XDG_CONFIG_HOME", cache);
    Running::start(command, Vec::new()).wait()
}

#[test]
fn a_kernel_of_ones_own_is_added_listed_and_removed() {
    let Some(vmlinuz) = kernel::packaged("6.1", "a_kernel_of_ones_own_is_added_listed_and_removed")
    else {
        return;
    };
    let cache = tempfile::tempdir().unwrap();
    let added = in_cache(cache.path(), &["add", vmlinuz.to_str().unwrap()]);
    added.expect_code(0);
    let name = added.text().trim().to_owned();
    in_cache(cache.path(), &["ls"])
        .expect_code(0)
        .expect_in_stdout(&name);
    in_cache(cache.path(), &["rm", &name]).expect_code(0);
    let list = in_cache(cache.path(), &["ls"]);
    assert!(
        !list.text().contains(&name),
        "a removed kernel is still listed: {list}"
    );
    in_cache(cache.path(), &["rm", &name])
        .expect_code(125)
        .expect_in_stderr(&name);
}

#[test]
fn what_is_no_kernel_is_not_added() {
    let cache = tempfile::tempdir().unwrap();
    let file = cache.path().join("text");
    fs::write(&file, "no kernel").unwrap();
    let output = in_cache(cache.path(), &["add", file.to_str().unwrap()]);
    output
        .expect_code(125)
        .expect_stdout("")
        .expect_in_stderr("kernel");
    let list = in_cache(cache.path(), &["ls", "--format", "json"]);
    assert!(
        !list.text().contains("added"),
        "something was added after all: {list}"
    );
}
