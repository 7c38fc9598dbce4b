//! Machines as they are on disk: what they are made from, who owns them, how they ended.
//!
//! | file | what it is | who writes it |
//! | --- | --- | --- |
//! | `STATE/machines/NAME/machine.json` | [`Definition`] | who makes the machine, then its owner |
//! | `STATE/machines/NAME/exit.json` | [`Ending`]; missing while it runs | its owner |
//! | `STATE/machines/NAME/log`, `console`, … | [`crate::record`] | its owner |
//! | `STATE/owners/NAME.lock` | locked for as long as somebody owns the machine | its owner |
//! | `STATE/owners/NAME.json` | [`Owner`] | its owner |
//! | `RUNTIME/machines/NAME.lock` | locked for as long as `NAME.sock` belongs to somebody | its owner |
//! | `RUNTIME/machines/NAME.sock` | [`crate::control`] | its owner |
//!
//! RUNTIME may be another one for a job without a session, and vanishes when its user logs out: whose a machine is
//! does not depend on it. It may as well serve several STATEs, whose machines are not to have one socket.
//!
//! A machine is there when its directory is, which appears and vanishes whole, by rename. Whether it runs is
//! never read from a file: the lock tells, which the kernel gives back when the owner dies.

mod claim;
mod definition;
mod file;
mod name;
mod socket;
#[cfg(test)]
mod tests;

use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

pub use claim::Claim;
pub use definition::{Bytes, Changes, Definition, Ending, Timestamp, VERSION};
pub use name::Name;

use crate::dirs;
use crate::lock::{self, Lock};
use file::Durability;

/// The file of a [`Definition`] in a machine's directory.
const DEFINITION: &str = "machine.json";

/// The file of an [`Ending`] in a machine's directory.
const ENDING: &str = "exit.json";

/// What directories are called that are not a machine yet.
const STAGING: &str = ".new-";

/// What directories are called that are not a machine any more.
const TRASH: &str = ".gone-";

/// How long a directory in [`STAGING`] can be somebody's who is about to finish it.
const STAGING_LIFE: Duration = Duration::from_secs(3600);

/// The directories in which this user's machines are.
#[derive(Debug, Clone)]
pub struct Store {
    state: PathBuf,
    owners: PathBuf,
    runtime: PathBuf,
}

/// What the owner of a machine tells of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    version: u32,
    /// Its process id. It is that of another process where the machine's lock is free.
    pub pid: u32,
    /// The version of its mvm.
    pub mvm: String,
    /// When it started the machine.
    pub since: Timestamp,
    /// Where it answers.
    pub socket: Bytes,
}

impl Owner {
    /// This process, which answers at `socket`.
    fn this_process(socket: &Path) -> Self {
        Self {
            version: VERSION,
            pid: std::process::id(),
            mvm: env!("CARGO_PKG_VERSION").to_owned(),
            since: Timestamp::now(),
            socket: Bytes(socket.as_os_str().as_bytes().to_vec()),
        }
    }
}

/// How a machine stands, as its lock and its last ending tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// A process owns it: it starts, runs, is paused, or is about to end.
    Owned,
    /// Its owner wrote down how it ended.
    Ended(Ending),
    /// Its owner was killed, or the host went down under it.
    Killed,
}

/// What the owner of a machine holds.
#[derive(Debug)]
struct Locks {
    /// The name of its control socket.
    _socket: Lock,
    /// The machine; given back last.
    _machine: Lock,
}

/// A machine of a list.
#[derive(Debug)]
pub struct Entry {
    /// Its name.
    pub name: Name,
    /// What it is made from, or why that cannot be told.
    pub definition: Result<Definition>,
    /// How it stands, or why that cannot be told.
    pub standing: Result<Standing>,
}

impl Store {
    /// That of this user.
    pub fn open() -> Result<Self> {
        Self::at(&dirs::state()?, &dirs::runtime()?)
    }

    /// One in these directories of mvm.
    pub fn at(state: &Path, runtime: &Path) -> Result<Self> {
        let store = Self {
            state: state.join("machines"),
            owners: state.join("owners"),
            runtime: runtime.join("machines"),
        };
        for dir in [&store.state, &store.owners, &store.runtime] {
            let made = DirBuilder::new().mode(0o700).recursive(true).create(dir);
            made.with_context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(store)
    }

    /// The names of all machines, in order.
    pub fn names(&self) -> Result<Vec<Name>> {
        let unreadable = || format!("cannot read {}", self.state.display());
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.state).with_context(unreadable)? {
            let name = entry.with_context(unreadable)?.file_name();
            // Whatever is called otherwise is being made or removed, or nothing of mvm's.
            names.extend(name.to_str().and_then(|name| name.parse::<Name>().ok()));
        }
        names.sort();
        Ok(names)
    }

