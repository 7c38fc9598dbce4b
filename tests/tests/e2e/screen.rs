//! Full-screen programs in a machine, under tmux: what is on the screen is read.

use tests::image::{self, Filesystem};
use tests::tmux::Tmux;
use tests::{Guest, Machines};

#[test]
fn full_screen_programs_have_the_screen_its_size_and_job_control() {
    const TEST: &str = "full_screen_programs_have_the_screen_its_size_and_job_control";
    let Some(debian) = image::debian(Filesystem::Ext4, TEST) else {
        return;
    };
    let machines = Machines::new();
    let machine = machines.idle(Guest::new().rootfs_read_only(&debian));
    machine
        .exec("seq -f 'line %g' 100 >/tmp/file; touch /tmp/plain; mkdir /tmp/dir")
        .expect_code(0);
    let command = machine.exec_command(
        &["-it", "-w", "/tmp", "-e", "PS1=ready> "],
        &["bash", "--norc"],
    );
    let tmux = Tmux::start(&command, 80, 24);
    tmux.expect_text("ready>");

    tmux.type_text("vi file");
    tmux.press("Enter");
    let last = |lines: &[String], number: usize| {
        let text: Vec<_> = lines.iter().map(|line| line.trim_end()).collect();
        text.get(number - 2) == Some(&format!("line {}", number - 1).as_str())
    };
    tmux.expect("the editor fills 24 lines", |lines| {
        lines[0].starts_with("line 1") && last(lines, 24)
    });
    tmux.type_text("4Gdd");
    tmux.expect("a line is deleted", |lines| {
        lines[2].starts_with("line 3") && lines[3].starts_with("line 5")
    });
    tmux.type_text("u");
    // What the editor still sends for 24 lines would leave a terminal of 40 with a region of 24 that scrolls.
    tmux.expect("the line is back", |lines| {
        lines[3].starts_with("line 4") && last(lines, 24)
    });
    tmux.resize(100, 40);
    tmux.expect("the editor fills 40 lines", |lines| {
        lines[3].starts_with("line 4") && last(lines, 40)
    });

    // Ctrl-Z stops the editor, not what carries it.
    tmux.press("C-z");
    tmux.expect_text("Stopped");
    tmux.type_text("echo $((6 * 7)) $LINES");
    tmux.press("Enter");
    tmux.expect_text("42 40");
    tmux.type_text("fg");
    tmux.press("Enter");
    tmux.expect("the editor is back", |lines| {
        lines[0].starts_with("line 1") && last(lines, 40)
    });
    tmux.type_text(":q!");
    tmux.press("Enter");
    tmux.expect("the shell's screen is back", |lines| {
        lines.iter().any(|line| line.contains("42 40"))
            && !lines.iter().any(|line| line.starts_with("line 9"))
    });

    // Another size while a program runs, and its colours.
    tmux.type_text("clear; ls --color=always");
    tmux.press("Enter");
    tmux.expect_text("plain");
    let coloured = tmux.coloured_screen();
    assert!(
        coloured.contains("\u{1b}[34m")
            || coloured.contains("\u{1b}[1;34m")
            || coloured.contains("\u{1b}[1m\u{1b}[34m"),
        "directories are not blue: {coloured:?}"
    );
    tmux.type_text("clear; printf '\\033[38;5;208m%s\\033[0m %s\\n' oran''ge wörter");
    tmux.press("Enter");
    tmux.expect_text("orange wörter");
    assert!(tmux.coloured_screen().contains("38;5;208"), "256 colours");

    tmux.type_text("less file");
    tmux.press("Enter");
    tmux.expect("the pager is at the top", |lines| {
        lines[0].starts_with("line 1")
    });
    tmux.type_text("G");
    tmux.expect("the pager is at the end", |lines| {
        lines.iter().any(|line| line.starts_with("line 100"))
    });
    tmux.type_text("q");
    tmux.type_text("exit");
    tmux.press("Enter");
    tmux.expect_text("ended with 0");
}
