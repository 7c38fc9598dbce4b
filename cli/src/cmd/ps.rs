//! `mvm ps`: the machines there are, and how they are.

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use crate::args::Format;
use crate::control::protocol::{Direction, Forward};
use crate::store::{Bytes, Store, Timestamp};
use crate::survey::{Status, Survey};
use crate::table::{self, Table, shortened, span};

/// Characters of a command that are shown.
const COMMAND_WIDTH: usize = 40;

/// A machine as programs get it.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    status: Status,
    /// Where it ended with one.
    exit_code: Option<u8>,
    /// Where it failed, or is not known better: one sentence.
    error: Option<String>,
    created: Option<Timestamp>,
    started: Option<Timestamp>,
    ended: Option<Timestamp>,
    /// Of the process that owns it.
    pid: Option<u32>,
    cpus: Option<u32>,
    memory: Option<u64>,
    command: Vec<Bytes>,
    ports: Vec<Forward>,
}

/// Prints the list: all machines, or all but those that ended as they should.
pub fn run(all: bool, format: Format) -> Result<ExitCode> {
    let mut surveys = Survey::all(&Store::open()?)?;
    surveys.retain(|survey| all || !matches!(survey.status, Status::Exited | Status::Failed));
    match format {
        Format::Json => table::print_json(&surveys.into_iter().map(row).collect::<Vec<_>>())?,
        Format::Table => table::print(&listed(&surveys).text())?,
    };
    Ok(ExitCode::SUCCESS)
}

fn listed(surveys: &[Survey]) -> Table {
    let mut table = Table::new(&["NAME", "STATUS", "CREATED", "COMMAND", "PORTS"]);
    for survey in surveys {
        let created = survey.definition.as_ref().map(|made| made.created);
        let words = survey.command();
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        let ports = survey.machine.iter().flat_map(|machine| &machine.forwards);
        let ports: Vec<_> = ports.map(port).collect();
        table.row(vec![
            survey.name.to_string(),
            status(survey),
            created.map_or_else(String::new, |at| format!("{} ago", span(at.age()))),
            shortened(&words.join(" "), COMMAND_WIDTH),
            ports.join(", "),
        ]);
    }
    table
}

/// How a machine is, and since when.
pub fn status(survey: &Survey) -> String {
    let word = survey.status.word();
    match (&survey.ending, &survey.owner) {
        (Some(ending), _) if survey.status == Status::Exited => {
            format!("{word} ({}) {} ago", ending.code, span(ending.at.age()))
        }
        (Some(ending), _) => format!("{word} {} ago", span(ending.at.age())),
        (None, Some(owner)) => format!("{word} {}", span(owner.since.age())),
        (None, None) => word.to_owned(),
    }
}

/// A forward as it is shown in one word.
pub fn port(forward: &Forward) -> String {
    let protocol = match forward.protocol.as_str() {
        "udp" => "/udp",
        _ => "",
    };
    match forward.direction {
        Direction::ToGuest => format!("{}->{}{protocol}", forward.host, forward.guest),
        Direction::ToHost => format!("{}<-{}{protocol}", forward.host, forward.guest),
    }
}

fn row(survey: Survey) -> Row {
    let command = survey.command().iter().map(Bytes::from).collect();
    let (ending, machine) = (survey.ending.as_ref(), survey.machine);
    Row {
        name: survey.name.to_string(),
        status: survey.status,
        exit_code: ending.map(|ending| ending.code),
        error: ending
            .and_then(|ending| ending.error.clone())
            .or(survey.trouble),
        created: survey.definition.map(|made| made.created),
        started: survey.owner.as_ref().map(|owner| owner.since),
        ended: ending.map(|ending| ending.at),
        pid: survey.owner.map(|owner| owner.pid),
        cpus: machine.as_ref().map(|machine| machine.cpus),
        memory: machine.as_ref().map(|machine| machine.memory),
        command,
        ports: machine.map_or_else(Vec::new, |machine| machine.forwards),
    }
}
