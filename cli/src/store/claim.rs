//! Owning a machine: one process at a time, for its whole life.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::definition::{Bytes, Definition, Ending, VERSION};
use super::file::{self, Durability};
use super::{DEFINITION, ENDING, Locks, Name, Owner, Store, socket};

/// A machine that belongs to this process until this is dropped.
///
/// Its socket and what is told of it vanish with it; a process that is killed leaves them behind, except
/// that the kernel gives its lock back. Lock order: a machine's own lock before that of the name that it gets.
#[derive(Debug)]
pub struct Claim {
    pub(super) store: Store,
    pub(super) name: Name,
    /// The last field, as it is given back last.
    pub(super) _locks: Locks,
}

impl Claim {
    /// The machine's name.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The directory of what outlives this process.
    pub fn dir(&self) -> PathBuf {
        self.store.dir(&self.name)
    }

    /// What the machine is made from.
    pub fn definition(&self) -> Result<Definition> {
        self.store.definition(&self.name)
    }

    /// Writes down a change of what the machine is made from.
    pub fn redefine(&self, definition: &Definition) -> Result<()> {
        file::write(&self.dir(), DEFINITION, definition, Durability::Disk)
    }

    /// The machine is about to run: how it last ended is forgotten, and whose it is told.
    pub fn started(&self) -> Result<()> {
        let owner = Owner::this_process(&self.store.socket(&self.name));
        let name = self.store.owner_file(&self.name);
        file::write(&self.store.owners, &name, &owner, Durability::Memory)?;
        file::remove(&self.dir().join(ENDING))
    }

    /// The machine has ended. Until this is said, one whose owner has gone counts as killed.
    pub fn ended(&self, ending: &Ending) -> Result<()> {
        file::write(&self.dir(), ENDING, ending, Durability::Disk)
    }

    /// Listens at the machine's control socket, in the place of one that a killed owner left.
    pub fn bind(&self) -> Result<UnixListener> {
        let path = self.store.socket(&self.name);
        file::remove(&path)?;
        socket::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))
    }

    /// Gives the machine another name; nothing has changed where this fails.
    ///
    /// Killed half-way, the machine has one of the two names, and what the other one left is of no
    /// consequence: the directory of its state decides.
    pub fn rename(&mut self, to: &Name) -> Result<()> {
        if *to == self.name {
            return Ok(());
        }
        let Some(locks) = self.store.lock(to)? else {
            bail!("there is a machine named {to} already, which is running");
        };
        let dir = self.store.dir(to);
        match fs::rename(self.dir(), &dir) {
            Ok(()) => {}
            Err(error) if is_taken(&error) => bail!("there is a machine named {to} already"),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot make {}", dir.display()));
            }
        }
        let before = std::mem::replace(&mut self.name, to.clone());
        // From here on it has the new name. The socket moves with what listens at it.
        let socket = fs::rename(self.store.socket(&before), self.store.socket(to));
        if let Err(error) = socket
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("the control socket of {to} is still named {before}: {error}");
        }
        if let Err(error) = self.move_owner(&before) {
            tracing::warn!("it is not told who owns {to}: {error:#}");
        }
        self.store.clean_up(&before);
        // Last: nobody takes the old name while there is anything of this machine at it.
        self._locks = locks;
        Ok(())
    }

    /// Tells of the machine's new name what was told of that `before`.
    fn move_owner(&self, before: &Name) -> Result<()> {
        let before = self.store.owners.join(self.store.owner_file(before));
        let Some(mut owner) = file::read::<Owner>(&before, VERSION)? else {
            return Ok(());
        };
        owner.socket = Bytes(self.store.socket(&self.name).into_os_string().into_vec());
        let name = self.store.owner_file(&self.name);
        file::write(&self.store.owners, &name, &owner, Durability::Memory)
    }

    /// Removes the machine and all that is kept of it.
    pub fn remove(self) -> Result<()> {
        self.store.discard(&self.name)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.store.clean_up(&self.name);
    }
}

/// Whether a directory could not be moved because there is one with something in it.
pub(super) fn is_taken(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::DirectoryNotEmpty
            | io::ErrorKind::AlreadyExists
            | io::ErrorKind::NotADirectory
    )
}
