//! `mvm`: the command line.
//!
//! `args` is what was typed, `resolve` what it means, `cmd` holds one verb a file.

mod accel;
mod args;
mod cmd;
mod console;
mod control;
mod copy;
mod descriptors;
mod dirs;
mod event;
mod folder;
mod foreground;
mod forward;
mod guest;
mod host_root;
mod instance;
mod kernel;
mod link;
mod lock;
mod owner;
mod prepare;
mod progress;
mod record;
mod resolve;
mod rootfs;
mod session;
mod spares;
mod store;
mod supervise;
mod survey;
mod table;
mod terminal;
mod threads;
mod timing;
mod uds;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing::Level;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use args::{Cli, Command};

/// The exit code when mvm or the machine failed, as with Docker.
const FAILED: u8 = 125;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    if let Some(qemu) = accel::trampoline(&arguments) {
        return report(qemu.map(|()| ExitCode::SUCCESS));
    }
    let cli = Cli::parse_from(&arguments);
    watch_log(matches!(&cli.command, Command::Run(run) if run.verbose));
    report(match cli.command {
        Command::Run(run) => cmd::run::run(*run, arguments.get(2..).unwrap_or_default()),
        Command::Machine(command) => cmd::machine::run(command),
        Command::Supervise { name } => supervise::run(&name),
        Command::Runner(run) => instance::runner::run(&run),
        Command::Cp(copy) => cmd::cp::run(&copy, control::client::agent),
        Command::Kernel(command) => cmd::kernel::run(command),
        Command::Accel(command) => cmd::accel::run(command),
        Command::Doctor(doctor) => cmd::doctor::run(&doctor),
    })
}

/// Messages of the libraries: warnings, or what MVM_LOG asks for.
fn watch_log(verbose: bool) {
    let default = if verbose { Level::INFO } else { Level::WARN };
    let filter = std::env::var("MVM_LOG")
        .ok()
        .and_then(|wanted| wanted.parse().ok())
        .unwrap_or_else(|| Targets::new().with_default(default));
    let messages = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .without_time();
    tracing_subscriber::registry()
        .with(messages.with_filter(filter))
        .init();
}

fn report(result: anyhow::Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mvm: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}
