//! `mvm run`: one machine, one command, one exit code.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use kernels::cache::Cache;

use crate::accel::{self, Choice};
use crate::args::RunArgs;
use crate::owner::{self, Mode};
use crate::store::{Definition, Store};
use crate::timing::Timing;
use crate::{prepare, supervise};

/// Runs the machine that `args` describe; `words` are the same as typed, without `mvm run`.
pub fn run(args: RunArgs, words: &[OsString]) -> Result<ExitCode> {
    let timing = Timing::start();
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
