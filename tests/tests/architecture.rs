//! The rules of this repository: how large a file and a function may be, who may depend on whom,
//! where unsafe code and what depends on the processor may stand, and that documents name what
//! exists.
//!
//! An exception stands in a list here, with its reason, and fails once it is not needed.

#[path = "architecture/source.rs"]
mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use source::{root, sources, texts};

/// Lines of a file besides its tests.
const MAX_FILE_LINES: usize = 500;
/// Lines of a function, from its signature to its closing brace.
const MAX_FUNCTION_LINES: usize = 80;
/// Parameters of a function besides `self`.
const MAX_PARAMETERS: usize = 6;
/// Methods of a trait that devices implement.
const MAX_DEVICE_METHODS: usize = 8;

/// Files that may be longer: path, why.
const LONG_FILES: &[(&str, &str)] = &[];
/// Functions that may be longer or take more: path, name, why.
const LARGE_FUNCTIONS: &[(&str, &str, &str)] = &[];

/// The files that may hold unsafe code besides those of tests, by what they need it for.
const UNSAFE_FILES: &[(&str, &str)] = &[
    ("agent/src/clock.rs", "adjtimex"),
    ("agent/src/console.rs", "dup2 onto its own standard streams"),
    ("agent/src/entropy.rs", "an ioctl of the entropy pool"),
    ("agent/src/init.rs", "fork while there is one thread"),
    ("agent/src/loopback.rs", "ioctls of a network interface"),
    (
        "agent/src/main.rs",
        "mallopt before there is a second thread",
    ),
    ("agent/src/mount/device.rs", "an ioctl of /dev/fuse"),
    (
        "agent/src/mount/handle.rs",
        "system calls that no crate here has",
    ),
    (
        "agent/src/mount/call.rs",
        "a write to an I/O port, and memory that the host writes",
    ),
    (
        "agent/src/mount/pinned.rs",
        "memory that is pinned and named to the host",
    ),
    (
        "agent/src/mount/window.rs",
        "memory that is lent to the host",
    ),
    ("agent/src/power.rs", "signals to every process"),
    ("agent/src/priority.rs", "the scheduling of a thread"),
    ("agent/src/reap.rs", "fork"),
    ("agent/src/root/builtin.rs", "fork and exec"),
    ("agent/src/session.rs", "signals to a command's processes"),
    ("agent/src/signals.rs", "the signal mask and signalfd"),
    (
        "agent/src/socket_option.rs",
        "socket options that nobody has safe calls for",
    ),
    (
        "agent/src/spawn.rs",
        "what a child does between fork and exec",
    ),
    (
        "agent/src/terminal.rs",
        "a signal to a terminal's foreground group",
    ),
    (
        "devices/src/testing/rings.rs",
        "poll on an interrupt's eventfd",
    ),
    (
        "devices/src/vhost_user/vsock.rs",
        "an eventfd of a crate that knows no borrowed descriptors",
    ),
    (
        "devices/src/virtio/balloon/mod.rs",
        "guest memory given back to the host",
    ),
    (
        "devices/src/virtio/balloon/release.rs",
        "madvise and fallocate on guest memory",
    ),
    (
        "devices/src/virtio/block/engine/mod.rs",
        "I/O on guest memory that goes on after the call",
    ),
    (
        "devices/src/virtio/block/engine/pool.rs",
        "I/O on guest memory by another thread",
    ),
    (
        "devices/src/virtio/block/engine/uring.rs",
        "I/O on guest memory by the kernel",
    ),
    (
        "devices/src/virtio/block/inflight.rs",
        "keeps guest memory alive while I/O is in flight",
    ),
    ("devices/src/virtio/net/pair.rs", "writev from guest memory"),
    ("devices/src/virtio/net/rx.rs", "readv into guest memory"),
    ("devices/src/virtio/net/tap.rs", "ioctls of a TAP"),
    (
        "devices/src/virtio/queue.rs",
        "pointers to guest memory that move between threads",
    ),
    (
        "devices/src/virtio/vsock/linger.rs",
        "poll on descriptors that a map owns",
    ),
    (
        "devices/src/virtio/vsock/stream.rs",
        "sendmsg and recvmsg on guest memory",
    ),
    (
        "devices/src/virtio/vsock/uds.rs",
        "an eventfd of a crate that knows no borrowed descriptors",
    ),
    (
        "share/src/lock.rs",
        "locks of descriptions, which no crate here has with ranges",
    ),
    ("share/src/serve.rs", "a umask for one thread"),
    (
        "share/src/watch/fanotify.rs",
        "system calls that no crate here has",
    ),
    (
        "vmm/src/footprint.rs",
        "madvise of the pages of this program's own file",
    ),
    (
        "vmm/src/arch/x86_64/tsc.rs",
        "an instruction without a safe form",
    ),
    ("vmm/src/calls.rs", "getrusage of a thread"),
    ("vmm/src/memory.rs", "mmap and madvise of guest memory"),
    (
        "vmm/src/probe/guest.rs",
        "the probe guest's machine code, as the linker placed it",
    ),
    (
        "vmm/src/probe/host.rs",
        "system calls that show what the host permits",
    ),
    (
        "vmm/src/probe/kvm.rs",
        "the probe machine's memory and descriptor",
    ),
    ("vmm/src/reach.rs", "files read into guest memory"),
    (
        "vmm/src/vcpu.rs",
        "the flag in the page that a vCPU's thread shares with KVM",
    ),
    ("vmm/src/vm.rs", "memory handed to KVM"),
];