    /// All machines, in the order of their names. One that is damaged does not hide the others.
    pub fn list(&self) -> Result<Vec<Entry>> {
        self.sweep();
        let mut entries = Vec::new();
        for name in self.names()? {
            let definition = self.definition(&name);
            let standing = self.standing(&name);
            // One that was removed meanwhile is none.
            if self.exists(&name) {
                entries.push(Entry {
                    name,
                    definition,
                    standing,
                });
            }
        }
        Ok(entries)
    }

    /// Whether there is a machine of this name.
    pub fn exists(&self, name: &Name) -> bool {
        fs::symlink_metadata(self.dir(name)).is_ok()
    }

    /// Fails with a sentence that names similar machines unless there is one of this name.
    pub fn check_exists(&self, name: &Name) -> Result<()> {
        if self.exists(name) {
            return Ok(());
        }
        let near = name.near(&self.names()?);
        match near.as_slice() {
            [] => bail!("there is no machine named {name}: `mvm ps -a` lists all"),
            near => {
                let near: Vec<_> = near.iter().map(Name::as_str).collect();
                bail!(
                    "there is no machine named {name}; did you mean {}?",
                    near.join(" or ")
                )
            }
        }
    }

    /// What the machine is made from.
    pub fn definition(&self, name: &Name) -> Result<Definition> {
        let path = self.dir(name).join(DEFINITION);
        file::read(&path, VERSION)?.with_context(|| format!("{} is missing", path.display()))
    }

    /// How the machine stands.
    pub fn standing(&self, name: &Name) -> Result<Standing> {
        if self.is_owned(name) {
            return Ok(Standing::Owned);
        }
        let ending = file::read(&self.dir(name).join(ENDING), VERSION)?;
        // It may have been started between the two looks.
        if self.is_owned(name) {
            return Ok(Standing::Owned);
        }
        Ok(ending.map_or(Standing::Killed, Standing::Ended))
    }

    /// Whether a process owns the machine.
    pub fn is_owned(&self, name: &Name) -> bool {
        lock::is_held(&self.lock_file(name))
    }

    /// What the owner of the machine said of itself; None where nobody owns it, or its owner has not said it yet.
    pub fn owner(&self, name: &Name) -> Result<Option<Owner>> {
        if !self.is_owned(name) {
            return Ok(None);
        }
        file::read(&self.owners.join(self.owner_file(name)), VERSION)
    }

    /// Makes a machine of this name, or of a generated one, owned by this process.
    ///
    /// Of several that make one of the same name at once, exactly one does.
    pub fn create(&self, name: Option<&Name>, definition: &Definition) -> Result<Claim> {
        self.sweep();
        if let Some(name) = name {
            return self.make(name, definition)?.ok_or_else(|| {
                anyhow!(
                    "there is a machine named {name} already: start it with `mvm start {name}`, \
                     remove it with `mvm rm {name}`, or take another --name"
                )
            });
        }
        for attempt in 0..1000 {
            let name = Name::generate(attempt / 10)?;
            if self.exists(&name) || self.is_owned(&name) {
                continue;
            }
            if let Some(claim) = self.make(&name, definition)? {
                return Ok(claim);
            }
        }
        bail!("no name is left for the machine: take one with --name")
    }

    /// None where there is one of this name.
    fn make(&self, name: &Name, definition: &Definition) -> Result<Option<Claim>> {
        let Some(locks) = self.lock(name)? else {
            bail!("a machine named {name} is running: stop it, or take another --name");
        };
        let staging = self.partial(STAGING, name);
        let made = DirBuilder::new().mode(0o700).create(&staging);
        made.with_context(|| format!("cannot make {}", staging.display()))?;
        // One that does not outlive its process need not outlive the host's crash either.
        let durability = match definition.ephemeral {
            true => Durability::Memory,
            false => Durability::Disk,
        };
        let done =
            file::write(&staging, DEFINITION, definition, durability).and_then(
                |()| match fs::rename(&staging, self.dir(name)) {
                    Ok(()) => Ok(true),
                    Err(error) if claim::is_taken(&error) => Ok(false),
                    Err(error) => Err(error)
                        .with_context(|| format!("cannot make {}", self.dir(name).display())),
                },
            );
        if !matches!(done, Ok(true)) {
            // Another sweep takes it where this does not.
            let _ = fs::remove_dir_all(&staging);
        }
        Ok(done?.then(|| Claim {
            store: self.clone(),
            name: name.clone(),
            _locks: locks,
        }))
    }

    /// Takes possession of a machine that exists and that nobody owns.
    pub fn claim(&self, name: &Name) -> Result<Claim> {
        self.check_exists(name)?;
        let Some(locks) = self.lock(name)? else {
            bail!("machine {name} is running: stop it first, with `mvm stop {name}`");
        };
        let claim = Claim {
            store: self.clone(),
            name: name.clone(),
            _locks: locks,
        };
        // It may have been removed or renamed until it was locked.
        self.check_exists(name)?;
        Ok(claim)
    }

