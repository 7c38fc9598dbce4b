//! Commands in a machine that runs: their streams, codes, users, directories and signals.

use std::fs::File;

use rustix::process::Signal;
use tests::host::eventually;
use tests::{Guest, Machines, Running, Terminal, image};

#[test]
fn a_command_has_its_streams_its_code_and_its_surroundings() {
    let machines = Machines::new();
    let machine = machines.idle(Guest::new());
    let output = machine.exec("echo out; echo err >&2; printf 'no newline'; exit 5");
    output
        .expect_code(5)
        .expect_stdout("out\nno newline")
        .expect_stderr("err\n");
    machine.exec("kill -KILL $$").expect_code(137);
    for (words, code) in [(&["/no/such/program"][..], 127), (&["/etc"], 126)] {
        Running::start(machine.exec_command(&[], words), Vec::new())
            .wait()
            .expect_code(code)
            .expect_in_stderr(words[0]);
    }

    let with = |options: &[&str], script: &str| {
        let command = machine.exec_command(options, &["sh", "-c", script]);
        Running::start(command, Vec::new()).wait()
    };
    with(&["-e", "A=b c", "-e", "EMPTY="], "echo \"$A|$EMPTY|$HOME\"")
        .expect_code(0)
        .expect_stdout("b c||/root\n");
    with(&["-w", "/proc/sys"], "pwd").expect_stdout("/proc/sys\n");
    with(&["-w", "/no/such"], "pwd")
        .expect_stdout("")
        .expect_in_stderr("/no/such");
    with(&["-u", "1234:50"], "id -u; id -g").expect_stdout("1234\n50\n");
    with(&["-u", "nobody-here"], "id")
        .expect_code(125)
        .expect_in_stderr("nobody-here");

    // Without -i standard input is empty, and with it whole.
    with(&[], "wc -c").expect_stdout("0\n");
    machine
        .feed(&["wc", "-c"], vec![b'x'; 100_000])
        .expect_stdout("100000\n");
    let dir = tempfile::tempdir().unwrap();
    let sent = image::random(dir.path(), 16 << 20);
    let received = dir.path().join("received");
    Running::start_to(
        machine.exec_command(&["-i"], &["cat"]),
        File::open(&sent).unwrap().into(),
        Some(File::create(&received).unwrap()),
    )
    .wait()
    .expect_code(0);
    assert_eq!(image::sha256(&received), image::sha256(&sent));
}

#[test]
fn commands_do_not_end_with_each_other() {
    let machines = Machines::new();
    let machine = machines.idle(Guest::new());
    let first = machine.start(&["sh", "-c", "echo first; exec sleep 1000"]);
    let second = machine.start(&[
        "sh",
        "-c",
        "trap 'echo got-it; exit 4' TERM; echo second; while :; do sleep 1 & wait $!; done",
    ]);
    first.expect_stdout("first\n");
    second.expect_stdout("second\n");
    // A signal to the caller is one to the command.
    second.signal(Signal::TERM);
    second
        .wait()
        .expect_code(4)
        .expect_stdout("second\ngot-it\n");
    // The machine's own, and the first; what the second one waited for ends in a second.
    let sleeping = || machine.exec("pidof sleep | wc -w").text();
    eventually("two sleep", || (sleeping() == "2\n").then_some(()));
    // A caller that dies takes its command along.
    first.signal(Signal::KILL);
    first.wait();
    eventually("the command of the caller that died has ended", || {
        (machine.exec("pidof sleep | wc -w").text() == "1\n").then_some(())
    });
    machine.expect_state("running");
}

#[test]
fn a_thousand_orphans_leave_no_zombie() {
    let machines = Machines::new();
    let machine = machines.idle(Guest::new());
    // Whoever outlives its parent becomes a child of process 1 while it runs, and who does not, when both have ended.
    machine
        .exec(
            "for i in $(seq 50); do sh -c '(sleep 1; exit 3) & exit 0'; done; \
             for i in $(seq 950); do ( (exit 3) & ); done",
        )
        .expect_code(0);
    // The idle command's own, and this one's.
    let count = "grep -l '^PPid:.1$' /proc/[0-9]*/status 2>/dev/null | wc -l";
    eventually("all orphans are reaped", || {
        let states =
            machine.exec("grep -h '^State:' /proc/[0-9]*/status 2>/dev/null; pidof sleep | wc -w");
        let text = states.text();
        (!text.contains('Z') && text.ends_with("\n1\n")).then_some(())
    });
    let children = machine.exec(count).text();
    let children: u32 = children.trim().parse().unwrap();
    assert!(children <= 3, "{children} children of process 1 are left");
}

#[test]
fn a_shell_starts_where_the_caller_is() {
    let machines = Machines::new();
    let machine = machines.idle(Guest::new());
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path().to_str().unwrap();
    let shell = |dir: &str| {
        let mut command = machine.command("shell", &[]);
        command.current_dir(dir);
        let mut terminal = Terminal::start_command(&command, 24, 80);
        terminal.type_keys("echo \"at:$(pwd):$(tty)\"\n");
        terminal.expect("at:/");
        terminal.type_keys("exit 6\n");
        assert_eq!(terminal.wait(), 6, "{}", terminal.text());
        terminal.expect_mode_restored();
        terminal.text()
    };
    assert!(
        !shell(here).contains(&format!("at:{here}:")),
        "the guest has no {here}"
    );
    machine.exec(&format!("mkdir -p {here}")).expect_code(0);
    let text = shell(here);
    assert!(text.contains(&format!("at:{here}:/dev/pts/")), "{text}");
}

#[test]
fn a_terminal_of_a_command_is_a_terminal() {
    let machines = Machines::new();
    let machine = machines.idle(Guest::new());
    let command = machine.exec_command(&["-it"], &["sh"]);
    let mut terminal = Terminal::start_command(&command, 33, 101);
    terminal.type_keys("echo rea''dy\n");
    terminal.expect("ready");
    terminal.expect_raw_mode();
    terminal.type_keys("stty size\n");
    terminal.expect("33 101");
    terminal.resize(50, 120);
    terminal.type_keys("until [ \"$(stty size)\" = '50 120' ]; do sleep 1; done; echo resi''zed\n");
    terminal.expect("resized");
    // The command says itself that it runs: its keys must not come before it has the terminal.
    terminal.type_keys("sh -c \"echo sta''rts; exec sleep 1000\"\n");
    terminal.expect("starts");
    terminal.type_keys("\x03");
    terminal.type_keys("echo code-$?\n");
    terminal.expect("code-130");
    // A closed terminal ends its command, and nothing else.
    terminal.hang_up();
    terminal.wait();
    eventually("the shell has ended", || {
        (machine.exec("pidof sh | wc -w").text().trim() == "1").then_some(())
    });
    machine.expect_state("running");
}
