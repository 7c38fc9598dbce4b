//! `mvm cp`: files between the host and a machine, as `docker cp` copies them.
//!
//! One connection to the agent carries an archive in chunks; neither side stores it. What comes from a
//! machine is unpacked with `agent::archive`, which trusts nothing of it.

use std::io::{self, BufRead, IsTerminal, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, OnceLock};
use std::thread;

use agent::archive::{self, ArchiveError, ChunkReader, ChunkWriter, PackOptions, Policy, Root};
use agent::protocol::{self, FromUnpack, Landing, Open, Pack, Unpack};
use anyhow::{Context, Result, anyhow, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use crate::args::CpArgs;
use crate::copy;
use crate::progress::{Notes, Progress, harmless};

/// The exit code where not everything was copied, as with `cp`.
const FAILED: u8 = 1;

/// One end of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    /// A path in a machine.
    Machine { name: String, path: Vec<u8> },
    /// A path of this host.
    Host(Vec<u8>),
    /// An archive on standard input or output.
    Stream,
}

/// Copies what was asked for; `open` opens a connection to the agent of the machine of that name.
///
/// # Errors
/// Where the command line makes no sense or the machine is not reached. A copy that fails is told to the
/// caller, and is no error here.
pub fn run(args: &CpArgs, open: impl Fn(&str) -> Result<UnixStream>) -> Result<ExitCode> {
    let (from, to) = (
        End::parse(args.from.as_bytes()),
        End::parse(args.to.as_bytes()),
    );
    let (name, way) = match (&from, &to) {
        (End::Machine { name, path }, to @ (End::Host(_) | End::Stream)) => {
            (name, Way::Fetch { path, to })
        }
        (from @ (End::Host(_) | End::Stream), End::Machine { name, path }) => {
            (name, Way::Send { from, path })
        }
        (End::Machine { .. }, End::Machine { .. }) => bail!(
            "files are copied to or from a machine, not between two: write `mvm cp ONE:PATH - | mvm cp - OTHER:PATH`"
        ),
        _ => bail!("one of the two paths has to be in a machine: write it as NAME:PATH"),
    };
    if let Way::Fetch { path: b"", .. } | Way::Send { path: b"", .. } = way {
        bail!("there is no path behind {name}: write {name}:/ for the root of the machine");
    }
    let stream = open(name)?;
    let progress = Progress::new(args.quiet);
    let copy = Copy {
        args,
        progress: progress.clone(),
        interrupted: Interrupted::watch(&stream)?,
        stream,
    };
    let copied = match way {
        Way::Fetch { path, to } => copy.fetch(path, to),
        Way::Send { from, path } => copy.send(from, path),
    };
    progress.end(copied.is_ok().then_some(&*args.to.to_string_lossy()));
    if let Some(signal) = copy.interrupted.signal() {
        return Ok(ExitCode::from(u8::try_from(128 + signal).unwrap_or(FAILED)));
    }
    let Err(error) = copied else {
        return Ok(ExitCode::SUCCESS);
    };
    eprintln!("mvm: {}", harmless(&format!("{error:#}")));
    Ok(ExitCode::from(FAILED))
}

/// Which way a copy goes.
enum Way<'a> {
    Fetch { path: &'a [u8], to: &'a End },
    Send { from: &'a End, path: &'a [u8] },
}

impl End {
    /// Tells a path in a machine from one of the host by a colon, unless a slash or a dot stands before it,
    /// as `scp` and `docker cp` do.
    fn parse(text: &[u8]) -> Self {
        if text == b"-" {
            return Self::Stream;
        }
        let colon = text.iter().position(|&byte| byte == b':');
        let split = colon.and_then(|colon| text.split_at_checked(colon));
        let named = split.and_then(|(name, path)| Some((std::str::from_utf8(name).ok()?, path)));
        match named {
            Some((name, path))
                if !name.is_empty() && !name.starts_with('.') && !name.contains('/') =>
            {
                Self::Machine {
                    name: name.to_owned(),
                    path: path.get(1..).unwrap_or_default().to_vec(),
                }
            }
            _ => Self::Host(text.to_vec()),
        }
    }
}

/// A copy that is under way.
struct Copy<'a> {
    args: &'a CpArgs,
    progress: Progress,
    interrupted: Interrupted,
    stream: UnixStream,
}

