//! `mvm accel`: the outer Linux that is used where KVM cannot run a guest.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kernels::cache::Cache;
use serde::Serialize;
use vmm::probe;

use crate::accel::state::{Description, Files};
use crate::accel::{client, supervisor};
use crate::args::{AccelCommand, Format};
use crate::link::{self, Link};
use crate::{prepare, terminal};

/// How long the outer Linux may take to end.
const STOP: Duration = Duration::from_secs(30);

/// How often it is looked at meanwhile.
const POLL: Duration = Duration::from_millis(50);

/// Runs one of the verbs.
pub fn run(command: AccelCommand) -> Result<ExitCode> {
    match command {
        AccelCommand::Supervise => supervisor::run(),
        AccelCommand::Status { format } => status(format),
        AccelCommand::Start { yes } => {
            prepare::outer(yes, &Cache::open()?)?;
            client::ensure_started(&Files::of_this_program()?, None)?;
            Ok(ExitCode::SUCCESS)
        }
        AccelCommand::Stop => stop(),
        AccelCommand::Exec { command } => {
            prepare::outer(false, &Cache::open()?)?;
            let size = terminal::stdin_is_terminal().then(terminal::window_size);
            client::run(
                "a command for the outer Linux",
                client::exec(&command, size),
            )
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    kvm: String,
    machines_run_by: &'static str,
    outer: Option<Description>,
    log: String,
}

fn status(format: Format) -> Result<ExitCode> {
    let files = Files::of_this_program()?;
    let verdict = probe::kvm();
    let report = Report {
        machines_run_by: match verdict {
            probe::KvmVerdict::Works => "kvm",
            _ => "tcg",
        },
        kvm: verdict.to_string(),
        outer: files.description()?,
        log: files.log().display().to_string(),
    };
    if format == Format::Json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("kvm:   {}", report.kvm);
    println!("accel: {}", report.machines_run_by);
    match &report.outer {
        None => println!("outer: not running"),
        Some(outer) => println!(
            "outer: Linux {} with {} CPUs and {} MiB, process {}, log {}",
            outer.kernel,
            outer.cpus,
            outer.memory >> 20,
            outer.pid,
            report.log
        ),
    }
    Ok(ExitCode::SUCCESS)
}

fn stop() -> Result<ExitCode> {
    let files = Files::of_this_program()?;
    if !client::is_up(&files) {
        println!("the outer Linux is not running");
        return Ok(ExitCode::SUCCESS);
    }
    let link = Link::Socket(files.socket());
    let _asked = link::ask_to_power_off(&link, supervisor::POWER_OFF_GRACE)
        .context("the outer Linux cannot be reached")?;
    let deadline = Instant::now() + STOP;
    while files.is_supervised() {
        if Instant::now() > deadline {
            bail!("the outer Linux did not end within {} s", STOP.as_secs());
        }
        thread::sleep(POLL);
    }
    Ok(ExitCode::SUCCESS)
}
