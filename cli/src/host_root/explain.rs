//! `mvm run --explain`: what of the host a machine would have.

use anyhow::Result;
use serde::Serialize;
use share::Readers;

use super::{Access, Exposed, HostRoot};
use crate::args::Format;
use crate::folder::spec::Volume;
use crate::table::{self, Table};

/// All of it, for programs.
#[derive(Debug, Serialize)]
struct Explanation {
    /// Who the command runs as.
    user: String,
    /// Where it runs.
    workdir: String,
    /// What is shown, shared or hidden.
    paths: Vec<Path>,
    /// What the caller is to be told.
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Path {
    path: String,
    access: &'static str,
    why: String,
}

/// The machine's command.
#[derive(Debug)]
pub struct Command<'a> {
    /// Who it runs as.
    pub user: String,
    /// Where it runs.
    pub workdir: &'a std::path::Path,
}

/// Prints what `root` comes to, and with it the folders that are shared besides.
pub fn print(
    root: &HostRoot,
    volumes: &[Volume],
    command: &Command<'_>,
    format: Format,
) -> Result<()> {
    let volumes = volumes.iter().map(|volume| Path {
        path: volume.host.to_string_lossy().into_owned(),
        access: if volume.read_only {
            "read-all"
        } else {
            "write"
        },
        why: format!("--volume, at {} in the guest", volume.guest.display()),
    });
    let explanation = Explanation {
        user: command.user.clone(),
        workdir: command.workdir.to_string_lossy().into_owned(),
        paths: root.exposed().iter().map(path).chain(volumes).collect(),
        notes: root.notes().map(str::to_owned).collect(),
    };
    match format {
        Format::Json => table::print_json(&explanation)?,
        Format::Table => table::print(&text(&explanation))?,
    };
    Ok(())
}

fn path(exposed: &Exposed) -> Path {
    Path {
        path: exposed.path.to_string_lossy().into_owned(),
        access: match exposed.access {
            Access::Read(Readers::Everybody) => "read",
            Access::Read(Readers::Owner) => "read-own",
            Access::Read(Readers::Process) => "read-all",
            Access::Write => "write",
            Access::Hidden => "hidden",
        },
        why: exposed.why.clone(),
    }
}

fn text(explanation: &Explanation) -> String {
    let mut paths = Table::new(&["PATH", "ACCESS", "WHY"]);
    for path in &explanation.paths {
        paths.row(vec![
            path.path.clone(),
            path.access.to_owned(),
            path.why.clone(),
        ]);
    }
    let mut text = paths.text();
    text.push_str(&format!(
        "\nread      what everybody on this host may read; changes stay in the guest\n\
         read-own  also what is yours, but no credentials; changes stay in the guest\n\
         read-all  all that you may read; changes stay in the guest\n\
         write     changes are made on this host\n\n\
         The command runs as {} in {}. Nothing else of this host's files is in the machine.\n",
        table::harmless(&explanation.user),
        table::harmless(&explanation.workdir),
    ));
    for note in &explanation.notes {
        text.push_str(&format!("Note: {}\n", table::harmless(note)));
    }
    text
}
