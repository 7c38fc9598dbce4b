//! Builds the guest agent, so that `mvm` can carry it.
//!
//! The agent is a binary of its own with its own profile (small, aborting), and cargo has no stable
//! way to depend on a binary; so it is built by a nested cargo into this package's output directory.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    for input in ["src", "Cargo.toml"] {
        println!("cargo::rerun-if-changed=../agent/{input}");
    }
    println!("cargo::rerun-if-changed=../Cargo.toml");
    println!("cargo::rerun-if-changed=../Cargo.lock");

    let target = env::var("TARGET").expect("cargo sets TARGET");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("agent");
    let status = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"))
        .args([
            "build",
            "--quiet",
            "--package",
            "agent",
            "--bin",
            "mvm-agent",
        ])
        .args(["--profile", "agent", "--target", &target, "--target-dir"])
        .arg(&out)
        .current_dir("..")
        // The nested build is a build like any other, not a part of `cargo clippy` or `cargo fuzz`.
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS")
        .status()
        .expect("cargo can be run");
    assert!(status.success(), "the guest agent did not build");

    let agent = out.join(&target).join("agent/mvm-agent");
    println!("cargo::rustc-env=MVM_AGENT={}", agent.display());
}