/// The files that may ask for the processor's architecture: path, why.
const ARCHITECTURE_FILES: &[(&str, &str)] = &[
    ("vmm/src/arch/mod.rs", "chooses the architecture's module"),
    (
        "vmm/src/probe/mod.rs",
        "its tiny guest is machine code, tried before there is any machine",
    ),
    (
        "vmm/src/probe/kvm.rs",
        "its tiny guest is machine code, tried before there is any machine",
    ),
    ("tests/tests/architecture.rs", "names what it looks for"),
];

/// What a crate of the workspace may depend on of the workspace, its tests included.
/// What only its tests need is in [`MAY_TEST_WITH`].
const MAY_DEPEND_ON: &[(&str, &[&str])] = &[
    ("agent", &[]),
    ("cli", &["agent", "devices", "kernels", "share", "vmm"]),
    ("devices", &[]),
    ("kernels", &[]),
    ("share", &[]),
    ("tests", &[]),
    ("vmm", &["devices"]),
];

/// What a crate's tests may depend on of the workspace besides.
const MAY_TEST_WITH: &[(&str, &str)] = &[("agent", "share")];

/// What only one crate may depend on: the dependency, the crate.
const ONLY_IN: &[(&str, &str)] = &[("kvm-ioctls", "vmm"), ("kvm-bindings", "vmm")];

/// Crates without unsafe code, which the compiler sees to.
const WITHOUT_UNSAFE: &[&str] = &["cli", "kernels"];

/// Names that say nothing about what is in a file.
const EMPTY_NAMES: &[&str] = &[
    "common", "helper", "helpers", "manager", "misc", "util", "utils",
];

/// Documents that there have to be.
const DOCUMENTS: &[&str] = &[
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "LICENSE",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
];

/// Fails with all that was found.
fn assert_none(found: Vec<String>, rule: &str) {
    assert!(found.is_empty(), "{rule}:\n  {}", found.join("\n  "));
}

#[test]
fn every_file_says_what_it_is_for() {
    let silent = |source: &source::Source| !source.text.starts_with("//! ");
    let found = sources().into_iter().filter(silent);
    assert_none(
        found.map(|source| format!("{}:1", source.path)).collect(),
        "these files do not begin with `//! ` and what they are for",
    );
}

#[test]
fn files_are_named_for_what_is_in_them() {
    let empty = |path: &str| {
        path.split('/')
            .any(|part| EMPTY_NAMES.contains(&part.trim_end_matches(".rs")))
    };
    let found = sources().into_iter().filter(|source| empty(&source.path));
    assert_none(
        found.map(|source| source.path).collect(),
        "these names say nothing about what is in the file",
    );
}

#[test]
fn files_are_short() {
    let mut found = Vec::new();
    let mut excepted: BTreeSet<_> = LONG_FILES.iter().map(|(path, _)| *path).collect();
    for source in sources().iter().filter(|source| !source.is_test()) {
        let lines = source.lines();
        if lines > MAX_FILE_LINES && !excepted.remove(source.path.as_str()) {
            found.push(format!(
                "{}:{MAX_FILE_LINES}: {lines} lines besides tests, and {MAX_FILE_LINES} are the limit",
                source.path
            ));
        }
    }
    found.extend(
        excepted
            .iter()
            .map(|path| format!("{path} needs no exception")),
    );
    assert_none(found, "split these files, or except them with a reason");
}

