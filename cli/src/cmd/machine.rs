//! The verbs for machines that exist, each where it belongs.

use std::process::ExitCode;

use anyhow::Result;

use super::{connect, exec, inspect, lifecycle, logs, mount, port, ps, ssh_config, stats};
use crate::args::machine::MachineCommand;
use crate::control::client;
use crate::control::protocol::Op;
use crate::store::Store;

/// Runs one of the verbs.
pub fn run(command: MachineCommand) -> Result<ExitCode> {
    match command {
        MachineCommand::Ps { all, format } => ps::run(all, format),
        MachineCommand::Exec(args) => exec::run(&args),
        MachineCommand::Shell(args) => exec::shell(&args),
        MachineCommand::Logs(args) => logs::run(&args),
        MachineCommand::Stop { names, timeout } => lifecycle::stop(&names, timeout),
        MachineCommand::Kill { names, signal } => lifecycle::kill(&names, signal),
        MachineCommand::Wait { names } => lifecycle::wait(&names),
        MachineCommand::Start { names } => lifecycle::start(&names),
        MachineCommand::Restart { names, timeout } => lifecycle::restart(&names, timeout),
        MachineCommand::Rm { names, force } => lifecycle::remove(&names, force),
        MachineCommand::Inspect { names, format } => inspect::run(&names, format),
        MachineCommand::Stats {
            names,
            no_stream,
            format,
        } => stats::run(&names, no_stream, format),
        MachineCommand::Rename { from, to } => lifecycle::rename(&from, &to),
        MachineCommand::Pause { names } => lifecycle::ask_each(&names, &Op::Pause),
        MachineCommand::Resume { names } => lifecycle::ask_each(&names, &Op::Resume),
        MachineCommand::Port(command) => port::run(command),
        MachineCommand::Mount(command) => mount::run(command),
        MachineCommand::Connect { name, port } => {
            connect::run(|| client::agent(name.as_str()), name.as_str(), port)
        }
        MachineCommand::SshConfig { name, user } => {
            Store::open()?.check_exists(&name)?;
            ssh_config::run(name.as_str(), &user)
        }
    }
}
