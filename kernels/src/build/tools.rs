//! The programs that a kernel build runs: which are missing, and what installs them.

use std::process::{Command, Stdio};

use super::BuildError;
use crate::package::{Consent, Packages, on_path};
use crate::progress::Progress;

/// A program and the Debian package that has it.
const PROGRAMS: [(&str, &str); 9] = [
    ("gcc", "gcc"),
    ("ld", "binutils"),
    ("objcopy", "binutils"),
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("perl", "perl-base"),
    ("date", "coreutils"),
];

/// Makes sure that all tools are there, and installs them where that was allowed.
pub(super) fn require(
    packages: &Packages<'_>,
    consent: Consent,
    progress: &dyn Progress,
) -> Result<(), BuildError> {
    let mut missing = missing();
    if !missing.is_empty() && consent.covers_system() {
        let names: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
        packages.install(&names, progress)?;
        missing = self::missing();
    }
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|tool| tool.name).collect();
    let mut from: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    from.dedup();
    let sudo = if rustix::process::geteuid().is_root() {
        ""
    } else {
        "sudo "
    };
    Err(BuildError::Tools {
        missing: names.join(", "),
        command: format!("{sudo}apt-get install {}", from.join(" ")),
    })
}

struct Tool {
    name: &'static str,
    package: &'static str,
}

fn missing() -> Vec<Tool> {
    let mut missing: Vec<Tool> = PROGRAMS
        .iter()
        .filter(|(name, _)| on_path(name).is_none())
        .map(|&(name, package)| Tool { name, package })
        .collect();
    // Without a compiler the headers cannot be looked for.
    let has_compiler = missing.iter().all(|tool| tool.name != "gcc");
    for (name, include, package) in [
        ("the C library's headers", "stdlib.h", "libc6-dev"),
        ("libelf's headers", "gelf.h", "libelf-dev"),
    ] {
        if !has_compiler || !has_header(include) {
            missing.push(Tool { name, package });
        }
    }
    missing
}

/// Whether the compiler finds a header.
fn has_header(name: &str) -> bool {
    Command::new("gcc")
        .args(["-E", "-x", "c", "-include", name, "/dev/null"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
