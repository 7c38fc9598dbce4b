//! `mvm logs`: what a machine printed.

use std::os::fd::BorrowedFd;
use std::process::ExitCode;

use anyhow::{Context, Result};
use rustix::io::Errno;

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
    let mut show = |stream, data: &[u8]| {
        let (to, note);
        let data = match stream {
            Stream::Stdout | Stream::Terminal | Stream::Console => {
                to = rustix::stdio::stdout();
                data
            }
            Stream::Stderr => {
                to = rustix::stdio::stderr();
                data
            }
            Stream::Note => {
                to = rustix::stdio::stderr();
                note = [b"mvm: ", data.trim_ascii_end(), b"\n"].concat();
                &note
            }
        };
        write(to, data)
    };
    let shown = record::read(&dir, set, args.since, args.follow, &mut show);
    match shown {
        // Whoever does not read any more knows.
        Err(error) if is_unread(&error) => Ok(ExitCode::SUCCESS),
        shown => shown.map(|()| ExitCode::SUCCESS),
    }
}

fn write(to: BorrowedFd<'_>, data: &[u8]) -> Result<()> {
    copy::write_all(to, data).context("output cannot be written")
}

/// Whether `error` is that nobody reads the output any more.
fn is_unread(error: &anyhow::Error) -> bool {
    error.downcast_ref() == Some(&Errno::PIPE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn that_nobody_reads_is_told_from_other_failures() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        write(writer.as_fd(), b"read").unwrap();
        drop(reader);
        let error = write(writer.as_fd(), b"unread").unwrap_err();
        assert!(is_unread(&error), "{error:#}");
        let full = std::fs::File::create("/dev/full").unwrap();
        let error = write(full.as_fd(), b"lost").unwrap_err();
        assert!(!is_unread(&error), "{error:#}");
    }
}
