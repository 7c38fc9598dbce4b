//! An archive made into a tree.
//!
//! Whoever sends it is hostile. Every member is made by its last name in a directory that was reached
//! step by step from the destination ([`Chain`]); no step follows a symlink, and no name has a
//! `..` in it. Directories get their permissions and times when they are left.

use std::io::BufRead;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, ftruncate, linkat};
use rustix::io::{Errno, pwrite};

use super::chain::{self, Chain};
use super::decode::Decoder;
use super::member::{Extent, Kind, Member};
use super::place::{Place, Root};
use super::put::{self, Draft, Unkept};
use super::{ArchiveError, shown};
use crate::protocol::Landing;

/// What new files get of what the archive says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Owners, set-id bits and extended attributes, as far as this process may. Else new files are
    /// this process's own.
    pub owned: bool,
    /// Device nodes. Else they are left out with a note.
    pub devices: bool,
}

/// What was unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Members, directories included.
    pub members: u64,
    /// Bytes of data.
    pub bytes: u64,
}

/// Unpacks an archive to `path` of `root`; `notes` is told what was left out.
///
/// Where the destination is a file, it is replaced once the new one is complete; a directory that
/// exists keeps its owner, permissions and times. What is complete stays when a later member fails.
///
/// # Errors
/// The first that is wrong with the archive, the destination or the stream; see [`ArchiveError`].
pub fn unpack<R: BufRead>(
    root: Root<'_>,
    path: &[u8],
    landing: &Landing,
    policy: Policy,
    from: R,
    notes: &mut dyn FnMut(String),
) -> Result<Summary, ArchiveError> {
    let mut unpacker = Unpacker {
        from: Decoder::new(from),
        destination: path.to_vec(),
        policy,
        notes,
        summary: Summary::default(),
        unkept: (0, 0),
    };
    match landing {
        Landing::Members => {
            let why = "is no directory, and an archive is unpacked into one that exists";
            match root.find(path, true) {
                Ok(Place::Directory(top)) => unpacker.tree(top, None)?,
                Ok(_) => return Err(ArchiveError::unfit(path, why)),
                Err(error) => return Err(ArchiveError::file(path, "cannot be opened", error)),
            }
        }
        Landing::Tree(name) => unpacker.whole(root, name.as_deref())?,
    }
    unpacker.say_what_was_not_kept();
    unpacker.from.drain()?;
    Ok(unpacker.summary)
}

struct Unpacker<'a, R> {
    from: Decoder<R>,
    /// What the names in messages begin with.
    destination: Vec<u8>,
    policy: Policy,
    notes: &'a mut dyn FnMut(String),
    summary: Summary,
    /// How many files could not get their owners, and their attributes.
    unkept: (u64, u64),
}

/// Permissions of a directory that the archive does not describe, but for the umask.
const IMPLIED: Mode = Mode::from_raw_mode(0o777);

/// What failed when a file is complete but for this.
const UNDRESSED: &str = "cannot be given its permissions and times";

/// What a directory gets when it is left; None where it had been there or is not described.
type About = Option<Member>;

