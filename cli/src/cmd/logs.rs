//! `mvm logs`: what a machine printed.

use std::io;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::args::machine::LogsArgs;
use crate::copy;
use crate::record::{self, Stream};
use crate::store::Store;

/// Copies the records: what was standard error to standard error, all else to standard output.
pub fn run(args: &LogsArgs) -> Result<ExitCode> {
    let store = Store::open()?;
    store.check_exists(&args.name)?;
    let set = match args.console {
        true => record::CONSOLE,
        false => record::LOG,
    };
    let dir = store.dir(&args.name);
    let shown = record::read(&dir, set, args.since, args.follow, &mut show);
    match shown {
        // Whoever does not read any more knows.
        Err(error) if is_broken_pipe(&error) => Ok(ExitCode::SUCCESS),
        shown => shown.map(|()| ExitCode::SUCCESS),
    }
}

fn show(stream: Stream, data: &[u8]) -> Result<()> {
    match stream {
        Stream::Stdout | Stream::Terminal | Stream::Console => {
            copy::write_all(rustix::stdio::stdout(), data)
        }
        Stream::Stderr => copy::write_all(rustix::stdio::stderr(), data),
        Stream::Note => {
            let sentence = data.trim_ascii_end();
            let note = [b"mvm: ", sentence, b"\n"].concat();
            copy::write_all(rustix::stdio::stderr(), &note)
        }
    }
    .context("output cannot be written")
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}
