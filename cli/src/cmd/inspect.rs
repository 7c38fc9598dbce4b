//! `mvm inspect`: all that is known of machines.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use super::ps;
use crate::FAILED;
use crate::args::Format;
use crate::store::{Bytes, Name, Store};
use crate::survey::Survey;
use crate::table::{self, harmless, quoted, size};

/// A machine as programs get it.
#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    survey: Survey,
    /// What is kept of it.
    dir: PathBuf,
    /// Where its owner is reached.
    socket: PathBuf,
}

/// Prints what is known of each; those that do not exist are told of and do not hide the others.
pub fn run(names: &[Name], format: Format) -> Result<ExitCode> {
    let store = Store::open()?;
    let mut code = ExitCode::SUCCESS;
    let mut reports = Vec::new();
    for name in names {
        match Survey::one(&store, name) {
            Ok(survey) => reports.push(Report {
                survey,
                dir: store.dir(name),
                socket: store.socket_of_owner(name),
            }),
            Err(error) => {
                eprintln!("mvm: {error:#}");
                code = ExitCode::from(FAILED);
            }
        }
    }
    match format {
        Format::Json => table::print_json(&reports)?,
        Format::Table => {
            let shown: Vec<_> = reports.iter().map(shown).collect();
            table::print(&shown.join("\n"))?
        }
    };
    Ok(code)
}

fn shown(report: &Report) -> String {
    let survey = &report.survey;
    let mut lines = vec![
        ("name", survey.name.to_string()),
        ("status", ps::status(survey)),
    ];
    lines.extend(survey.trouble.iter().map(|why| ("trouble", why.clone())));
    let error = survey
        .ending
        .as_ref()
        .and_then(|ending| ending.error.clone());
    lines.extend(error.map(|error| ("error", error)));
    if let Some(definition) = &survey.definition {
        lines.push(("created", definition.created.to_string()));
        lines.push(("typed", typed(&definition.argv)));
        lines.push(("in", definition.cwd.to_string()));
    }
    if let Some(owner) = &survey.owner {
        lines.push(("started", owner.since.to_string()));
        lines.push(("process", format!("{} (mvm {})", owner.pid, owner.mvm)));
    }
    if let Some(machine) = &survey.machine {
        lines.push(("runs on", machine.accel.clone()));
        lines.extend(
            machine
                .kernel
                .iter()
                .map(|kernel| ("kernel", kernel.clone())),
        );
        lines.push(("cpus", machine.cpus.to_string()));
        lines.push(("memory", size(machine.memory)));
        for disk in &machine.disks {
            let only = if disk.read_only { " (read-only)" } else { "" };
            lines.push(("disk", format!("{}{only}", disk.path)));
        }
        lines.extend(machine.tap.iter().map(|tap| ("network", tap.clone())));
        let mounts = machine.mounts.iter();
        lines.extend(mounts.map(|mount| ("folder", super::mount::shown(mount))));
        lines.extend(
            machine
                .forwards
                .iter()
                .map(|forward| ("forward", ps::port(forward))),
        );
        if machine.auto {
            lines.push(("publishes", "every port that listens".to_owned()));
        }
        lines.extend(machine.socks.map(|port| ("proxy", format!("port {port}"))));
        let notes = machine.notes.iter();
        lines.extend(notes.map(|(name, note)| (name.as_str(), note.clone())));
    }
    lines.push(("files", report.dir.display().to_string()));
    if survey.is_owned() {
        lines.push(("socket", report.socket.display().to_string()));
    }
    lines
        .iter()
        .map(|(name, value)| format!("{name:<10} {}\n", harmless(value)))
        .collect()
}

fn typed(words: &[Bytes]) -> String {
    let words: Vec<_> = words.iter().map(|word| quoted(&word.to_string())).collect();
    format!("mvm run {}", words.join(" "))
}
