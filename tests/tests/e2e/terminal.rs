//! `mvm run` on a terminal: a shell as at a login, and the terminal as it was when it ends.

use rustix::process::{Signal, kill_process};
use tests::{Guest, Terminal};

const CTRL_C: &str = "\x03";
const CTRL_Z: &str = "\x1a";

/// A shell in a machine, ready for commands.
fn shell() -> Terminal {
    let mut terminal = Terminal::start(&Guest::new().flag("-it"), &["sh"], 33, 101);
    // What is typed is echoed, so no text that is waited for is typed as it is.
    terminal.type_keys("echo rea''dy\n");
    terminal.expect("ready");
    terminal
}

#[test]
fn a_shell_has_job_control_the_size_and_ctrl_c() {
    let mut terminal = shell();
    terminal.expect_raw_mode();
    terminal.type_keys("stty size\n");
    terminal.expect("33 101");

    terminal.resize(50, 120);
    terminal.type_keys("until [ \"$(stty size)\" = '50 120' ]; do sleep 1; done; echo resi''zed\n");
    terminal.expect("resized");

    // The command says itself that it runs: its keys must not come before it has the terminal.
    terminal.type_keys("sh -c \"echo sta''rts; exec sleep 1000\"\n");
    terminal.expect("starts");
    terminal.type_keys(CTRL_C);
    terminal.type_keys("echo code-$?\n");
    terminal.expect("code-130");

    terminal.type_keys("sh -c \"echo sta''rts; exec sleep 1001\"\n");
    terminal.expect("starts");
    terminal.type_keys(CTRL_Z);
    terminal.expect("Stopped");
    terminal.type_keys("bg; jobs\n");
    terminal.expect("sleep 1001");
    terminal.type_keys("kill %1; wait; echo no-jo''bs\n");
    terminal.expect("no-jobs");

    terminal.type_keys("exit 5\n");
    assert_eq!(
        terminal.wait(),
        5,
        "the shell's exit code; on its terminal:\n{}",
        terminal.text()
    );
    terminal.expect_mode_restored();
    terminal.expect_nothing_left();
}

#[test]
fn without_a_command_a_terminal_gets_a_shell() {
    let mut terminal = Terminal::start(&Guest::new(), &[], 24, 80);
    terminal.type_keys("tty && echo on-a-termi''nal; exit\n");
    terminal.expect("on-a-terminal");
    assert_eq!(terminal.wait(), 0, "on the terminal:\n{}", terminal.text());
    terminal.expect_mode_restored();
}

#[test]
fn a_closed_terminal_ends_the_machine() {
    let mut terminal = shell();
    terminal.hang_up();
    terminal.wait();
    terminal.expect_nothing_left();
}

#[test]
fn the_terminal_is_restored_when_a_signal_ends_the_machine() {
    let mut terminal = shell();
    terminal.expect_raw_mode();
    kill_process(terminal.pid(), Signal::TERM).unwrap();
    terminal.wait();
    terminal.expect_mode_restored();
    terminal.expect_nothing_left();
}

#[test]
fn the_terminal_is_restored_when_the_guest_panics() {
    let mut terminal = shell();
    terminal.type_keys("echo c >/proc/sysrq-trigger\n");
    assert_eq!(
        terminal.wait(),
        125,
        "on the terminal:\n{}",
        terminal.text()
    );
    terminal.expect_mode_restored();
    terminal.expect_nothing_left();
}