    /// None where another process owns a machine of this name.
    fn lock(&self, name: &Name) -> Result<Option<Locks>> {
        let Some(machine) = Lock::attempt(&self.lock_file(name))? else {
            return Ok(None);
        };
        let socket = Lock::attempt(&self.runtime.join(lock_name(name)))?.with_context(|| {
            format!(
                "a machine named {name} runs that was started with another XDG_STATE_HOME: take \
                 another --name"
            )
        })?;
        Ok(Some(Locks {
            _socket: socket,
            _machine: machine,
        }))
    }

    /// Connects to the control socket of a machine's owner.
    pub fn connect(&self, name: &Name, patience: Duration) -> io::Result<UnixStream> {
        socket::connect(&self.socket_of_owner(name), patience)
    }

    /// Where the owner of a machine says that it answers, or would if it were this process.
    pub fn socket_of_owner(&self, name: &Name) -> PathBuf {
        match self.owner(name) {
            Ok(Some(owner)) => PathBuf::from(owner.socket.as_os_str()),
            _ => self.socket(name),
        }
    }

    /// The directory of what outlives a machine's process.
    pub fn dir(&self, name: &Name) -> PathBuf {
        self.state.join(name.as_str())
    }

    /// Where the machine's control socket is while this process owns it.
    fn socket(&self, name: &Name) -> PathBuf {
        self.runtime.join(format!("{name}.sock"))
    }

    fn lock_file(&self, name: &Name) -> PathBuf {
        self.owners.join(lock_name(name))
    }

    fn owner_file(&self, name: &Name) -> String {
        format!("{name}.json")
    }

    /// Removes what an owner leaves besides its locks. To be called with the locks held.
    fn clean_up(&self, name: &Name) {
        for path in [self.socket(name), self.owners.join(self.owner_file(name))] {
            if let Err(error) = file::remove(&path) {
                tracing::warn!("{error:#}");
            }
        }
    }

    /// Removes all that is kept of a machine. To be called with its lock held.
    fn discard(&self, name: &Name) -> Result<()> {
        let dir = self.dir(name);
        let trash = self.partial(TRASH, name);
        // In one step, so that nobody sees half a machine.
        fs::rename(&dir, &trash).with_context(|| format!("cannot remove {}", dir.display()))?;
        match fs::remove_dir_all(&trash) {
            // Another process sweeps.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done.with_context(|| format!("cannot remove {}", trash.display())),
        }
    }

    /// A path for what is not, or not any more, the machine `name`. To be called with its lock held, so that what
    /// is there already can only be from a process that was killed.
    fn partial(&self, prefix: &str, name: &Name) -> PathBuf {
        let path = self
            .state
            .join(format!("{prefix}{name}.{}", std::process::id()));
        if let Err(error) = fs::remove_dir_all(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("{} is left behind: {error}", path.display());
        }
        path
    }

    /// Removes what processes that were killed half-way have left; what cannot be removed is of no consequence.
    fn sweep(&self) {
        for path in paths_in(&self.state) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let old = || {
                let made = fs::symlink_metadata(&path).and_then(|found| found.modified());
                let now = SystemTime::now();
                made.is_ok_and(|made| now.duration_since(made).is_ok_and(|age| age > STAGING_LIFE))
            };
            if name.starts_with(TRASH) || name.starts_with(STAGING) && old() {
                tracing::debug!("removing {}", path.display());
                let _ = fs::remove_dir_all(&path);
            }
        }
        for name in self.names().unwrap_or_default() {
            if self.is_owned(&name) || !self.definition(&name).is_ok_and(|found| found.ephemeral) {
                continue;
            }
            // Another process may have been faster.
            if let Ok(claim) = self.claim(&name)
                && let Err(error) = claim.remove()
            {
                tracing::warn!("{error:#}");
            }
        }
        let left = [&self.owners, &self.runtime].map(|dir| paths_in(dir));
        for path in left.into_iter().flatten() {
            let stem = path.file_stem().and_then(OsStr::to_str);
            let Some(name) = stem.and_then(|stem| stem.parse::<Name>().ok()) else {
                continue;
            };
            if self.exists(&name) || self.is_owned(&name) {
                continue;
            }
            // It takes the locks, so that nobody makes such a machine meanwhile, and takes them away.
            if let Ok(Some(_locks)) = self.lock(&name)
                && !self.exists(&name)
            {
                self.clean_up(&name);
            }
        }
    }
}

fn lock_name(name: &Name) -> String {
    format!("{name}.lock")
}

/// What is in `dir`, as far as it can be read.
fn paths_in(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map_or_else(
        |_| Vec::new(),
        |entries| entries.flatten().map(|entry| entry.path()).collect(),
    )
}
