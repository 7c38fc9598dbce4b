//! A command's exit code, its surroundings, and the options that show more of the machine.

use rustix::process::Signal;
use tests::image::{self, Filesystem};
use tests::process::Input;
use tests::{Guest, host};

#[test]
fn the_exit_code_is_the_commands() {
    for (script, code) in [
        ("true", 0),
        ("exit 7", 7),
        ("kill -9 $$", 137),
        ("kill -15 $$", 143),
    ] {
        let output = Guest::new().run(script);
        output.expect_code(code).expect_stdout("").expect_stderr("");
    }
}

/// Where CPUID contradicts itself the kernel says so, and programs that believe a part of it die.
#[test]
fn the_kernel_finds_its_machine_consistent() {
    let output = Guest::new().run("dmesg | grep -e 'WARNING: CPU' -e 'consistency problem'");
    output.expect_stdout("").expect_code(1);
}

/// QEMU's CMPXCHG16B leaves flags that an interrupt makes last, which kernels do not survive for long. Programs of a
/// distribution that is built for x86-64-v2 do not start without it.
#[test]
fn an_emulated_kernel_does_without_cmpxchg16b_and_its_programs_need_not() {
    if !host::is_emulated() {
        return;
    }
    let output = Guest::new().run("grep -c -w cx16 /proc/cpuinfo");
    output.expect_stdout("0\n").expect_code(1);
    let output = host::run_mvm(&["run", "--", "/lib64/ld-linux-x86-64.so.2", "--help"]);
    output
        .expect_code(0)
        .expect_in_stdout("x86-64-v2 (supported");
}

#[test]
fn a_command_that_is_not_there_is_127_and_one_that_cannot_run_126() {
    let output = Guest::new().exec(&["no-such-command", "x"]);
    output
        .expect_code(127)
        .expect_stdout("")
        .expect_in_stderr("no-such-command");
    let output = Guest::new().exec(&["/proc/version"]);
    output
        .expect_code(126)
        .expect_stdout("")
        .expect_in_stderr("/proc/version");
}

#[test]
fn a_wrong_command_line_is_2() {
    for words in [
        &["run", "--no-such-option"][..],
        &["run", "ls"],
        &["run", "--initrd", "x", "--", "ls"],
        &["run", "--net", "bridge=x", "--", "ls"],
        &["run", "--name", "a/b", "--", "ls"],
        &["run", "--workdir", "relative", "--", "ls"],
        &["run", "--timeout", "soon", "--", "ls"],
        &["no-such-verb"],
        &[],
    ] {
        let output = host::run_mvm(words);
        output
            .expect_code(2)
            .expect_stdout("")
            .expect_in_stderr("--help");
    }
}

#[test]
fn a_timeout_is_124_also_where_the_command_ignores_its_signal() {
    let output = Guest::new()
        .option("--timeout", "2s")
        .exec(&["sleep", "1000"]);
    output.expect_code(124).expect_nothing_left();
    let output = Guest::new()
        .option("--timeout", "1s")
        .run("trap '' TERM INT HUP; while :; do sleep 1; done");
    output.expect_code(124).expect_nothing_left();
}

#[test]
fn environment_directory_and_name_are_as_asked_for() {
    let output = Guest::new()
        .option("--env", "A=x=y z")
        .option("-e", "PASSED_ON")
        .option("-e", "NOT_SET_HERE")
        .option("-w", "/tmp")
        .option("--name", "e2e-named")
        .environment("PASSED_ON", "from the host")
        .environment("NOT_PASSED_ON", "secret")
        .run("echo \"$A|$PASSED_ON|${NOT_SET_HERE-unset}|${NOT_PASSED_ON-unset}\"; pwd; hostname");
    output
        .expect_code(0)
        .expect_stdout("x=y z|from the host|unset|unset\n/tmp\ne2e-named\n");
}

#[test]
fn a_user_is_taken_by_name_or_number_with_the_groups_of_the_guest() {
    let image = image::small(Filesystem::Squashfs);
    for (user, expected) in [
        ("alice", "1000 1000 1000 50 /home/alice\n"),
        ("1000:50", "1000 50 50 /home/alice\n"),
        ("0", "0 0 0 /root\n"),
    ] {
        let output = Guest::new()
            .rootfs(&image)
            .option("--user", user)
            .run("echo $(id -u) $(id -g) $(id -G) $HOME");
        output.expect_code(0).expect_stdout(expected);
    }
    let output = Guest::new()
        .rootfs(&image)
        .option("--user", "nobody-here")
        .run("id");
    output
        .expect_code(125)
        .expect_stdout("")
        .expect_in_stderr("nobody-here");
}

#[test]
fn nothing_after_the_dashes_is_an_option() {
    let output = Guest::new().exec(&["echo", "--cpus", "9", "-t", "--", "--help", "-v", ""]);
    output
        .expect_code(0)
        .expect_stdout("--cpus 9 -t -- --help -v \n")
        .expect_stderr("");
}

#[test]
fn verbose_shows_the_boot_beside_the_command() {
    let output = Guest::new()
        .flag("--verbose")
        .flag("--timing")
        .run("echo out; echo err >&2");
    output.expect_code(0).expect_stdout("out\n");
    for text in [
        "Linux version",
        "err\n",
        "timing: kernel",
        "timing: first output",
    ] {
        output.expect_in_stderr(text);
    }
}

#[test]
fn the_console_can_be_watched_and_left() {
    let machine = Guest::new().flag("--console").start(&[]);
    machine.expect_stdout("Linux version");
    machine.signal(Signal::TERM);
    machine.wait().expect_code(143).expect_nothing_left();
}

#[test]
fn an_initramfs_of_ones_own_boots_and_talks_over_the_console() {
    let dir = tempfile::tempdir().unwrap();
    let image = image::initramfs(
        dir.path(),
        "echo its own init; read line; echo \"got <$line>\"; poweroff -f\n",
    );
    let mut machine = Guest::new()
        .option("--initrd", image)
        .input(Input::Open)
        .start(&[]);
    // What comes before the guest's driver has opened the serial port is lost, as on any line.
    machine.expect_stdout("its own init");
    machine.write(b"some words\n");
    let output = machine.wait();
    output
        .expect_code(0)
        .expect_in_stdout("got <some words>")
        .expect_nothing_left();
}
