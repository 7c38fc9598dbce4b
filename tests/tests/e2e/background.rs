//! Machines in the background: made, listed, ended, started again and removed, whoever dies meanwhile.

use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use tests::host::{self, eventually};
use tests::net::{connect_eventually, exchange, free_port};
use tests::{Guest, Machine, Machines, Running};

const TRAPPER: &str = "trap 'echo term; exit 7' TERM; trap 'echo usr1; exit 9' USR1; \
                       echo up; while :; do sleep 1 & wait $!; done";

#[test]
fn a_machine_lives_on_after_the_command_that_started_it() {
    let machines = Machines::new();
    let machine = machines.idle(Guest::new().cpus(2).memory("256M"));
    assert_eq!(
        machines.listed(false),
        [(machine.name().to_owned(), "running".to_owned())]
    );
    let told = &machine.inspect()["machine"];
    assert_eq!(told["name"], machine.name(), "{told}");
    assert_eq!(told["cpus"], 2, "{told}");
    assert_eq!(told["memory"], 256 << 20, "{told}");
    assert!(Path::new(&format!("/proc/{}", machine.supervisor().as_raw_pid())).exists());
    let table = machines.mvm(&["ps"]);
    table.expect_code(0).expect_in_stdout(machine.name());
    table.expect_in_stdout("running");
    // The same verb; how long ago things were may not be the same.
    let same = machines.mvm(&["ls"]);
    same.expect_code(0).expect_in_stdout(machine.name());
    assert_eq!(same.text().lines().next(), table.text().lines().next());
    machine.exec("nproc").expect_code(0).expect_stdout("2\n");

    let usage = machine.mvm("stats", &["--no-stream"]);
    usage.expect_code(0).expect_in_stdout(machine.name());

    machine.mvm("stop", &["-t", "2"]).expect_code(0);
    assert_eq!(machines.listed(false), []);
    assert_eq!(machine.state(), "exited");
    machine.mvm("rm", &[]).expect_code(0);
    assert_eq!(machines.listed(true), []);
}

/// Waits until the last thing that the machine's command printed is `up`.
fn await_up(machine: &Machine<'_>) {
    let up = || {
        machine
            .mvm("logs", &[])
            .text()
            .ends_with("up\n")
            .then_some(())
    };
    eventually("its command is up", up);
}

#[test]
fn how_a_command_ended_is_kept_and_waited_for() {
    let machines = Machines::new();
    let machine = machines.run(Guest::new(), &["sh", "-c", TRAPPER]);
    await_up(&machine);
    let waiting = Running::start(machine.command("wait", &[]), Vec::new());
    machine.mvm("stop", &["-t", "60"]).expect_code(0);
    waiting.wait().expect_code(0).expect_stdout("7\n");
    machine.expect_state("exited");
    machine.mvm("wait", &[]).expect_stdout("7\n");
    machine.mvm("logs", &[]).expect_stdout("up\nterm\n");

    machine.mvm("start", &[]).expect_code(0);
    machine.expect_state("running");
    await_up(&machine);
    machine.mvm("kill", &["-s", "USR1"]).expect_code(0);
    machine.mvm("wait", &[]).expect_stdout("9\n");
    machine.expect_state("exited");

    machine.mvm("restart", &[]).expect_code(0);
    machine.expect_state("running");
    machine.mvm("kill", &[]).expect_code(0);
    machine.mvm("wait", &[]).expect_stdout("137\n");
}

#[test]
fn a_command_that_does_not_end_is_killed_when_its_time_is_over() {
    let machines = Machines::new();
    let machine = machines.run(
        Guest::new(),
        &[
            "sh",
            "-c",
            "trap '' TERM; echo up; while :; do sleep 1; done",
        ],
    );
    await_up(&machine);
    machine.mvm("stop", &["-t", "1"]).expect_code(0);
    machine.expect_state("exited");
    machine.mvm("wait", &[]).expect_stdout("137\n");
}

#[test]
fn a_machine_with_rm_is_gone_when_it_ends() {
    let machines = Machines::new();
    let machine = machines.run(
        Guest::new().flag("--rm"),
        &["sh", "-c", "read line; exit 3"],
    );
    // Its command reads nothing, so it may have ended already.
    eventually("the machine is gone", || {
        machines.listed(true).is_empty().then_some(())
    });
    machine
        .mvm("inspect", &[])
        .expect_code(125)
        .expect_in_stderr("no machine named");
}

