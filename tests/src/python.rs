//! Programs in Python that tests run in guests, with the Python of the host's root: they check many things in one
//! machine, and say of each whether it was as it should be (`tests/src/checks.py`).

use std::process::Command;

use crate::host;
use crate::process::Running;

/// Where the system's own Python is: what PATH names on the host may be a wrapper in somebody's home.
pub const PYTHON: &str = "/usr/bin/python3";

/// What every program begins with.
const CHECKS: &str = include_str!("checks.py");

/// How a program ends what it says.
const END: &str = "the end";

/// Whether there is what such programs need; says that `test` is skipped where there is not.
pub fn has_python(test: &str) -> bool {
    let found = Command::new(PYTHON)
        .args(["-c", "import ctypes, sqlite3"])
        .output();
    let has = found.is_ok_and(|output| output.status.success());
    if !has {
        host::skipped(
            test,
            &format!("there is no {PYTHON} with ctypes and sqlite3"),
        );
    }
    has
}

/// The words that run `program` with these arguments.
pub fn python(program: &str, arguments: &[&str]) -> Vec<String> {
    let program = format!("{CHECKS}\n{program}\nend()\n");
    let words = [PYTHON, "-c", &program];
    let words = words.iter().chain(arguments);
    words.map(|word| (*word).to_owned()).collect()
}

/// Does what a program asks the host for (`host(WHAT)`), whose input is left open, until it ends; it must find
/// everything as it should be.
#[track_caller]
pub fn converse(mut running: Running, mut act: impl FnMut(&str)) {
    for number in 0.. {
        let line = running.expect_line(number);
        if line == END {
            break;
        }
        if let Some(what) = line.strip_prefix("host: ") {
            act(what);
            running.write(b"done\n");
        }
    }
    let output = running.wait();
    assert!(!output.text().contains("WRONG "), "{output}");
    output.expect_code(0);
}
