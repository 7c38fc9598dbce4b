//! A command's exit code, and what it is given.

use tests::Guest;

#[test]
fn the_exit_code_is_the_commands() {
    Guest::new()
        .run("exit 7")
        .expect_code(7)
        .expect_stdout("")
        .expect_stderr("");
}