impl<R: BufRead> Unpacker<'_, R> {
    /// Unpacks one tree.
    fn whole(&mut self, root: Root<'_>, name: Option<&[u8]>) -> Result<(), ArchiveError> {
        let first = self.from.next()?;
        let first = first.ok_or(ArchiveError::Damaged("there is nothing in it"))?;
        if !parts(&first.name)?.is_empty() {
            return Err(refused(&first.name, "which is not what was asked for"));
        }
        let is_tree = first.kind == Kind::Directory;
        let place = root.find(&self.destination, true);
        let (parent, name) = match place.map_err(|error| self.unreachable(error))? {
            Place::Directory(directory) => match name {
                None if is_tree => return self.tree(directory, None),
                None => return Err(ArchiveError::unfit(&self.destination, "is a directory")),
                Some(name) => {
                    self.destination = self.path(&[name]);
                    (directory, name.to_vec())
                }
            },
            Place::File { parent, name, stat } => {
                let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
                let why = match (is_tree, is_file) {
                    (false, true) => return self.only(parent.as_fd(), &name, &first),
                    (true, _) => "is a file, and a directory cannot be copied onto it",
                    (false, false) => "is neither a file nor a directory",
                };
                return Err(ArchiveError::unfit(&self.destination, why));
            }
            Place::Free {
                as_directory: true, ..
            } if !is_tree => {
                let why = "is no directory: leave the slash away to copy to a file of that name";
                return Err(ArchiveError::unfit(&self.destination, why));
            }
            Place::Free { parent, name, .. } => (parent, name),
        };
        if !is_tree {
            return self.only(parent.as_fd(), &name, &first);
        }
        let (top, is_new) = self.directory(parent.as_fd(), &name, put::PRIVATE, &[])?;
        self.summary.members += 1;
        self.tree(top, is_new.then_some(first))
    }

    /// Unpacks an archive of one member that is no directory.
    fn only(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        member: &Member,
    ) -> Result<(), ArchiveError> {
        if let Kind::HardLink(_) = member.kind {
            return Err(refused(&member.name, "a link to what is not in it"));
        }
        self.put(parent, parent, name, member, &[])?;
        match self.from.next()? {
            None => Ok(()),
            Some(more) => Err(refused(&more.name, "which is not what was asked for")),
        }
    }

    /// Unpacks all members that are left below `top`.
    fn tree(&mut self, top: OwnedFd, about: About) -> Result<(), ArchiveError> {
        let chain = Chain::new(top, about);
        let mut chain = chain.map_err(|error| self.failed(&[], "cannot be opened", error))?;
        let mut result = Ok(());
        while result.is_ok() {
            result = match self.from.next() {
                Ok(Some(member)) => self.member(&mut chain, member),
                Ok(None) => break,
                Err(error) => Err(error),
            };
        }
        // Directories get their permissions whatever happened to what is in them.
        let closed = self.leave_to(&mut chain, 0);
        let (top, about) = chain.finish();
        let dressed = match (top, about) {
            (Some(top), Some(about)) => self.dress(top.as_fd(), &about),
            _ => Ok(()),
        };
        let dressed = dressed.map_err(|error| self.failed(&[], UNDRESSED, error));
        result.and(closed).and(dressed)
    }

    fn member(&mut self, chain: &mut Chain<About>, member: Member) -> Result<(), ArchiveError> {
        let name = member.name.clone();
        let parts = parts(&name)?;
        let Some((last, above)) = parts.split_last() else {
            return match member.kind {
                // The destination itself, which is there.
                Kind::Directory => Ok(()),
                _ => Err(refused(&name, "which is not what was asked for")),
            };
        };
        self.go_to(chain, above)?;
        let here = chain.here();
        let here = here.map_err(|error| self.failed(above, "cannot be opened", error))?;
        if member.kind != Kind::Directory {
            let top = chain.top();
            let top = top.map_err(|error| self.failed(&[], "cannot be opened", error))?;
            return self.put(top, here, last, &member, &parts);
        }
        let (directory, is_new) = self.directory(here, last, put::PRIVATE, &parts)?;
        self.summary.members += 1;
        let entered = chain.enter(last, directory, is_new.then_some(member));
        entered.map_err(|error| self.failed(&parts, "cannot be opened", error))
    }

    /// Goes to the directory of this name, which is made where it is missing.
    fn go_to(&mut self, chain: &mut Chain<About>, names: &[&[u8]]) -> Result<(), ArchiveError> {
        let shared = chain.names().zip(names).take_while(|(a, b)| a == *b);
        let shared = shared.count();
        self.leave_to(chain, shared)?;
        for depth in shared..names.len() {
            let Some((name, path)) = names.get(depth).zip(names.get(..=depth)) else {
                break;
            };
            let here = chain.here();
            let here = here.map_err(|error| self.failed(path, "cannot be opened", error))?;
            let (directory, _) = self.directory(here, name, IMPLIED, path)?;
            let entered = chain.enter(name, directory, None);
            entered.map_err(|error| self.failed(path, "cannot be opened", error))?;
        }
        Ok(())
    }

    /// Leaves directories until `depth` of them are left below the first.
    fn leave_to(&mut self, chain: &mut Chain<About>, depth: usize) -> Result<(), ArchiveError> {
        let mut result = Ok(());
        while chain.depth() > depth {
            let (name, left) = chain.leave();
            let done = match left {
                Ok((directory, Some(about))) => self.dress(directory.as_fd(), &about),
                Ok((_, None)) => Ok(()),
                Err(error) => Err(error),
            };
            result = result.and(done.map_err(|error| {
                let above: Vec<&[u8]> = chain.names().chain([name.as_slice()]).collect();
                self.failed(&above, UNDRESSED, error)
            }));
        }
        result
    }

    fn directory(
        &self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        mode: Mode,
        path: &[&[u8]],
    ) -> Result<(OwnedFd, bool), ArchiveError> {
        put::directory(parent, name, mode).map_err(|error| match error {
            Errno::NOTDIR | Errno::LOOP => {
                let why = "is a symlink or a file, and a directory cannot be copied onto it";
                ArchiveError::unfit(&self.path(path), why)
            }
            error => self.failed(path, "cannot be made", error),
        })
    }

    /// Makes `member` as `name` of `parent`; `top` is where links are looked up, `path` is for messages.
    fn put(
        &mut self,
        top: BorrowedFd<'_>,
        parent: BorrowedFd<'_>,
        name: &[u8],
        member: &Member,
        path: &[&[u8]],
    ) -> Result<(), ArchiveError> {
        let failed = |unpacker: &Self, error| unpacker.failed(path, "cannot be made", error);
        let kept = match &member.kind {
            Kind::Unknown(_) => return self.left_out(path, "is of an unknown kind"),
            Kind::Device { .. } if !self.policy.devices => {
                return self.left_out(path, "is a device");
            }
            Kind::HardLink(target) => {
                let make = |new: &[u8]| link(top, target, parent, new);
                let (draft, ()) = Draft::begin(parent, name, make)
                    .map_err(|error| self.failed(path, "cannot be linked", error))?;
                draft.keep()
            }
            Kind::File { size, extents } => {
                let make = |name: &[u8]| put::file(parent, name);
                let (draft, file) =
                    Draft::begin(parent, name, make).map_err(|error| failed(self, error))?;
                self.fill(&file, *size, extents.as_deref(), path)?;
                self.dress(file.as_fd(), member)
                    .map_err(|error| self.failed(path, UNDRESSED, error))?;
                draft.keep()
            }
            kind => {
                let make = |name: &[u8]| put::special(parent, name, kind);
                let (draft, special) =
                    Draft::begin(parent, name, make).map_err(|error| failed(self, error))?;
                self.dress(special.as_fd(), member)
                    .map_err(|error| self.failed(path, UNDRESSED, error))?;
                draft.keep()
            }
        };
        kept.map_err(|error| failed(self, error))?;
        self.summary.members += 1;
        Ok(())
    }

    /// Writes a file's data, and leaves the rest a hole.
    fn fill(
        &mut self,
        file: &OwnedFd,
        size: u64,
        extents: Option<&[Extent]>,
        path: &[&[u8]],
    ) -> Result<(), ArchiveError> {
        let whole = [Extent {
            offset: 0,
            len: size,
        }];
        if extents.is_some() {
            ftruncate(file, size).map_err(|error| self.failed(path, "cannot be written", error))?;
        }
        for extent in extents.unwrap_or(&whole) {
            let (mut at, mut left) = (extent.offset, extent.len);
            while left > 0 {
                let data = self.from.data()?;
                let len = usize::try_from(left).map_or(data.len(), |left| left.min(data.len()));
                match pwrite(file, data.get(..len).unwrap_or_default(), at) {
                    Ok(written) => {
                        self.from.consume(written);
                        at += written as u64;
                        left -= written as u64;
                        self.summary.bytes += written as u64;
                    }
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(self.failed(path, "cannot be written", error)),
                }
            }
        }
        Ok(())
    }

    fn dress(&mut self, file: BorrowedFd<'_>, member: &Member) -> Result<(), Errno> {
        let Unkept { owner, attributes } = put::dress(file, member, self.policy.owned)?;
        self.unkept.0 += u64::from(owner);
        self.unkept.1 += u64::from(attributes);
        Ok(())
    }

    fn left_out(&mut self, path: &[&[u8]], what: &str) -> Result<(), ArchiveError> {
        let path = shown(&self.path(path));
        (self.notes)(format!("{path:?} {what} and was left out"));
        Ok(())
    }

    fn say_what_was_not_kept(&mut self) {
        let (owners, attributes) = self.unkept;
        if owners > 0 {
            let files = files(owners);
            (self.notes)(format!(
                "the owners and set-id bits of {files} were not kept: only root may give files away"
            ));
        }
        if attributes > 0 {
            let files = files(attributes);
            (self.notes)(format!("extended attributes of {files} could not be kept"));
        }
    }

    fn unreachable(&self, error: Errno) -> ArchiveError {
        match error {
            Errno::NOENT => ArchiveError::unfit(
                &self.destination,
                "is in a directory that does not exist: make that first",
            ),
            error => ArchiveError::file(&self.destination, "cannot be reached", error),
        }
    }

    fn path(&self, names: &[&[u8]]) -> Vec<u8> {
        let mut path = self.destination.clone();
        for name in names {
            if !path.ends_with(b"/") {
                path.push(b'/');
            }
            path.extend_from_slice(name);
        }
        path
    }

    fn failed(&self, path: &[&[u8]], what: &'static str, error: Errno) -> ArchiveError {
        ArchiveError::file(&self.path(path), what, error)
    }
}

