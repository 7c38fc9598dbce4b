//! The root of a machine that is given none: the host's own, read-only, as a user without privileges sees
//! it, and the working directory to work in.
//!
//! [`HostRoot`] is what that comes to for one caller. What is known of hosts is in [`known`].

mod caller;
pub mod explain;
mod gather;
mod known;
mod paths;
mod project;
#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use share::{Readers, View};

pub use self::caller::{Caller, environment};
use self::gather::Gathering;
use self::paths::{absolute, is_guests_own, real};
use crate::args::RunArgs;
use crate::folder::spec::Volume;
use crate::rootfs::{Mode, Rootfs, split_mode};

/// What is done with a path of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Its files are there, as far as these may read them; changes stay in the guest.
    Read(Readers),
    /// It is shared: changes are the host's.
    Write,
    /// It is not there.
    Hidden,
}

/// A path of the host, and what becomes of it in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exposed {
    /// The path, absolute, the same in the guest.
    pub path: PathBuf,
    /// What is done with it.
    pub access: Access,
    /// Why; some words.
    pub why: String,
}

impl Exposed {
    fn new(path: &Path, access: Access, why: &str) -> Self {
        Self {
            path: path.to_owned(),
            access,
            why: why.to_owned(),
        }
    }
}

/// What was asked for besides what is shown by itself.
#[derive(Debug, Default)]
pub struct Asked<'a> {
    /// `--host-path PATH[:ro|rw]`
    pub show: &'a [OsString],
    /// `--no-host-path PATH`
    pub hide: &'a [OsString],
    /// Paths of the guest at which something else is mounted.
    pub mounted: &'a [PathBuf],
}

/// The host's root as one caller's machine has it.
#[derive(Debug)]
pub struct HostRoot {
    caller: Caller,
    exposed: Vec<Exposed>,
    /// Why the working directory is not shared, where nobody asked for that.
    unshared: Option<String>,
    notes: Vec<String>,
}

impl HostRoot {
    /// That of a machine from `args` with these folders, if it has the host's root.
    ///
    /// # Errors
    /// Those of [`HostRoot::new`].
    pub fn of(args: &RunArgs, volumes: &[Volume]) -> Result<Option<Self>> {
        if Rootfs::of(args) != Rootfs::Host {
            return Ok(None);
        }
        let mounted: Vec<_> = volumes.iter().map(|volume| volume.guest.clone()).collect();
        let asked = Asked {
            show: &args.root.host_path,
            hide: &args.root.no_host_path,
            mounted: &mounted,
        };
        Self::new(Caller::of_this_process()?, &asked).map(Some)
    }

    /// What `caller` gets.
    ///
    /// # Errors
    /// Where a path was asked for that cannot be shown.
    pub fn new(caller: Caller, asked: &Asked<'_>) -> Result<Self> {
        let mut hidden = Vec::new();
        for path in asked.hide {
            let path = absolute(Path::new(path), &caller.cwd);
            if path.parent().is_none() {
                bail!(
                    "--no-host-path / leaves nothing: `--rootfs none` is a root without the host's files"
                );
            }
            hidden.push(path);
        }
        let shown: Vec<_> = asked
            .show
            .iter()
            .map(|text| given(text, &caller.cwd))
            .collect::<Result<_>>()?;
        let mut writable: Vec<_> = shown
            .iter()
            .filter(|(_, is_writable)| *is_writable)
            .map(|(path, _)| Exposed::new(path, Access::Write, "--host-path"))
            .collect();
        let is_elsewhere = |path: &PathBuf| caller.cwd.starts_with(path);
        let is_decided = hidden.iter().chain(asked.mounted).any(is_elsewhere)
            || writable.iter().any(|exposed| is_elsewhere(&exposed.path));
        let mut unshared = None;
        if !is_decided {
            match project::check(&caller) {
                Ok(()) => writable.push(Exposed::new(
                    &caller.cwd,
                    Access::Write,
                    "working directory",
                )),
                Err(why) => {
                    unshared = Some(format!(
                        "the working directory is not shared, as {} {why}: changes there stay in the guest; \
                     `--host-path .:rw` shares it",
                        caller.cwd.display()
                    ))
                }
            }
        }
        let project = writable.iter().map(|exposed| exposed.path.as_path());
        let mut gathering =
            Gathering::new(&caller, project.clone().find(|path| *path == caller.cwd));
        for path in &hidden {
            gathering.hide(path, "--no-host-path");
        }
        for (path, is_writable) in &shown {
            if !is_writable {
                gathering.show(path, "--host-path");
            }
        }
        let (mut exposed, notes) = (gathering.exposed, gathering.notes);
        // Those that others are in come first, and are mounted first.
        writable.sort_by(|a, b| a.path.cmp(&b.path));
        exposed.append(&mut writable);
        Ok(Self {
            caller,
            exposed,
            unshared,
            notes,
        })
    }

