//! Long requests and replies of a shared folder that go through the guest's memory, where that is in mvm's own process.

use tests::host;

/// Runs beside the machines, with the program's path as `$mvm`: makes files of all sizes around those that matter,
/// has a guest read them and write others, and compares.
const SCRIPT: &str = include_str!("programs/window.sh");

#[test]
fn long_reads_and_writes_go_through_the_guests_memory_unchanged() {
    let mvm = host::mvm_beside_machines();
    let output = host::run_beside_machines(&format!("mvm={mvm}\n{SCRIPT}"));
    output.expect_code(0).expect_stdout("");
}