impl Copy<'_> {
    /// Copies `path` of the machine to the host.
    fn fetch(&self, path: &[u8], to: &End) -> Result<()> {
        let base = base_name(path);
        if *to == End::Stream && io::stdout().is_terminal() {
            bail!("an archive is not written to a terminal: redirect standard output");
        }
        let request = Pack {
            path: path.to_vec(),
            name: match to {
                End::Stream => base.clone().unwrap_or_default(),
                _ => Vec::new(),
            },
            follow: self.args.follow_link,
            attributes: self.args.archive || *to == End::Stream,
        };
        self.ask(&Open::Pack(request))?;
        let mut sent = Notes::new(&self.progress);
        let counted = self.progress.counting(&self.stream);
        let chunks = ChunkReader::new(counted, |note| sent.add(&note));
        let End::Host(to) = to else {
            return write_out(chunks);
        };
        let policy = Policy {
            owned: self.args.archive,
            devices: false,
        };
        let mut own = Notes::new(&self.progress);
        let mut note = |note: String| own.add(&note);
        let landing = Landing::Tree(base);
        archive::unpack(Root::Own, to, &landing, policy, chunks, &mut note)?;
        Ok(())
    }

    /// Copies from the host to `path` of the machine.
    fn send(&self, from: &End, path: &[u8]) -> Result<()> {
        let landing = match from {
            End::Host(from) => Landing::Tree(base_name(from)),
            _ => Landing::Members,
        };
        if *from == End::Stream && io::stdin().is_terminal() {
            bail!("an archive is not read from a terminal: redirect standard input");
        }
        self.ask(&Open::Unpack(Unpack {
            path: path.to_vec(),
            landing,
            owned: self.args.archive,
        }))?;
        let own = self.start_sending(from)?;
        let mut notes = Notes::new(&self.progress);
        loop {
            match protocol::receive(&self.stream) {
                Ok(Some(FromUnpack::Note(note))) => notes.add(&note),
                Ok(Some(FromUnpack::Done(Ok(())))) => return Ok(own.recv()??),
                Ok(Some(FromUnpack::Done(Err(why)))) => {
                    // Where this side failed first, the other only repeats it.
                    let own = own.try_recv().ok().and_then(Result::err);
                    return match own {
                        Some(error) if !is_lost(&error) => Err(error.into()),
                        _ => Err(anyhow!(why)),
                    };
                }
                Ok(None) => return Err(ArchiveError::Lost.into()),
                Err(error) => {
                    return Err(error).context("the machine's agent gave no sensible answer");
                }
            }
        }
    }

    /// Sends the archive in a thread, so that the answer is seen as soon as it comes. Ends the stream; the
    /// channel tells how it went, before the other side is told.
    fn start_sending(&self, from: &End) -> Result<Receiver<Result<(), ArchiveError>>> {
        let stream = self.stream.try_clone().context("no descriptor is left")?;
        let (tell, told) = channel();
        let (from, progress) = (from.clone(), self.progress.clone());
        let options = PackOptions {
            name: Vec::new(),
            follow: self.args.follow_link,
            attributes: self.args.archive,
        };
        let send = move || {
            let mut notes = Notes::new(&progress);
            let out = ChunkWriter::new(progress.counting(&stream));
            let mut out = out.with_notes(move |note| notes.add(&note));
            let sent = match &from {
                End::Host(path) => archive::pack(Root::Own, path, &options, &mut out),
                _ => read_in(&mut out),
            };
            let end = sent.as_ref().map(|_| ()).map_err(ArchiveError::sentence);
            // The receiver has given up where it is gone.
            let _ = tell.send(sent);
            if let Err(error) = out.end(end) {
                tracing::debug!("the archive's end could not be sent: {error}");
            }
            let _ = stream.shutdown(Shutdown::Write);
        };
        let sender = thread::Builder::new().name("sender".into());
        sender.spawn(send).context("no thread for the archive")?;
        Ok(told)
    }

    fn ask(&self, open: &Open) -> Result<()> {
        protocol::send(&self.stream, open).context("the machine's agent is not reached")
    }
}

/// Copies an archive from the machine to standard output.
fn write_out(mut chunks: impl BufRead) -> Result<()> {
    loop {
        let bytes = chunks.fill_buf().map_err(ArchiveError::stream)?;
        if bytes.is_empty() {
            return Ok(());
        }
        copy::write_all(rustix::stdio::stdout(), bytes)
            .context("standard output cannot be written")?;
        let len = bytes.len();
        chunks.consume(len);
    }
}

/// Copies standard input into an archive on its way.
fn read_in<W: Write>(out: &mut ChunkWriter<W>) -> Result<(), ArchiveError> {
    loop {
        let room = out.room().map_err(ArchiveError::stream)?;
        let read = copy::read(rustix::stdio::stdin(), room);
        match read.map_err(|error| ArchiveError::Stream(error.into()))? {
            0 => return Ok(()),
            len => out.advance(len),
        }
    }
}

fn is_lost(error: &ArchiveError) -> bool {
    matches!(error, ArchiveError::Lost)
}

/// What a copy of `path` is called in a directory; None where its content goes there.
fn base_name(path: &[u8]) -> Option<Vec<u8>> {
    let trimmed = path.strip_suffix(b"/.").map(|_| b"".as_slice());
    let path = trimmed.unwrap_or(path);
    let end = path.iter().rposition(|&byte| byte != b'/')?;
    let path = path.get(..=end)?;
    let name = path.rsplit(|&byte| byte == b'/').next()?;
    (!matches!(name, b"" | b"." | b"..")).then(|| name.to_vec())
}

/// Whether a signal asked this process to end.
///
/// It then ends the connection instead of the process, so that the half of a file that is there is removed,
/// on either side.
struct Interrupted {
    by: Arc<OnceLock<i32>>,
    watching: Handle,
}

impl Interrupted {
    fn watch(stream: &UnixStream) -> Result<Self> {
        let stream = stream.try_clone().context("no descriptor is left")?;
        let mut signals =
            Signals::new([SIGHUP, SIGINT, SIGTERM]).context("signals cannot be caught")?;
        let watching = signals.handle();
        let by = Arc::new(OnceLock::new());
        let first = Arc::clone(&by);
        let watch = move || {
            for signal in signals.forever() {
                if first.set(signal).is_err() {
                    // The second one does not wait for anything.
                    std::process::exit(128 + signal);
                }
                let _ = stream.shutdown(Shutdown::Both);
            }
        };
        let watcher = thread::Builder::new().name("signals".into());
        watcher.spawn(watch).context("no thread for signals")?;
        Ok(Self { by, watching })
    }

    fn signal(&self) -> Option<i32> {
        self.by.get().copied()
    }
}

impl Drop for Interrupted {
    fn drop(&mut self) {
        self.watching.close();
    }
}

#[cfg(test)]
#[path = "cp_tests.rs"]
mod tests;
