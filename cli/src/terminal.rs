//! The caller's terminal: raw mode while a guest program owns the keyboard, and its size.

use std::io;

use agent::protocol::WindowSize;
use rustix::termios::{self, OptionalActions, Termios};

/// Raw mode of standard input, undone when this is dropped.
#[derive(Debug)]
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Puts the terminal of standard input into raw mode; None where it is no terminal.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = rustix::stdio::stdin();
        if !termios::isatty(stdin) {
            return Ok(None);
        }
        let before = termios::tcgetattr(stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that has been closed has nothing left to restore.
        let _ = termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Flush, &self.before);
    }
}

/// The size of the caller's terminal, or 24 by 80 where there is none.
pub fn window_size() -> WindowSize {
    [rustix::stdio::stdout(), rustix::stdio::stdin()]
        .into_iter()
        .filter_map(|fd| termios::tcgetwinsize(fd).ok())
        .find(|size| size.ws_row > 0 && size.ws_col > 0)
        .map_or(WindowSize { rows: 24, cols: 80 }, |size| WindowSize {
            rows: size.ws_row,
            cols: size.ws_col,
        })
}

/// Whether standard input is a terminal.
pub fn stdin_is_terminal() -> bool {
    termios::isatty(rustix::stdio::stdin())
}

/// Whether a read of standard input would be answered rather than stop this process: a job in the
/// background of its terminal must leave the keyboard alone.
pub fn stdin_is_ours() -> bool {
    let stdin = rustix::stdio::stdin();
    if !termios::isatty(stdin) {
        return true;
    }
    match termios::tcgetpgrp(stdin) {
        Ok(foreground) => foreground == rustix::process::getpgrp(),
        // Not our controlling terminal: no job control applies.
        Err(_) => true,
    }
}
