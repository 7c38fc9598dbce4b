//! Where a machine's serial console goes: its last lines are kept, to be shown when a boot fails.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of console output that are kept.
const KEPT: usize = 16 << 10;

/// What is in the first line that x86's kernel prints of a fault of its own: `BUG()` and `WARN()`, page
/// faults, and the number that each `die()` has (`arch/x86/kernel/dumpstack.c`).
const FAULT: [&str; 3] = ["------------[ cut here ]", "BUG: ", " [#1]"];

/// The last part of what a guest printed, shared between the serial port and the main thread.
#[derive(Debug, Clone, Default)]
pub struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    /// The last `count` lines, each on a line of its own, without control characters.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = kept.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<String> = text
            .lines()
            .map(|line| line.chars().filter(|c| !c.is_control()).collect())
            .filter(|line: &String| !line.trim().is_empty())
            .collect();
        lines[lines.len().saturating_sub(count)..].to_vec()
    }

    /// What the guest's kernel said when it panicked, where it did: the reason, and up to `count` lines
    /// from the fault that led to it on, or from the panic where nothing else was printed.
    pub fn panic(&self, count: usize) -> Option<(String, Vec<String>)> {
        let lines = self.last_lines(usize::MAX);
        let (at, reason) = lines.iter().enumerate().find_map(|(at, line)| {
            let (_, reason) = line.split_once("Kernel panic - not syncing: ")?;
            Some((at, reason.to_owned()))
        })?;
        let from = lines[..at]
            .iter()
            .position(|line| FAULT.iter().any(|mark| line.contains(mark)));
        let shown = lines
            .into_iter()
            .skip(from.unwrap_or(at))
            .take(count)
            .collect();
        Some((reason, shown))
    }

    fn push(&self, data: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(data);
        let excess = kept.len().saturating_sub(KEPT);
        kept.drain(..excess);
    }
}

/// The serial port's output: into a [`Tail`], and on to a descriptor where somebody watches.
pub struct Console {
    tail: Tail,
    watch: Option<Box<dyn Write + Send>>,
}

impl Console {
    /// A console whose end is kept in `tail` and that is copied to `watch`.
    pub fn new(tail: Tail, watch: Option<Box<dyn Write + Send>>) -> Self {
        Self { tail, watch }
    }
}

impl Write for Console {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.tail.push(data);
        if let Some(watch) = &mut self.watch
            && watch.write_all(data).and_then(|()| watch.flush()).is_err()
        {
            // Whoever watched has gone; the guest goes on.
            self.watch = None;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_keeps_the_last_lines_and_no_more_than_its_bound() {
        let tail = Tail::default();
        let mut console = Console::new(tail.clone(), None);
        for line in 0..10_000 {
            writeln!(console, "line {line}\r").unwrap();
        }
        console.write_all(b"\x1b[2Jhalf").unwrap();
        assert_eq!(tail.last_lines(2), ["line 9999", "[2Jhalf"]);
        assert!(tail.0.lock().unwrap().len() <= KEPT);
    }

    #[test]
    fn a_panic_is_found_above_its_traces() {
        let tail = Tail::default();
        let mut console = Console::new(tail.clone(), None);
        console.write_all(b"[    1.0] fine\n").unwrap();
        assert_eq!(tail.panic(9), None);
        console
            .write_all(b"[    2.0] Kernel panic - not syncing: out of luck\r\n[    2.0] CPU: 0\r\n")
            .unwrap();
        let (reason, lines) = tail.panic(9).unwrap();
        assert_eq!((reason.as_str(), lines.len()), ("out of luck", 2));
    }

    #[test]
    fn a_panic_is_shown_with_the_fault_that_led_to_it() {
        let tail = Tail::default();
        let mut console = Console::new(tail.clone(), None);
        console
            .write_all(
                b"[    1.0] fine\n[    2.0] int3: 0000 [#1] SMP NOPTI\n[    2.0] RIP: 0010:here\n\
                  [    2.0] Kernel panic - not syncing: Attempted to kill the idle task!\n",
            )
            .unwrap();
        let (reason, lines) = tail.panic(9).unwrap();
        assert_eq!(reason, "Attempted to kill the idle task!");
        assert_eq!(
            (lines.len(), &*lines[0]),
            (3, "[    2.0] int3: 0000 [#1] SMP NOPTI")
        );
    }

    #[test]
    fn a_watcher_that_goes_away_does_not_stop_the_console() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let tail = Tail::default();
        let mut console = Console::new(tail.clone(), Some(Box::new(Broken)));
        console.write_all(b"one\ntwo\n").unwrap();
        assert_eq!(tail.last_lines(9), ["one", "two"]);
    }
}
