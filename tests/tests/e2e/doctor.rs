//! `mvm doctor` and `mvm accel status`: what a host offers.

use tests::host;

#[test]
fn every_finding_has_a_status_and_its_mend() {
    let findings = host::mvm_json(&["doctor", "--format", "json"]);
    let findings = findings.as_array().expect("findings are listed").clone();
    let names: Vec<&str> = findings
        .iter()
        .filter_map(|finding| finding["name"].as_str())
        .collect();
    for name in [
        "kvm", "qemu", "kernels", "tap", "io_uring", "landlock", "memory",
    ] {
        assert!(
            names.contains(&name),
            "no finding about {name} in {names:?}"
        );
    }
    for finding in &findings {
        let status = finding["status"].as_str().unwrap_or_default();
        assert!(
            ["ok", "slow", "missing"].contains(&status),
            "the status of {finding}"
        );
        assert!(
            !finding["detail"].as_str().unwrap_or_default().is_empty(),
            "no detail in {finding}"
        );
        assert!(
            status == "ok" || finding["mend"].is_string(),
            "nothing mends {finding}"
        );
    }
    let table = host::run_mvm(&["doctor"]);
    table.expect_code(0).expect_stderr("");
    for name in names {
        table.expect_in_stdout(name);
    }
}

#[test]
fn the_status_says_what_runs_machines() {
    let status = host::mvm_json(&["accel", "status", "--format", "json"]);
    let by = status["machines_run_by"].as_str().unwrap_or_default();
    assert!(["kvm", "tcg"].contains(&by), "{status}");
    host::run_mvm(&["accel", "status"])
        .expect_code(0)
        .expect_in_stdout(by);
}

#[test]
fn kvm_that_cannot_run_a_guest_is_refused_with_its_reason() {
    if !host::is_emulated() {
        host::skipped(
            "kvm_that_cannot_run_a_guest_is_refused_with_its_reason",
            "KVM works here",
        );
        return;
    }
    let output = host::run_mvm(&["run", "--accel", "kvm", "--", "true"]);
    if output.code() != 0 {
        output
            .expect_code(125)
            .expect_stdout("")
            .expect_in_stderr("KVM");
    }
}
