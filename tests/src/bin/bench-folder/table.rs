//! Figures as a table for people.

use std::collections::HashMap;
use std::fmt::Write;

/// What is measured of a piece of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// How long it takes.
    Seconds,
    /// So many bytes in the time.
    Throughput(u64),
    /// How often it is done in a second.
    Operations,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::Throughput(_) => "MB/s",
            Self::Operations => "per second",
        }
    }

    fn show(self, seconds: f64) -> String {
        match self {
            Self::Seconds if seconds < 10.0 => format!("{seconds:.2}"),
            Self::Seconds => format!("{seconds:.0}"),
            Self::Throughput(bytes) => format!("{:.0}", bytes as f64 / seconds / 1e6),
            Self::Operations => format!("{:.0}", 1.0 / seconds),
        }
    }
}

/// A goal: a row, and how much faster than another way mvm's has to be there.
pub struct Goal {
    /// The row.
    pub row: &'static str,
    /// The column.
    pub of: &'static str,
    /// At least so many times as fast.
    pub times: f64,
}

/// Seconds of each row and way, of all rounds.
#[derive(Debug, Default)]
pub struct Figures {
    seconds: HashMap<(String, String), Vec<f64>>,
}

impl Figures {
    /// Takes one.
    pub fn push(&mut self, row: &str, way: &str, seconds: f64) {
        let figures = self.seconds.entry((row.to_owned(), way.to_owned()));
        figures.or_default().push(seconds);
    }

    /// The median of the rounds.
    pub fn median(&self, row: &str, way: &str) -> Option<f64> {
        let mut all = self.seconds.get(&(row.to_owned(), way.to_owned()))?.clone();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied()
    }

    /// In thousandths of a second.
    fn percentile(&self, row: &str, way: &str, percent: usize) -> Option<f64> {
        let mut all = self.seconds.get(&(row.to_owned(), way.to_owned()))?.clone();
        all.sort_by(f64::total_cmp);
        let at = (all.len() * percent / 100).min(all.len().saturating_sub(1));
        all.get(at).map(|seconds| seconds * 1e3)
    }
}

/// The table of these rows and ways, then that of the goals.
pub fn show(
    heading: &str,
    figures: &Figures,
    rows: &[(&str, Unit)],
    ways: &[&str],
    goals: &[Goal],
) -> String {
    let mut table = format!("{heading}\n\n| work | unit | {} |\n", ways.join(" | "));
    let _ = writeln!(table, "| --- | --- |{}", " ---: |".repeat(ways.len()));
    for (row, unit) in rows {
        let cells = ways.iter().map(|way| {
            let figure = figures.median(row, way);
            figure.map_or_else(|| "–".to_owned(), |seconds| unit.show(seconds))
        });
        let cells: Vec<String> = cells.collect();
        let _ = writeln!(table, "| {row} | {} | {} |", unit.name(), cells.join(" | "));
    }
    table += "\n| goal | of | reached |\n| --- | --- | ---: |\n";
    for Goal { row, of, times } in goals {
        let both = (figures.median(row, ways[0]), figures.median(row, of));
        let reached = match both {
            (Some(ours), Some(theirs)) => format!("{:.2}", theirs / ours),
            _ => "–".to_owned(),
        };
        let _ = writeln!(
            table,
            "| {row}: at least {times:.2} times as fast | {of} | {reached} |"
        );
    }
    for (percent, goal) in [(50, ""), (99, ", at most 50")] {
        if let Some(delay) = figures.percentile("event", ways[0], percent) {
            let _ = writeln!(
                table,
                "| event of a change, ms, p{percent}{goal} | | {delay:.1} |"
            );
        }
    }
    table
}
