//! Figures as a table for people.

use std::fmt::Write;
use std::time::Duration;

/// The rows, and what has to be reached in each: mvm's figure relative to another's.
const GOALS: &str = "\
| goal | of | reached |
| --- | --- | ---: |
";

/// What was measured of one way in one round.
pub struct Round {
    /// Bytes a second into the guest.
    pub up: f64,
    /// Bytes a second out of it.
    pub down: f64,
    /// From asking for a connection to the first byte's answer.
    pub latencies: Vec<Duration>,
    /// Requests a second.
    pub requests: f64,
}

/// What was measured of one way.
pub struct Figures {
    name: String,
    rounds: Vec<Round>,
}

impl Figures {
    /// Nothing yet.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            rounds: Vec::new(),
        }
    }

    /// Takes a round.
    pub fn push(&mut self, round: Round) {
        self.rounds.push(round);
    }

    fn median(&self, figure: impl Fn(&Round) -> f64) -> f64 {
        let mut figures: Vec<f64> = self.rounds.iter().map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
    }

    fn up(&self) -> f64 {
        self.median(|round| round.up)
    }

    fn down(&self) -> f64 {
        self.median(|round| round.down)
    }

    fn requests(&self) -> f64 {
        self.median(|round| round.requests)
    }

    /// In milliseconds; of all rounds together, as one has too few for a percentile of this kind.
    fn percentile(&self, percent: usize) -> f64 {
        let all = self.rounds.iter().flat_map(|round| &round.latencies);
        let mut all: Vec<_> = all.collect();
        all.sort();
        let at = (all.len() * percent / 100).min(all.len().saturating_sub(1));
        all.get(at)
            .map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
    }
}

/// The table; the figures are those of mvm, ssh, socat and vsock, in this order.
pub fn show(heading: &str, figures: &[Figures]) -> String {
    let mut table = format!(
        "{heading}\n\n\
         | way | into the guest, MB/s | out of it, MB/s | connection p50, ms | p99, ms | requests/s |\n\
         | --- | ---: | ---: | ---: | ---: | ---: |\n"
    );
    for way in figures {
        let _ = writeln!(
            table,
            "| {} | {:.1} | {:.1} | {:.1} | {:.1} | {:.0} |",
            way.name,
            way.up() / 1e6,
            way.down() / 1e6,
            way.percentile(50),
            way.percentile(99),
            way.requests(),
        );
    }
    let [mvm, ssh, _, vsock] = figures else {
        return table;
    };
    table.push('\n');
    table.push_str(GOALS);
    for (goal, of, reached) in [
        (
            "at least 3 times the throughput into the guest",
            "ssh -L",
            mvm.up() / ssh.up(),
        ),
        (
            "at least 3 times the throughput out of it",
            "ssh -L",
            mvm.down() / ssh.down(),
        ),
        (
            "at most 0.5 times the time to a connection, p50",
            "ssh -L",
            mvm.percentile(50) / ssh.percentile(50),
        ),
        (
            "at most 0.5 times the time to a connection, p99",
            "ssh -L",
            mvm.percentile(99) / ssh.percentile(99),
        ),
        (
            "at least 0.8 times the throughput into the guest",
            "vsock alone",
            mvm.up() / vsock.up(),
        ),
        (
            "at least 0.8 times the throughput out of it",
            "vsock alone",
            mvm.down() / vsock.down(),
        ),
    ] {
        let _ = writeln!(table, "| {goal} | {of} | {reached:.2} |");
    }
    table
}
