//! `mvm` on a terminal: a pty whose keyboard and screen the test has in hand.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{self, Winsize};

use crate::guest::Guest;
use crate::host::{self, LIMIT};
use crate::process::{Capture, Mark, POLL};

/// A session on a terminal of its own.
#[derive(Debug)]
pub struct Terminal {
    /// The keyboard and screen side; None when it was hung up.
    master: Option<Arc<File>>,
    /// The program's side, kept to look at its mode.
    slave: OwnedFd,
    child: Child,
    screen: Capture,
    seen: usize,
    reader: Option<JoinHandle<()>>,
    hung_up: Arc<AtomicBool>,
    mode_before: String,
    mark: Mark,
}

impl Terminal {
    /// Starts `guest` with `command` on a terminal of `rows` lines and `columns` characters.
    pub fn start(guest: &Guest, command: &[&str], rows: u16, columns: u16) -> Self {
        let mut process = Command::new(host::mvm());
        process.args(guest.arguments(command));
        Self::start_command(&process, rows, columns)
    }

    /// Starts `command` on a terminal of `rows` lines and `columns` characters.
    pub fn start_command(command: &Command, rows: u16, columns: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .expect("a pty can be made");
        grantpt(&master).expect("a pty can be granted");
        unlockpt(&master).expect("a pty can be unlocked");
        let name = ptsname(&master, Vec::new()).expect("a pty has a name");
        let slave = rustix::fs::open(
            &name,
            OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .expect("a pty can be opened");
        termios::tcsetwinsize(&slave, size(rows, columns)).expect("a pty has a size");
        let mode_before = mode(&slave);

        // setsid(1) makes the pty the controlling terminal, which the standard library cannot.
        let copy = || File::from(slave.try_clone().expect("a descriptor can be copied"));
        let mut process = Command::new(host::tool("setsid", "util-linux"));
        process
            .arg("--ctty")
            .arg(command.get_program())
            .args(command.get_args())
            .env("TERM", "vt100");
        if let Some(dir) = command.get_current_dir() {
            process.current_dir(dir);
        }
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => process.env(name, value),
                None => process.env_remove(name),
            };
        }
        process.stdin(copy()).stdout(copy()).stderr(copy());
        let mark = Mark::fresh();
        mark.put_on(&mut process);
        let child = process.spawn().expect("setsid can be run");

        let master = Arc::new(File::from(master));
        let screen = Capture::default();
        let hung_up = Arc::new(AtomicBool::new(false));
        let reader = watch(master.clone(), screen.clone(), hung_up.clone());
        Self {
            master: Some(master),
            slave,
            child,
            screen,
            seen: 0,
            reader: Some(reader),
            hung_up,
            mode_before,
            mark,
        }
    }

    /// Types `keys`.
    pub fn type_keys(&self, keys: &str) {
        let mut master = self.master.as_deref().expect("the terminal is not hung up");
        master.write_all(keys.as_bytes()).expect("a pty takes keys");
    }

    /// Waits until `text` appears after what was waited for before.
    #[track_caller]
    pub fn expect(&mut self, text: &str) {
        match self.screen.wait_for(self.seen, text, LIMIT) {
            Some(after) => self.seen = after,
            None => panic!("{text:?} does not appear on the terminal:\n{}", self.text()),
        }
    }

    /// All that has appeared.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.screen.bytes()).into_owned()
    }

    /// Changes the size of the terminal.
    pub fn resize(&self, rows: u16, columns: u16) {
        termios::tcsetwinsize(&self.slave, size(rows, columns)).expect("a pty can be resized");
    }

    /// Closes the terminal, as closing a window or losing a connection does.
    pub fn hang_up(&mut self) {
        self.hung_up.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader does not panic");
        }
        self.master = None;
    }

    /// The process id of mvm.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Waits for the end; the exit code, or 128+N after signal N.
    #[track_caller]
    pub fn wait(&mut self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status
                    .code()
                    .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            }
            if Instant::now() > deadline {
                panic!("mvm does not end; on its terminal:\n{}", self.text());
            }
            thread::sleep(POLL);
        }
    }

    /// No process of it may remain.
    #[track_caller]
    pub fn expect_nothing_left(&self) {
        let left = self.mark.left_over();
        assert!(left.is_empty(), "processes {left:?} are left");
    }

    /// The terminal must be in the mode in which mvm found it.
    #[track_caller]
    pub fn expect_mode_restored(&self) {
        assert_eq!(
            mode(&self.slave),
            self.mode_before,
            "the terminal's mode; on it:\n{}",
            self.text()
        );
    }

    /// The terminal must be in raw mode: keys go to the guest.
    #[track_caller]
    pub fn expect_raw_mode(&self) {
        assert_ne!(
            mode(&self.slave),
            self.mode_before,
            "the terminal is not in raw mode"
        );
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Both fail only where it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.hang_up();
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn mode(slave: &OwnedFd) -> String {
    match termios::tcgetattr(slave) {
        Ok(termios) => format!(
            "{:?} {:?} {:?} {:?}",
            termios.input_modes, termios.output_modes, termios.control_modes, termios.local_modes
        ),
        Err(error) => error.to_string(),
    }
}

/// ECMA-48 DSR 6, and its answer for the first line's first column.
const CURSOR_QUERY: &[u8] = b"\x1b[6n";
const CURSOR_REPORT: &[u8] = b"\x1b[1;1R";

fn count(text: &[u8], pattern: &[u8]) -> usize {
    text.windows(pattern.len())
        .filter(|window| *window == pattern)
        .count()
}

/// Collects what appears until the terminal is hung up, and answers as a terminal does.
fn watch(master: Arc<File>, screen: Capture, hung_up: Arc<AtomicBool>) -> JoinHandle<()> {
    let poll_time = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: POLL.subsec_nanos().into(),
    };
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        let mut answered = 0;
        while !hung_up.load(Ordering::Relaxed) {
            let mut wanted = [PollFd::new(&*master, PollFlags::IN)];
            if !matches!(poll(&mut wanted, Some(&poll_time)), Ok(1..)) {
                continue;
            }
            match (&*master).read(&mut buffer) {
                Ok(len @ 1..) => screen.push(&buffer[..len]),
                _ => break,
            }
            // A shell asks where the cursor is, and is in confusion about its line until it is told.
            let asked = count(&screen.bytes(), CURSOR_QUERY);
            for _ in answered..asked {
                // Fails only where the terminal has been closed.
                let _ = (&*master).write_all(CURSOR_REPORT);
            }
            answered = asked;
        }
        screen.end();
    })
}
