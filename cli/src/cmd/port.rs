//! `mvm port`: what is published of a machine that runs.

use std::process::ExitCode;

use anyhow::{Result, bail};

use super::ps;
use crate::args::Format;
use crate::args::machine::{PortCommand, Switch};
use crate::control::client::{self, Client};
use crate::control::protocol::{Answer, Direction, Forward, Op};
use crate::forward::spec::{PortRange, Publish};
use crate::store::{Bytes, Name, Store};
use crate::table::{self, Table};

/// Runs one of the verbs.
pub fn run(command: PortCommand) -> Result<ExitCode> {
    match command {
        PortCommand::Add { name, ports } => {
            let publish = typed(&ports);
            table::print(&lines(&forwards(&name, Op::PortAdd { publish })?))?;
            if let Some(wide) = ports.iter().find(|port| port.is_wide()) {
                eprintln!(
                    "mvm: {wide} lets other computers reach the guest, not just programs of this one"
                );
            }
        }
        PortCommand::Rm { name, ports } => {
            let publish = typed(&ports);
            let reset = false;
            table::print(&lines(&forwards(&name, Op::PortRm { publish, reset })?))?;
        }
        PortCommand::Ls { name, format } => {
            let forwards = forwards(&name, Op::PortLs)?;
            match format {
                Format::Json => table::print_json(&forwards)?,
                Format::Table => table::print(&listed(&forwards).text())?,
            };
        }
        PortCommand::Auto { name, on, exclude } => auto(&name, on, exclude)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// With paths made absolute: the owner has another working directory.
fn typed(ports: &[Publish]) -> Vec<Bytes> {
    let ports = ports.iter().map(ToString::to_string);
    ports.map(|port| port.as_str().into()).collect()
}

fn forwards(name: &Name, op: Op) -> Result<Vec<Forward>> {
    let mut client = Client::connect(&Store::open()?, name)?;
    match client.ask(op)? {
        Answer::Forwards(forwards) => Ok(forwards),
        answer => Err(client.unexpected(&answer)),
    }
}

fn lines(forwards: &[Forward]) -> String {
    let lines = forwards.iter().map(|forward| ps::port(forward) + "\n");
    lines.collect()
}

fn listed(forwards: &[Forward]) -> Table {
    let mut table = Table::new(&["HOST", "", "GUEST", "PROTOCOL", "CONNECTIONS", "SOURCE"]);
    for forward in forwards {
        table.row(vec![
            forward.host.to_string(),
            match forward.direction {
                Direction::ToGuest => "->",
                Direction::ToHost => "<-",
            }
            .to_owned(),
            forward.guest.to_string(),
            forward.protocol.clone(),
            forward.connections.to_string(),
            if forward.auto { "auto" } else { "declared" }.to_owned(),
        ]);
    }
    table
}

fn auto(name: &Name, on: Option<Switch>, exclude: Option<Vec<PortRange>>) -> Result<()> {
    let op = Op::PortAuto {
        on: on.map(|switch| switch == Switch::On),
        exclude: exclude.map(|ranges| ranges.iter().flat_map(|range| range.ports()).collect()),
    };
    match client::ask(&Store::open()?, name, op)? {
        Answer::Auto { on, exclude } => {
            let word = if on { "on" } else { "off" };
            let exclude: Vec<_> = exclude.iter().map(u16::to_string).collect();
            let but = match exclude.is_empty() {
                true => String::new(),
                false => format!(", but not {}", exclude.join(", ")),
            };
            table::print(&format!("{word}{but}\n"))?;
            Ok(())
        }
        answer => bail!("the process that owns machine {name} answered something else: {answer:?}"),
    }
}
