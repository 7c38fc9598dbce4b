//! Requests and replies of a shared folder that go through the guest's memory, where that is in mvm's own process.

use tests::host;

/// Runs beside the machines, with the program's path as `$mvm`: makes files of all sizes around those that matter,
/// has a guest read them and write others, and compares.
const LONG: &str = include_str!("programs/window.sh");

/// Runs there too: has a guest make many small files, counts how often a thread of mvm's waited meanwhile for a request
/// on a stream, and has host and guest wait for each other's changes.
const SHORT: &str = include_str!("programs/calls.sh");

#[test]
fn long_reads_and_writes_go_through_the_guests_memory_unchanged() {
    let mvm = host::mvm_beside_machines();
    let output = host::run_beside_machines(&format!("mvm={mvm}\n{LONG}"));
    output.expect_code(0).expect_stdout("");
}

#[test]
fn short_requests_are_answered_where_they_are_made() {
    let mvm = host::mvm_beside_machines();
    let output = host::run_beside_machines(&format!("mvm={mvm}\n{SHORT}"));
    output.expect_code(0).expect_stdout("");
}
