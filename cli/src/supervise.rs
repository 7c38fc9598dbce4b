//! Machines in the background: each is owned by a process of its own, the supervisor, which outlives
//! the command that started it.
//!
//! The supervisor says `ready` on its standard output when its command has started. Until then its standard
//! error is the caller's; what it has to say after that goes into the machine's log.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use clap::Parser;
use kernels::cache::Cache;

use crate::accel::{self, Choice};
use crate::args::{self, Cli, RunArgs};
use crate::owner::{self, Mode};
use crate::record::{self, Stream};
use crate::rootfs::Rootfs;
use crate::store::{Bytes, Definition, Name, Store};
use crate::timing::Timing;
use crate::{FAILED, host_root, prepare};

/// The longest line that is recorded as one.
const MAX_LINE: u64 = 4096;

/// `mvm run -d`: makes a machine, and returns when its command has started.
pub fn launch(args: &RunArgs, words: &[OsString]) -> Result<ExitCode> {
    if accel::is_outer() {
        bail!("a machine in the background belongs to the host: run mvm there");
    }
    // Whatever takes long is done here, where its progress is seen.
    let cache = Cache::open()?;
    prepare::machine(args, &cache)?;
    if let Choice::Tcg { .. } = accel::choose(args.host.accel)? {
        prepare::outer(args.host.yes, &cache)?;
    }
    let store = Store::open()?;
    let definition = Definition::new(words, captured(args))?;
    let claim = store.create(args.name.as_ref(), &definition)?;
    let name = claim.name().clone();
    drop(claim);
    let started = spawn(&store, &name);
    if !matches!(started, Ok(None)) {
        store.claim(&name)?.remove()?;
    }
    match started? {
        Some(code) => Ok(ExitCode::from(code)),
        None => {
            println!("{name}");
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// What `-e NAME`, and the host's root, take from the caller's environment.
fn captured(args: &RunArgs) -> Vec<(Bytes, Bytes)> {
    let unset = |item: &&OsString| !item.as_bytes().contains(&b'=');
    let named = args.env.iter().filter(unset);
    let named = named.filter_map(|name| Some((name.clone(), env::var_os(name)?)));
    let host = match Rootfs::of(args) {
        Rootfs::Host => host_root::environment(|name| env::var_os(name)),
        _ => Vec::new(),
    };
    host.into_iter()
        .chain(named)
        .map(|(name, value)| (name.into(), value.into()))
        .collect()
}

/// Starts the supervisor of a machine that nobody owns and waits until its command has started. Where it did
/// not, the supervisor has said why on standard error, and its exit code is returned.
pub fn spawn(store: &Store, name: &Name) -> Result<Option<u8>> {
    let definition = store.definition(name)?;
    let cwd = Path::new(definition.cwd.as_os_str());
    let environment = definition
        .env
        .iter()
        .map(|(name, value)| (name.as_os_str(), value.as_os_str()));
    let mut supervisor = Command::new(env::current_exe()?)
        .arg("supervise")
        .arg(name.as_str())
        .envs(environment)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .current_dir(cwd)
        .spawn()
        .with_context(|| {
            format!(
                "the supervisor of machine {name} cannot be started in {}",
                cwd.display()
            )
        })?;
    let mut said = String::new();
    if let Some(mut stdout) = supervisor.stdout.take() {
        stdout.read_to_string(&mut said)?;
    }
    if said.trim_end() == "ready" {
        return Ok(None);
    }
    let status = supervisor
        .wait()
        .context("the supervisor cannot be waited for")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(Some(code.filter(|&code| code != 0).unwrap_or(FAILED)))
}

/// The supervisor: owns the machine `name` until it has ended.
pub fn run(name: &Name) -> Result<ExitCode> {
    // Not a part of the caller's terminal session: its Ctrl-C and hang-up are not for us. Fails only
    // where this process leads a session already.
    let _ = rustix::process::setsid();
    let timing = Timing::start();
    let claim = Store::open()?.claim(name)?;
    let mut definition = claim.definition()?;
    let words: Vec<OsString> = definition
        .argv
        .iter()
        .map(|word| word.as_os_str().to_owned())
        .collect();
    let typed = ["mvm", "run"].into_iter().map(OsString::from);
    let cli = Cli::try_parse_from(typed.chain(words.iter().cloned()))
        .with_context(|| format!("machine {name} cannot be made from what was typed"))?;
    let args::Command::Run(args) = cli.command else {
        bail!("machine {name} cannot be made from what was typed");
    };
    if args.rm && !definition.ephemeral {
        // Not before it has an owner: one without is nobody's to keep.
        definition.ephemeral = true;
        claim.redefine(&definition)?;
    }
    owner::own(*args, &words, claim, Mode::Background, timing)
}

/// Tells whoever started this supervisor that the command has started; from here on its standard error goes to
/// `log`, which does not grow without bound whatever a guest makes it say.
pub fn say_ready(log: Arc<record::Writer>) -> Result<()> {
    println!("ready");
    let null = File::options().write(true).open("/dev/null")?;
    let (said, errors) = std::io::pipe().context("no pipe for the supervisor's messages")?;
    thread::Builder::new()
        .name("messages".into())
        .spawn(move || record_lines(said, &log))?;
    // The caller reads to the end of the pipe, so it has to end.
    rustix::stdio::dup2_stdout(&null).context("standard output cannot be closed")?;
    rustix::stdio::dup2_stderr(&errors).context("standard error cannot be closed")?;
    // Nothing keeps the directory in which the machine was started from being removed or unmounted.
    env::set_current_dir("/").context("the working directory cannot be left")?;
    Ok(())
}

fn record_lines(said: impl Read, log: &record::Writer) {
    let mut said = BufReader::new(said);
    let mut line = Vec::new();
    loop {
        line.clear();
        match said.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            // Standard error stays open as long as the process lives.
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let line = line.trim_ascii();
                let line = line.strip_prefix(b"mvm: ").unwrap_or(line);
                log.write(Stream::Note, line);
            }
        }
    }
}
