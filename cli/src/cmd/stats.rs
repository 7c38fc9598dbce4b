//! `mvm stats`: what machines use, measured between two looks.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::FAILED;
use crate::args::Format;
use crate::control::client;
use crate::control::protocol::{Answer, DiskStats, NetStats, Op, Stats};
use crate::store::{Name, Store};
use crate::table::{self, Table, size};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Clears a terminal's screen and begins at its top.
const CLEAR: &str = "\x1b[H\x1b[2J\x1b[3J";

/// A machine as programs get it.
#[derive(Debug, Serialize)]
struct Row<'a> {
    name: &'a Name,
    /// Of one CPU: a machine with two can use 200.
    cpu_percent: f64,
    #[serde(flatten)]
    stats: &'a Stats,
}

/// Shows what `names`, or all that run, use.
pub fn run(names: &[Name], no_stream: bool, format: Format) -> Result<ExitCode> {
    let store = Store::open()?;
    for name in names {
        store.check_exists(name)?;
    }
    let mut before = look(&store, names)?;
    if !names.is_empty() && before.is_empty() {
        // It was said why.
        return Ok(ExitCode::from(FAILED));
    }
    loop {
        thread::sleep(INTERVAL);
        let now = look(&store, names)?;
        let rows: Vec<_> = now
            .iter()
            .map(|(name, stats)| Row {
                name,
                cpu_percent: before
                    .get(name)
                    .map_or(0.0, |before| percent(before, stats)),
                stats,
            })
            .collect();
        let clear = !no_stream && format == Format::Table && std::io::stdout().is_terminal();
        let text = match format {
            Format::Json if no_stream => format!("{}\n", serde_json::to_string_pretty(&rows)?),
            Format::Json => format!("{}\n", serde_json::to_string(&rows)?),
            Format::Table => shown(&rows).text(),
        };
        if !table::print(&if clear {
            format!("{CLEAR}{text}")
        } else {
            text
        })? {
            return Ok(ExitCode::SUCCESS);
        }
        if no_stream {
            let all = names.iter().all(|name| now.contains_key(name));
            return Ok(ExitCode::from(if all { 0 } else { FAILED }));
        }
        if !names.is_empty() && now.is_empty() {
            // Nothing more will come.
            return Ok(ExitCode::SUCCESS);
        }
        before = now;
    }
}

/// What those that run have used so far.
fn look(store: &Store, names: &[Name]) -> Result<BTreeMap<Name, Stats>> {
    let running = match names {
        [] => store
            .names()?
            .into_iter()
            .filter(|name| store.is_owned(name))
            .collect(),
        names => names.to_vec(),
    };
    let mut found = BTreeMap::new();
    for name in running {
        match client::ask(store, &name, Op::Stats) {
            Ok(Answer::Stats(stats)) => drop(found.insert(name, *stats)),
            Ok(answer) => tracing::warn!("machine {name} answered something else: {answer:?}"),
            // One that ends while it is looked at is no failure of all the others.
            Err(error) => eprintln!("mvm: {error:#}"),
        }
    }
    Ok(found)
}

fn percent(before: &Stats, now: &Stats) -> f64 {
    let time = now.at_ns.saturating_sub(before.at_ns);
    let used = now.cpu_ns.saturating_sub(before.cpu_ns);
    if time == 0 {
        return 0.0;
    }
    used as f64 * 100.0 / time as f64
}

fn shown(rows: &[Row<'_>]) -> Table {
    let mut table = Table::new(&[
        "NAME",
        "CPU",
        "MEMORY",
        "OF",
        "DISK READ",
        "WRITTEN",
        "NET IN",
        "OUT",
        "VSOCK IN",
        "OUT",
        "FORWARDED",
    ]);
    for Row {
        name,
        cpu_percent,
        stats,
    } in rows
    {
        let disks = |value: fn(&_) -> u64| size(stats.disks.iter().map(value).sum());
        let nets = |value: fn(&_) -> u64| size(stats.nets.iter().map(value).sum());
        table.row(vec![
            name.to_string(),
            format!("{cpu_percent:.1}%"),
            size(stats.memory_resident),
            size(stats.memory),
            disks(|disk: &DiskStats| disk.read_bytes),
            disks(|disk: &DiskStats| disk.written_bytes),
            nets(|net: &NetStats| net.received_bytes),
            nets(|net: &NetStats| net.sent_bytes),
            size(stats.vsock.received_bytes),
            size(stats.vsock.sent_bytes),
            stats.forwarded_total.to_string(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_a_cpu_is_that_between_two_looks() {
        let at = |at_ns, cpu_ns| Stats {
            at_ns,
            cpu_ns,
            ..Stats::default()
        };
        assert_eq!(percent(&at(0, 0), &at(1_000, 500)), 50.0);
        assert_eq!(percent(&at(1_000, 500), &at(2_000, 2_500)), 200.0);
        // One that was started anew meanwhile, or is looked at twice at once.
        assert_eq!(percent(&at(1_000, 500), &at(2_000, 0)), 0.0);
        assert_eq!(percent(&at(1_000, 500), &at(1_000, 900)), 0.0);
    }
}