#[test]
fn functions_are_short_and_take_few_parameters() {
    let mut found = Vec::new();
    let mut excepted: BTreeSet<_> = LARGE_FUNCTIONS
        .iter()
        .map(|(path, name, _)| ((*path).to_owned(), (*name).to_owned()))
        .collect();
    for source in sources().iter().filter(|source| !source.is_test()) {
        for function in source.functions() {
            let too_long = function.lines > MAX_FUNCTION_LINES;
            let too_many = function.parameters > MAX_PARAMETERS;
            if !too_long && !too_many {
                continue;
            }
            if excepted.remove(&(source.path.clone(), function.name.clone())) {
                continue;
            }
            found.push(format!(
                "{}:{}: `{}` has {} lines (limit {MAX_FUNCTION_LINES}) and {} parameters (limit {MAX_PARAMETERS})",
                source.path, function.line, function.name, function.lines, function.parameters
            ));
        }
    }
    found.extend(
        excepted
            .iter()
            .map(|(path, name)| format!("{path}: `{name}` needs no exception")),
    );
    assert_none(found, "split these functions, or except them with a reason");
}

#[test]
fn a_device_is_a_few_methods() {
    let mut traits = BTreeMap::from([("BusDevice", None), ("VirtioDevice", None)]);
    for source in sources() {
        for (name, methods) in &mut traits {
            *methods = methods.or(source.methods_of(name));
        }
    }
    for (name, methods) in traits {
        let methods = methods.unwrap_or_else(|| panic!("there is no trait `{name}`"));
        assert!(
            methods <= MAX_DEVICE_METHODS,
            "trait `{name}` has {methods} methods, and {MAX_DEVICE_METHODS} are the limit"
        );
    }
}

#[test]
fn unsafe_code_is_where_a_system_call_or_guest_memory_needs_it() {
    let mut found = Vec::new();
    let mut allowed: BTreeSet<_> = UNSAFE_FILES.iter().map(|(path, _)| *path).collect();
    for source in sources().iter().filter(|source| !source.is_test()) {
        let lines = source.unsafe_lines();
        if let Some(line) = lines.first()
            && !allowed.remove(source.path.as_str())
        {
            found.push(format!("{}:{line}", source.path));
        }
    }
    found.extend(
        allowed
            .iter()
            .map(|path| format!("{path} needs no exception")),
    );
    assert_none(found, "unsafe code in files that are not listed for it");
}

#[test]
fn the_compiler_sees_to_the_rules_on_unsafe_code() {
    let manifests: BTreeMap<_, _> = texts()
        .into_iter()
        .map(|text| (text.path, text.text))
        .collect();
    for (member, _) in MAY_DEPEND_ON {
        let manifest = &manifests[&format!("{member}/Cargo.toml")];
        let expected = match WITHOUT_UNSAFE.contains(member) {
            true => "unsafe_code = \"forbid\"",
            false => "[lints]\nworkspace = true",
        };
        assert!(
            manifest.contains(expected),
            "{member}/Cargo.toml: {expected:?} is missing"
        );
    }
    for lint in ["unsafe_op_in_unsafe_fn", "undocumented_unsafe_blocks"] {
        let denied = format!("{lint} = \"deny\"");
        assert!(
            manifests["Cargo.toml"].contains(&denied),
            "Cargo.toml: {denied:?} is missing"
        );
    }
}

#[test]
fn what_depends_on_the_architecture_is_chosen_in_one_place() {
    let allowed = |path: &str| ARCHITECTURE_FILES.iter().any(|(file, _)| *file == path);
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| !allowed(&source.path)) {
        found.extend(lines_with(&source.path, &source.text, &["target_arch"]));
    }
    assert_none(
        found,
        "only vmm/src/arch/mod.rs asks for the processor's architecture",
    );
}

#[test]
fn dependencies_run_one_way() {
    let mut found = Vec::new();
    let crates = dependencies();
    let members: BTreeSet<_> = crates.keys().map(String::as_str).collect();
    let known: BTreeSet<_> = MAY_DEPEND_ON.iter().map(|(member, _)| *member).collect();
    assert_eq!(members, known, "the crates are not those this test knows");
    for (member, allowed) in MAY_DEPEND_ON {
        for (dependency, is_for_tests) in &crates[*member] {
            let dependency = dependency.as_str();
            let is_tested_with = *is_for_tests && MAY_TEST_WITH.contains(&(*member, dependency));
            if members.contains(dependency) && !allowed.contains(&dependency) && !is_tested_with {
                found.push(format!("{member} depends on {dependency}"));
            }
            let only = ONLY_IN.iter().find(|(name, _)| *name == dependency);
            if only.is_some_and(|(_, only)| only != member) {
                found.push(format!("{member} depends on {dependency}"));
            }
        }
    }
    assert_none(found, "the layers are upside down");
}

