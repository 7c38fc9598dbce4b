//! Standard input, output and error: apart, unchanged, and ended when their other end is.

use std::fs::File;
use std::process::Command;

use tests::host::{self, LIMIT};
use tests::process::Input;
use tests::{Guest, Running, image};

#[test]
fn standard_output_and_error_stay_apart() {
    let output = Guest::new().run("echo out; echo err >&2; printf 'no newline'");
    output
        .expect_code(0)
        .expect_stdout("out\nno newline")
        .expect_stderr("err\n");
}

#[test]
fn the_end_of_input_reaches_the_command() {
    let output = Guest::new()
        .input(b"a b\nc".to_vec())
        .run("cat; echo; echo end");
    output.expect_code(0).expect_stdout("a b\nc\nend\n");
    let output = Guest::new().exec(&["wc", "-c"]);
    output.expect_code(0).expect_stdout("0\n");
}

#[test]
fn a_command_that_reads_nothing_ends_although_input_goes_on() {
    let output = Guest::new().input(Input::Open).run("echo done");
    output
        .expect_code(0)
        .expect_stdout("done\n")
        .expect_nothing_left();
}

#[test]
fn a_shell_reads_its_script_from_standard_input() {
    let output = Guest::new()
        .input(b"echo from a script\nexit 3\n".to_vec())
        .boot();
    output.expect_code(3).expect_stdout("from a script\n");
}

#[test]
fn random_bytes_come_back_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let sent = image::random(dir.path(), 256 << 20);
    let returned = dir.path().join("returned");
    let machine = Guest::new()
        .input(Input::File(File::open(&sent).unwrap()))
        .output(File::create(&returned).unwrap())
        .start(&["cat"]);
    machine
        .wait_at_most(3 * LIMIT)
        .expect_code(0)
        .expect_stderr("");
    assert_eq!(
        returned.metadata().unwrap().len(),
        256 << 20,
        "the length of what came back"
    );
    assert_eq!(
        image::sha256(&returned),
        image::sha256(&sent),
        "what came back through cat"
    );
}

#[test]
fn a_reader_that_goes_away_ends_the_command() {
    host::is_emulated();
    let mut pipeline = Command::new("sh");
    pipeline
        .args(["-c", "\"$0\" run --boot-timeout 170s -- yes | head -n 2"])
        .arg(host::mvm());
    let output = Running::start(pipeline, Vec::new()).wait();
    output
        .expect_code(0)
        .expect_stdout("y\ny\n")
        .expect_nothing_left();
}

#[test]
fn what_a_command_leaves_in_the_background_does_not_hold_up_its_end() {
    let output = Guest::new().run("sleep 1000 & echo started");
    output
        .expect_code(0)
        .expect_stdout("started\n")
        .expect_nothing_left();
}
