//! Every way to end a machine from outside: its command is told, and nothing is left.

use rustix::process::Signal;
use tests::{Guest, Running, host};

fn started(script: &str) -> Running {
    let machine = Guest::new().start(&["sh", "-c", script]);
    machine.expect_stdout("up");
    machine
}

#[test]
fn a_signal_reaches_the_command_which_decides_the_exit_code() {
    for (signal, name) in [
        (Signal::INT, "INT"),
        (Signal::TERM, "TERM"),
        (Signal::HUP, "HUP"),
    ] {
        let machine = started(&format!(
            "trap 'echo got {name}; exit 3' {name}; echo up; while :; do sleep 1; done"
        ));
        machine.signal(signal);
        let output = machine.wait();
        output
            .expect_code(3)
            .expect_stdout(&format!("up\ngot {name}\n"))
            .expect_nothing_left();
    }
}

#[test]
fn a_command_that_a_signal_kills_is_128_and_its_number() {
    let machine = started("echo up; exec sleep 1000");
    machine.signal(Signal::INT);
    machine.wait().expect_code(130).expect_nothing_left();
}

#[test]
fn a_command_that_ignores_signals_is_ended_by_force() {
    let machine = started("trap '' TERM INT HUP; echo up; while :; do sleep 1; done");
    machine.signal(Signal::TERM);
    machine.wait().expect_code(137).expect_nothing_left();
}

#[test]
fn a_signal_during_the_boot_ends_it() {
    let machine = Guest::new().flag("--verbose").start(&["sleep", "1000"]);
    machine.expect_stderr("Linux version");
    machine.signal(Signal::TERM);
    machine.wait().expect_code(143).expect_nothing_left();
}

#[test]
fn a_killed_mvm_leaves_nothing() {
    let machine = started("echo up; exec sleep 1000");
    machine.signal(Signal::KILL);
    machine.wait().expect_code(137).expect_nothing_left();
}

#[test]
fn a_killed_mvm_in_the_outer_linux_is_told() {
    if !host::is_emulated() {
        host::skipped(
            "a_killed_mvm_in_the_outer_linux_is_told",
            "there is no outer Linux here",
        );
        return;
    }
    let machine = started("echo up; exec sleep 1000");
    let processes = machine.mark().beside_machines();
    assert_eq!(
        processes.len(),
        1,
        "the processes in the outer Linux: {processes:?}"
    );
    let pid = processes[0].split(' ').next().unwrap_or_default();
    host::run_beside_machines(&format!("kill -9 {pid}")).expect_code(0);
    machine
        .wait()
        .expect_code(125)
        .expect_in_stderr("was killed by signal 9")
        .expect_nothing_left();
}