/// Makes `new` another name of what the archive calls `target`.
fn link(
    top: BorrowedFd<'_>,
    target: &[u8],
    parent: BorrowedFd<'_>,
    new: &[u8],
) -> Result<(), Errno> {
    let parts = parts(target).map_err(|_| Errno::INVAL)?;
    let (last, above) = parts.split_last().ok_or(Errno::INVAL)?;
    let mut directory: Option<OwnedFd> = None;
    for name in above {
        let here = directory.as_ref().map_or(top, AsFd::as_fd);
        directory = Some(chain::open(here, name)?);
    }
    let directory = directory.as_ref().map_or(top, AsFd::as_fd);
    linkat(directory, *last, parent, new, AtFlags::empty())
}

/// The parts of a member's name, none for the top of the archive.
fn parts(name: &[u8]) -> Result<Vec<&[u8]>, ArchiveError> {
    if name.starts_with(b"/") {
        return Err(refused(name, "an absolute name"));
    }
    if name.contains(&0) {
        return Err(refused(name, "a name with a zero byte"));
    }
    let mut parts = Vec::new();
    for part in name.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(refused(name, "a name that leads upwards")),
            part => parts.push(part),
        }
    }
    Ok(parts)
}

fn refused(name: &[u8], why: &'static str) -> ArchiveError {
    let name = shown(name);
    ArchiveError::Refused { name, why }
}

fn files(count: u64) -> String {
    match count {
        1 => "one file".to_owned(),
        count => format!("{count} files"),
    }
}
