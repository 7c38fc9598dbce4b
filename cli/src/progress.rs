//! How far a copy is: shown on a terminal while it runs.

use std::io::{IsTerminal, Read, Write, stderr};
use std::time::Duration;

use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};

/// How often a moving display is drawn.
const TICK: Duration = Duration::from_millis(100);

/// Notes that are shown; of others only the number.
const MAX_NOTES: u64 = 20;

/// The longest note, in characters.
const MAX_NOTE: usize = 2000;

/// Counts bytes, and shows their number and rate. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// Shown on standard error where that is a terminal and `quiet` is not set.
    pub fn new(quiet: bool) -> Self {
        if quiet || !stderr().is_terminal() {
            let bar = ProgressBar::hidden();
            return Self { bar };
        }
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {bytes} copied, {bytes_per_sec}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        bar.enable_steady_tick(TICK);
        Self { bar }
    }

    /// Counts what is read and written through `stream`.
    pub fn counting<S>(&self, stream: S) -> Counting<S> {
        let progress = self.clone();
        Counting { stream, progress }
    }

    /// Prints a line on standard error.
    pub fn line(&self, text: &str) {
        self.bar.suspend(|| eprintln!("mvm: {text}"));
    }

    /// Ends the display: on a terminal with a line that says how much was copied `to` where.
    pub fn end(&self, copied: Option<&str>) {
        let (shown, bytes) = (!self.bar.is_hidden(), self.bar.position());
        self.bar.finish_and_clear();
        if let (true, Some(to)) = (shown, copied) {
            eprintln!("mvm: copied {} to {to}", BinaryBytes(bytes));
        }
    }
}

/// A stream whose bytes are counted.
#[derive(Debug)]
pub struct Counting<S> {
    stream: S,
    progress: Progress,
}

impl<S: Read> Read for Counting<S> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = self.stream.read(buffer)?;
        self.progress.bar.inc(len as u64);
        Ok(len)
    }
}

impl<S: Write> Write for Counting<S> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let len = self.stream.write(bytes)?;
        self.progress.bar.inc(len as u64);
        Ok(len)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}

/// Notes of a copy, of which there may be as many as there are files.
#[derive(Debug)]
pub struct Notes {
    progress: Progress,
    count: u64,
}

impl Notes {
    /// Printed beside `progress`.
    pub fn new(progress: &Progress) -> Self {
        let progress = progress.clone();
        Self { progress, count: 0 }
    }

    /// Prints a note, or counts it.
    pub fn add(&mut self, note: &str) {
        self.count += 1;
        if self.count <= MAX_NOTES {
            self.progress.line(&harmless(note));
        }
    }
}

impl Drop for Notes {
    fn drop(&mut self) {
        if let Some(more @ 1..) = self.count.checked_sub(MAX_NOTES) {
            self.progress.line(&format!("{more} more such notes"));
        }
    }
}

/// What a guest wrote, such that it does not steer the terminal, and is not endless.
pub fn harmless(text: &str) -> String {
    let mut safe = String::new();
    for character in text.chars().take(MAX_NOTE) {
        if character.is_control() {
            safe.extend(character.escape_default());
        } else {
            safe.push(character);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_does_not_steer_the_terminal_and_ends() {
        assert_eq!(
            harmless("\x1b[2J\u{9b}1m\r\n é"),
            "\\u{1b}[2J\\u{9b}1m\\r\\n é"
        );
        assert_eq!(harmless(&"x".repeat(1 << 20)).len(), MAX_NOTE);
    }
}
