//! A share of which only a part is shown.
//!
//! Whatever a request names passes through here: a name when it is looked up or listed, and the file
//! each time that it is reached by its number. So what was shown and may not be read any more is not there
//! any more either.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::io::Errno;

use super::{Options, Share, ShareError};
use crate::handle::Handle;
use crate::host::Stat;
use crate::inode::{Held, Inode};
use crate::prompt;
use crate::view::{Scope, View};
use crate::wire::ROOT_ID;

impl Share {
    /// Shares what `view` shows of the directory `path`, read-only.
    ///
    /// # Errors
    /// Those of [`Share::open`].
    pub fn open_view(path: &Path, options: Options, view: View) -> Result<Self, ShareError> {
        let options = Options {
            read_only: true,
            ..options
        };
        let mut share = Self::open(path, options)?;
        let opened = |source| ShareError::Open {
            path: path.display().to_string(),
            source,
        };
        let root = share.inodes.get(ROOT_ID).map_err(opened)?;
        let held = share.inodes.hold(&root).map_err(opened)?;
        share.filter = Some(view.of(held.as_fd(), share.owners.host.uid));
        Ok(share)
    }

    /// What `name` in `dir`, which is `parent`, is, and where in the view.
    ///
    /// # Errors
    /// `ENOENT` where it is not shown; those of statx(2).
    pub(super) fn find(
        &self,
        parent: &Inode,
        dir: BorrowedFd<'_>,
        name: &CStr,
    ) -> Result<(Stat, Scope), Errno> {
        let Some(filter) = &self.filter else {
            return Ok((self.look(parent, dir, name)?, Scope::ROOT));
        };
        let scope = filter.below(parent.scope(), name).ok_or(Errno::NOENT)?;
        let stat = match self.look(parent, dir, name) {
            // Where nobody can look, there is nothing.
            Err(Errno::ACCESS) => Err(Errno::NOENT),
            outcome => outcome,
        }?;
        match filter.shows(scope, &stat) {
            true => Ok((stat, scope)),
            false => Err(Errno::NOENT),
        }
    }

    /// What `name` in `dir`, which is `parent`, is.
    fn look(&self, parent: &Inode, dir: BorrowedFd<'_>, name: &CStr) -> Result<Stat, Errno> {
        let stat = Stat::at(dir, name)?;
        // What is mounted there may be far, and that was not asked.
        let is_new = stat.key.dev != parent.key.dev && !self.near.has(stat.key.dev);
        match is_new && prompt::is_prompt() {
            true => Err(Errno::AGAIN),
            false => Ok(stat),
        }
    }

    /// Whether `name` in a directory that is being listed is shown.
    ///
    /// # Errors
    /// `EAGAIN` where that cannot be told promptly.
    pub(super) fn is_shown(&self, dir: &Handle, name: &CStr) -> Result<bool, Errno> {
        if self.filter.is_none() {
            return Ok(true);
        }
        match self.find(&dir.inode, dir.as_fd(), name) {
            Err(Errno::AGAIN) => Err(Errno::AGAIN),
            found => Ok(found.is_ok()),
        }
    }

    /// Whether the guest may hear of what happens to a name in a directory.
    pub(crate) fn is_name_shown(&self, dir: u64, name: &CStr) -> bool {
        let Some(filter) = &self.filter else {
            return true;
        };
        let scope = self.inodes.get(dir).map(|dir| dir.scope());
        scope.is_ok_and(|scope| filter.below(scope, name).is_some())
    }

    /// Whether permissions decide what is there at all.
    pub(crate) fn has_view(&self) -> bool {
        self.filter.is_some()
    }

    /// # Errors
    /// `ESTALE` where `inode` is not shown any more.
    pub(super) fn check_shown(&self, inode: &Inode, held: &Held) -> Result<(), Errno> {
        match &self.filter {
            Some(filter) if !filter.shows(inode.scope(), &Stat::fd(held.as_fd())?) => {
                Err(Errno::STALE)
            }
            _ => Ok(()),
        }
    }

    /// # Errors
    /// `EACCES` where the directory can be passed through, but not be listed.
    pub(super) fn check_listed(&self, inode: &Inode, held: &Held) -> Result<(), Errno> {
        match &self.filter {
            Some(filter) if !filter.lists(inode.scope(), &Stat::fd(held.as_fd())?) => {
                Err(Errno::ACCESS)
            }
            _ => Ok(()),
        }
    }

    /// `inode` was found in `scope`. By other names or mounts it may have been found where less is
    /// shown; what the guest reaches by one of its ways to it is not kept from it by the others.
    pub(super) fn widen(&self, inode: &Inode, scope: Scope) {
        let Some(filter) = &self.filter else {
            return;
        };
        let before = inode.scope();
        if before != scope && filter.readers(before) <= filter.readers(scope) {
            inode.set_scope(scope);
        }
    }
}
