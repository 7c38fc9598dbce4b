//! `mvm run`: one machine, one command, one exit code.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use kernels::cache::Cache;

use crate::accel::{self, Choice};
use crate::args::RunArgs;
use crate::host_root::{HostRoot, explain};
use crate::owner::{self, Mode};
use crate::store::{Definition, Store};
use crate::timing::Timing;
use crate::{prepare, resolve, supervise};

/// Runs the machine that `args` describe; `words` are the same as typed, without `mvm run`.
pub fn run(args: RunArgs, words: &[OsString]) -> Result<ExitCode> {
    let timing = Timing::start();
    if args.root.explain {
        return show_host_root(&args);
    }
    if args.detach {
        return supervise::launch(&args, words);
    }
    if !accel::is_outer() {
        let cache = Cache::open()?;
        prepare::machine(&args, &cache)?;
        if let Choice::Tcg { .. } = accel::choose(args.host.accel)? {
            prepare::outer(args.host.yes, &cache)?;
        }
    }
    let mut definition = Definition::new(words, Vec::new())?;
    definition.ephemeral = true;
    let claim = Store::open()?.create(args.name.as_ref(), &definition)?;
    owner::own(args, words, claim, Mode::Attached, timing)
}

/// Lists what of the host the machine would have.
fn show_host_root(args: &RunArgs) -> Result<ExitCode> {
    let root = HostRoot::of(args, &args.folder.volume)?;
    let root = root.context("at the console a machine has nothing of the host's files")?;
    let user = resolve::user(args, Some(&root)).unwrap_or_default();
    let workdir = args.workdir.as_deref().map(Path::new);
    let workdir = workdir.unwrap_or(&root.caller().cwd);
    let command = explain::Command { user, workdir };
    explain::print(&root, &args.folder.volume, &command, args.root.format)?;
    Ok(ExitCode::SUCCESS)
}