#[test]
fn a_machine_whose_supervisor_was_killed_is_dead_and_starts_again_with_its_ports() {
    let machines = Machines::new();
    let port = free_port();
    let publish = format!("{port}:7000");
    let machine = machines.idle(Guest::new().option("-p", &publish));
    machine.plant_peer();
    let echo = machine.peer("echo", "127.0.0.1:7000");
    assert_eq!(exchange(connect_eventually(port), b"one").unwrap(), b"one");
    machine.mvm("port add", &["7001"]).expect_code(0);
    let added = machine.port_of("7001");

    machine.kill_supervisor();
    drop(echo);
    let dead = (machine.name().to_owned(), "dead".to_owned());
    assert_eq!(machines.listed(false), [dead]);
    machine
        .exec("true")
        .expect_code(125)
        .expect_in_stderr(machine.name());

    machine.mvm("start", &[]).expect_code(0);
    machine.expect_state("running");
    assert_eq!(machine.port_of("7000"), port);
    assert_eq!(
        machine.port_of("7001"),
        added,
        "what was added while it ran"
    );
    machine.plant_peer();
    let _echo = machine.peer("echo", "127.0.0.1:7000");
    assert_eq!(exchange(connect_eventually(port), b"two").unwrap(), b"two");

    machine.kill_supervisor();
    machine.mvm("rm", &[]).expect_code(0);
    assert_eq!(machines.listed(true), []);
    // The port is the host's again.
    std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
}

#[test]
fn names_are_unique_and_can_be_changed() {
    let machines = Machines::new();
    let first = machines.idle(Guest::new());
    let again = machines
        .guest(Guest::new())
        .option("--name", first.name())
        .exec(&["sleep", "1000"]);
    again
        .expect_code(125)
        .expect_stdout("")
        .expect_in_stderr(first.name());

    let generated = machines.guest(Guest::new()).exec(&["sleep", "1000"]);
    generated.expect_code(0).expect_stderr("");
    let generated = generated.text().trim_end().to_owned();
    assert!(
        generated.contains('-')
            && generated
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b == b'-' || b.is_ascii_digit()),
        "{generated:?} is a generated name"
    );
    assert_eq!(machines.listed(false).len(), 2);

    machines
        .mvm(&["rename", &generated, first.name()])
        .expect_code(125)
        .expect_in_stderr(first.name());
    let renamed = machines.fresh_name("renamed");
    machines
        .mvm(&["rename", &generated, &renamed])
        .expect_code(0);
    let renamed = machines.named(&renamed);
    renamed
        .exec("echo here")
        .expect_code(0)
        .expect_stdout("here\n");
    machines
        .mvm(&["exec", &generated, "--", "true"])
        .expect_code(125)
        .expect_in_stderr(&generated);
    first.exec("echo there").expect_stdout("there\n");

    let refused = renamed.mvm("rm", &[]);
    refused.expect_code(125).expect_in_stderr("running");
    renamed.mvm("rm", &["-f"]).expect_code(0);
    assert_eq!(machines.listed(true).len(), 1);
}

#[test]
fn a_machine_that_cannot_start_leaves_nothing() {
    let machines = Machines::new();
    let output = machines
        .guest(Guest::new())
        .rootfs(Path::new("/no/such/image"))
        .exec(&["true"]);
    output
        .expect_code(125)
        .expect_stdout("")
        .expect_in_stderr("does not exist");
    let output = machines.guest(Guest::new()).exec(&["/no/such/program"]);
    assert_ne!(output.code(), 0, "{output}");
    output.expect_in_stderr("/no/such/program");
    assert_eq!(machines.listed(true), []);
}

#[test]
fn a_machine_does_not_end_with_the_terminal_it_was_started_on() {
    let machines = Machines::new();
    let name = machines.fresh_name("e2e");
    let guest = machines.guest(Guest::new()).option("--name", &name);
    let mut words = guest.arguments(&["sleep", "1000"]);
    // A session of its own, whose leader is killed together with its whole process group afterwards.
    let mut command = Command::new(host::tool("setsid", "util-linux"));
    command.args(["sh", "-c", "\"$@\"; echo started; sleep 1000", "sh"]);
    command.arg(host::mvm()).args(words.drain(..));
    command.env("XDG_STATE_HOME", machines.state_dir());
    let session = Running::start(command, Vec::new());
    session.expect_stdout("started\n");
    // Where the tests were started by nohup, nobody of it minds the first.
    for signal in [Signal::HUP, Signal::KILL] {
        rustix::process::kill_process_group(session.pid(), signal)
            .or_else(|_| rustix::process::kill_process(session.pid(), signal))
            .unwrap();
    }
    session.wait();
    let machine = machines.named(&name);
    machine.exec("echo lives").expect_stdout("lives\n");
}