    /// What is shown of the host's root.
    pub fn view(&self) -> View {
        let mut view = View::default();
        for path in gather::secrets(&self.caller) {
            view.hide(&path);
        }
        view.hide_names(known::CREDENTIAL_NAMES.iter().copied());
        for exposed in &self.exposed {
            match exposed.access {
                Access::Read(readers) => paths::steps(&exposed.path)
                    .iter()
                    .filter(|step| !is_guests_own(step))
                    .for_each(|step| view.show(step, readers)),
                Access::Hidden => {
                    view.hide(&exposed.path);
                    view.hide(&real(&exposed.path));
                }
                Access::Write => {}
            }
        }
        view
    }

    /// What is shared apart from the root, to be written: the same paths in the guest, outer ones first.
    pub fn writable(&self) -> impl Iterator<Item = &Path> {
        let shared = self.exposed.iter();
        shared
            .filter(|exposed| exposed.access == Access::Write)
            .map(|exposed| exposed.path.as_path())
    }

    /// All that is shown, shared or hidden.
    pub fn exposed(&self) -> &[Exposed] {
        &self.exposed
    }

    /// Why the working directory is not shared, where nobody asked for that; a sentence.
    pub fn unshared(&self) -> Option<&str> {
        self.unshared.as_deref()
    }

    /// That, and all else that the caller may want to know; sentences.
    pub fn notes(&self) -> impl Iterator<Item = &str> {
        let notes = self.notes.iter().map(String::as_str);
        self.unshared().into_iter().chain(notes)
    }

    /// Who runs the machine.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// Who the command runs as: the caller, under the same name and number.
    pub fn user(&self) -> String {
        let Caller { uid, gid, name, .. } = &self.caller;
        match name {
            Some(name) => name.clone(),
            None => format!("{uid}:{gid}"),
        }
    }

    /// Variables of the command, which runs as `user`; None is the caller.
    pub fn environment(&self, user: Option<&str>) -> Vec<(Vec<u8>, Vec<u8>)> {
        let Caller {
            uid, name, home, ..
        } = &self.caller;
        let is_callers = |user| name.as_deref() == Some(user) || uid.to_string() == user;
        let mut variables = Vec::new();
        if user.is_none_or(is_callers) {
            variables.push((&b"HOME"[..], home.as_os_str().as_bytes().to_vec()));
        }
        for (name, value) in &self.caller.environment {
            let value = match name == "PATH" {
                true => search_path(value),
                false => value.clone(),
            };
            variables.push((name.as_bytes(), value.as_bytes().to_vec()));
        }
        variables
            .into_iter()
            .map(|(name, value)| (name.to_vec(), value))
            .collect()
    }
}

/// PATH, where what the host keeps in a place of the guest's own is replaced by what it leads to.
fn search_path(path: &OsStr) -> OsString {
    let dirs = std::env::split_paths(path).map(|dir| match is_guests_own(&dir) {
        true => real(&dir),
        false => dir,
    });
    std::env::join_paths(dirs).unwrap_or_else(|_| path.to_owned())
}

/// Takes `--host-path`'s value apart: the path, and whether it is to be written.
fn given(text: &OsStr, cwd: &Path) -> Result<(PathBuf, bool)> {
    let (path, mode) = split_mode(text);
    let path = absolute(Path::new(path), cwd);
    let shown = path.display();
    if is_guests_own(&path) {
        bail!("{shown} cannot be shown in the guest, which has one of its own");
    }
    if path.parent().is_none() {
        bail!("the whole of / is never shown: name the directories with --host-path");
    }
    if let Err(error) = std::fs::symlink_metadata(&path) {
        bail!("{shown} cannot be shown in the guest: {error}");
    }
    Ok((path, mode == Some(Mode::ReadWrite)))
}
