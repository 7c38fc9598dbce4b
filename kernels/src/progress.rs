//! How long-running work reports how far it has come.

use std::io::{self, IsTerminal, Read};
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What a step's figures count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes of a file.
    Bytes,
    /// Things done: files, compiler runs.
    Items,
}

/// Receives the progress of one piece of work, which is a sequence of steps.
pub trait Progress: Send + Sync {
    /// A new step begins and the one before it, if any, has ended well. `total` is the
    /// [`Progress::position`] at which it will be complete; None where that is not known.
    fn step(&self, message: &str, total: Option<u64>, unit: Unit);

    /// The current step has come this far.
    fn position(&self, position: u64);

    /// The last step has ended well. Work that fails ends without it.
    fn finish(&self);
}

/// Reports nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn step(&self, _message: &str, _total: Option<u64>, _unit: Unit) {}
    fn position(&self, _position: u64) {}
    fn finish(&self) {}
}

/// Reports on stderr: a bar where that is a terminal, one line per step elsewhere.
#[derive(Debug, Default)]
pub struct Stderr {
    bar: Mutex<Option<ProgressBar>>,
}

impl Stderr {
    /// A reporter that has written nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn replace(&self, bar: Option<ProgressBar>) {
        let mut current = self.bar.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(old) = std::mem::replace(&mut *current, bar) {
            old.finish_and_clear();
        }
    }
}

impl Progress for Stderr {
    fn step(&self, message: &str, total: Option<u64>, unit: Unit) {
        if !std::io::stderr().is_terminal() {
            eprintln!("{message}");
            return;
        }
        let template = match (total, unit) {
            (None, _) => "{spinner} {msg} ({elapsed})",
            (Some(_), Unit::Bytes) => "{msg} [{bar:30}] {bytes}/{total_bytes}, {eta} left",
            (Some(_), Unit::Items) => "{msg} [{bar:30}] {percent}%, {eta} left",
        };
        let style =
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = match total {
            Some(total) => ProgressBar::new(total),
            None => ProgressBar::new_spinner(),
        };
        bar.set_draw_target(ProgressDrawTarget::stderr());
        bar.set_style(style);
        bar.set_message(message.to_owned());
        bar.enable_steady_tick(Duration::from_millis(250));
        self.replace(Some(bar));
    }

    fn position(&self, position: u64) {
        if let Some(bar) = &*self.bar.lock().unwrap_or_else(|e| e.into_inner()) {
            bar.set_position(position);
        }
    }

    fn finish(&self) {
        self.replace(None);
    }
}

impl Drop for Stderr {
    fn drop(&mut self) {
        self.replace(None);
    }
}

/// A reader that reports how far it has come.
pub(crate) struct Counted<'a, R> {
    inner: R,
    position: u64,
    progress: &'a dyn Progress,
}

impl<'a, R: Read> Counted<'a, R> {
    /// A reader of `inner` that reports to `progress`, whose step it is.
    pub(crate) fn new(inner: R, progress: &'a dyn Progress) -> Self {
        Self {
            inner,
            position: 0,
            progress,
        }
    }
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.position = self.position.saturating_add(n as u64);
        self.progress.position(self.position);
        Ok(n)
    }
}
