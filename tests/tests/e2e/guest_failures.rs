//! Guests that panic, reboot, hang or run out of memory.

use tests::Guest;

#[test]
fn a_panic_is_told_with_the_last_console_lines() {
    let output = Guest::new().run("echo before; sleep 2; echo c >/proc/sysrq-trigger; sleep 1000");
    output.expect_code(125).expect_stdout("before\n");
    output
        .expect_in_stderr("panic")
        .expect_in_stderr("Kernel panic - not syncing");
    output.expect_nothing_left();
}

#[test]
fn a_kernel_without_an_init_is_told_with_the_last_console_lines() {
    let output = Guest::new().append("rdinit=/no/such/init").run("true");
    output
        .expect_code(125)
        .expect_stdout("")
        .expect_in_stderr("Kernel panic - not syncing");
}

#[test]
fn a_reboot_or_a_triple_fault_ends_the_machine() {
    for method in ["k", "t"] {
        let output = Guest::new()
            .append(&format!("reboot={method}"))
            .run("echo b >/proc/sysrq-trigger; sleep 1000");
        output
            .expect_code(125)
            .expect_stdout("")
            .expect_in_stderr("guest")
            .expect_nothing_left();
    }
}

#[test]
fn a_guest_that_powers_off_under_its_command_is_told() {
    let output = Guest::new().run("poweroff -f; sleep 1000");
    output
        .expect_code(125)
        .expect_in_stderr("powered off")
        .expect_nothing_left();
}

#[test]
fn a_boot_that_hangs_is_ended_and_the_timeout_named() {
    // The kernel hands what follows the dashes to init: a program that only waits.
    let output = Guest::new()
        .boot_timeout("8s")
        .append("rdinit=/bin/busybox -- sleep 1000")
        .run("true");
    output
        .expect_code(125)
        .expect_stdout("")
        .expect_in_stderr("8s")
        .expect_nothing_left();
}

#[test]
fn a_command_that_needs_too_much_memory_is_killed_and_the_machine_lives() {
    let output = Guest::new()
        .memory("128M")
        .run("tail /dev/zero; echo code $?");
    output.expect_code(0).expect_in_stdout("code 137");
}