/// For each crate of the workspace, the names of what it and its tests depend on, and whether only the tests do.
fn dependencies() -> BTreeMap<String, BTreeSet<(String, bool)>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo");
    assert!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let name = |value: &serde_json::Value| value["name"].as_str().expect("a name").to_owned();
    let list = |value: &serde_json::Value| value.as_array().expect("a list").clone();
    list(&metadata["packages"])
        .iter()
        .map(|package| {
            let dependencies = list(&package["dependencies"]);
            let with_kind =
                |value: &serde_json::Value| (name(value), value["kind"].as_str() == Some("dev"));
            (name(package), dependencies.iter().map(with_kind).collect())
        })
        .collect()
}

#[test]
fn nothing_is_left_for_later() {
    let marks = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("to", "do!("),
        concat!("unimple", "mented!("),
    ];
    let mut found = Vec::new();
    for text in texts() {
        found.extend(lines_with(&text.path, &text.text, &marks));
    }
    assert_none(found, "finish this, or leave it out");
}

#[test]
fn no_file_names_one_machine_or_a_package_server() {
    let needles = [
        concat!("/wo", "rk/"),
        // A home's own files; a guest's root has a home too, which tests may use.
        concat!("/ro", "ot/."),
        concat!("deb.deb", "ian.org"),
        concat!("security.deb", "ian.org"),
        concat!("snapshot.deb", "ian.org"),
        concat!("crates", ".io"),
        concat!("registry.npm", "js"),
        concat!("pypi", ".org"),
    ];
    let mut found = Vec::new();
    for text in texts() {
        // Cargo writes where crates come from into its lock files.
        if !text.path.ends_with("Cargo.lock") {
            found.extend(lines_with(&text.path, &text.text, &needles));
        }
    }
    assert_none(
        found,
        "package clients know their servers, and paths differ",
    );
}

/// Where `text` has one of `needles`: path, line and needle.
fn lines_with(path: &str, text: &str, needles: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for needle in needles.iter().filter(|needle| line.contains(**needle)) {
            found.push(format!("{path}:{}: {needle:?}", number + 1));
        }
    }
    found
}

#[test]
fn the_documents_are_there() {
    let missing = DOCUMENTS.iter().filter(|name| !root().join(name).is_file());
    assert_none(
        missing.map(|name| (*name).to_owned()).collect(),
        "these documents are missing",
    );
}

#[test]
fn documents_name_files_that_exist() {
    let texts = texts();
    let exists = |name: &str| {
        let below = format!("/{name}");
        texts
            .iter()
            .any(|text| text.path == name || text.path.ends_with(&below))
    };
    let mut found = Vec::new();
    for text in texts.iter().filter(|text| text.path.ends_with(".md")) {
        for (number, line) in text.text.lines().enumerate() {
            for name in file_names(line).filter(|name| !exists(name)) {
                found.push(format!("{}:{}: {name}", text.path, number + 1));
            }
        }
    }
    assert_none(found, "these documents name files that are gone");
}

/// The words of `line` that are paths of Rust files, such as `devices/src/bus.rs`.
fn file_names(line: &str) -> impl Iterator<Item = &str> {
    let in_a_path = |c: char| c.is_ascii_alphanumeric() || "/_-.".contains(c);
    line.split(move |c| !in_a_path(c))
        .map(|word| word.trim_start_matches("./").trim_end_matches('.'))
        .filter(|word| word.contains('/') && word.ends_with(".rs"))
}

#[test]
fn what_belongs_to_tests_is_not_measured() {
    let text = "//! A file.

/// Documented.
#[inline]
fn outer(
    &self_like: &u8,
    b: u8,
) {
    unsafe { drop(b) }
}

#[cfg(test)]
mod tests {
    unsafe fn inner() {
        drop(1);
    }
}
";
    let source = source::Source::parse("src/file.rs".to_owned(), text.to_owned());
    assert!(!source.is_test());
    assert_eq!(source.lines(), 11, "17 lines, 6 of them tests");
    assert_eq!(source.unsafe_lines(), [9]);
    let functions = source.functions();
    let [outer] = functions.as_slice() else {
        panic!("{} functions, not 1", functions.len());
    };
    assert_eq!(outer.name, "outer");
    assert_eq!((outer.line, outer.lines, outer.parameters), (5, 6, 2));
}
