//! The guest's clock follows the host's, whatever happened to either.

use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tests::process::Input;
use tests::{Guest, Machine, Machines, Running};

/// How far the clocks may be apart, besides what it takes to ask.
const ALLOWED: Duration = Duration::from_millis(100);

/// How long the machine stands still.
const PAUSE: Duration = Duration::from_secs(4);

/// How far the guest's clock is off, and how uncertain that is: the fastest of several questions counts.
fn offset(machine: &Machine<'_>) -> (Duration, Duration) {
    let command = machine.exec_command(&["-i"], &["/tmp/peer", "clock"]);
    let mut clock = Running::start(command, Input::Open);
    clock.expect_stdout("listening\n");
    let mut best = None;
    for _ in 0..10 {
        let answers = clock.stdout_lines();
        let before = now();
        clock.write(b"\n");
        let answer = clock.expect_line(answers);
        let after = now();
        let guest = Duration::from_nanos(answer.parse().unwrap());
        let slack = (after - before) / 2;
        let off = guest.abs_diff(before + slack);
        if best.is_none_or(|(_, least)| slack < least) {
            best = Some((off, slack));
        }
    }
    best.unwrap()
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

#[track_caller]
fn expect_together(machine: &Machine<'_>, when: &str) {
    let (off, slack) = offset(machine);
    assert!(
        off <= ALLOWED + slack,
        "{when} the clocks are {off:?} apart, to be known within {slack:?}"
    );
}

#[test]
fn the_clocks_agree_after_a_pause() {
    let machines = Machines::new();
    let machine = machines.idle(Guest::new());
    machine.plant_peer();
    expect_together(&machine, "after the boot");

    machine.mvm("pause", &[]).expect_code(0);
    machine.expect_state("paused");
    thread::sleep(PAUSE);
    // Whoever asks meanwhile is told, and does not wait for ever.
    machine.mvm("pause", &[]).expect_in_stderr("paused");
    machine.mvm("resume", &[]).expect_code(0);
    machine.expect_state("running");
    expect_together(&machine, "after a pause");

    // The guest's own idea of the time is overruled when it is resumed.
    machine.exec("date -s '2001-01-01 00:00:00'").expect_code(0);
    machine.mvm("pause", &[]).expect_code(0);
    machine.mvm("resume", &[]).expect_code(0);
    expect_together(&machine, "after a wrong date and a pause");
}
