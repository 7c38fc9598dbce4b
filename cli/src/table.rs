//! What verbs print for people: aligned columns, sizes, times; and for programs: JSON.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

/// Rows of cells, the first of which is the head.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this head.
    pub fn new(head: &[&str]) -> Self {
        Self {
            rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()],
        }
    }

    /// Adds a row. Control characters in it are shown rather than sent to the terminal.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows
            .push(cells.iter().map(|cell| harmless(cell)).collect());
    }

    /// All of it, each row on a line.
    pub fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                let missing = width.saturating_sub(cell.chars().count()) + 2;
                line.extend(std::iter::repeat_n(' ', missing));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Writes `text` to standard output; false where nobody reads it any more, which is no failure.
pub fn print(text: &str) -> Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("standard output cannot be written"),
    }
}

/// Writes `value` to standard output, as JSON; false where nobody reads it any more.
pub fn print_json(value: &impl Serialize) -> Result<bool> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// `text` with its control characters written out.
pub fn harmless(text: &str) -> String {
    let mut safe = String::new();
    for character in text.chars() {
        match character.is_control() {
            true => safe.extend(character.escape_default()),
            false => safe.push(character),
        }
    }
    safe
}

/// `word` as a shell takes it for one word.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_=+,./:@%^".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The first `width` characters of `text`, and a sign where there are more.
pub fn shortened(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(width.saturating_sub(1)).collect();
    short.push('…');
    short
}

/// A time as people say it, in its largest unit: `5s`, `3m`, `7h`, `12d`.
pub fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A number of bytes with three digits and a unit: `0B`, `1.50KiB`, `12.0MiB`.
pub fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    if bytes < 1024 {
        return format!("{bytes}{unit}");
    }
    for next in units {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    match value {
        ..10.0 => format!("{value:.2}{unit}"),
        ..100.0 => format!("{value:.1}{unit}"),
        _ => format!("{value:.0}{unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_cells() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(vec!["é".to_owned(), "running".to_owned()]);
        table.row(vec!["longer".to_owned(), "x\x1b[2J".to_owned()]);
        assert_eq!(
            table.text(),
            "NAME    STATE\né       running\nlonger  x\\u{1b}[2J\n"
        );
    }

    #[test]
    fn words_are_quoted_where_a_shell_would_see_more_than_one() {
        let words = ["ls", "--cpus=2", "", "a b", "it's", "$x", "é"].map(quoted);
        assert_eq!(
            words,
            ["ls", "--cpus=2", "''", "'a b'", r"'it'\''s'", "'$x'", "é"]
        );
    }

    #[test]
    fn sizes_and_times_have_the_unit_that_fits() {
        let sizes = [0, 1023, 1024, 1536, 20 << 20, 999 << 30, u64::MAX].map(size);
        assert_eq!(
            sizes,
            [
                "0B", "1023B", "1.00KiB", "1.50KiB", "20.0MiB", "999GiB", "16.0EiB"
            ]
        );
        let spans = [0, 59, 60, 7199, 86_399, 864_000].map(|s| span(Duration::from_secs(s)));
        assert_eq!(spans, ["0s", "59s", "1m", "1h", "23h", "10d"]);
        assert_eq!(shortened("abcdef", 4), "abc…");
        assert_eq!(shortened("abcd", 4), "abcd");
    }
}
