//! A tree read into an archive.
//!
//! The tree may be in use, and whoever uses it is not waited for: a file that vanishes is left out with a note, one
//! that grows is cut at the length it had, one that shrinks is filled up with zeros and makes the
//! copy fail once everything has been sent.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::vec;

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, major, minor, openat, readlinkat, statat,
};
use rustix::io::{Errno, pread};

use super::chain::{self, Chain, Identity};
use super::encode::Encoder;
use super::member::{Attribute, Extent, Kind, Member, Time};
use super::place::{Place, Root};
use super::{ArchiveError, ChunkWriter, MAX_EXTENDED, attributes, map};

/// Files of at most this many bytes are read before their header is written, so that it says
/// what they really hold, also those whose size the kernel does not know ahead (proc(5), sysfs(5)).
const SMALL: u64 = 128 << 10;

/// The most that is read of a file that claims to be empty.
const MAX_UNSIZED: u64 = 64 << 20;

/// What is packed and how.
#[derive(Debug, Clone, Default)]
pub struct PackOptions {
    /// The name that the tree gets in the archive; empty for none, so that all names start with `.`.
    pub name: Vec<u8>,
    /// Pack what a symlink leads to, where the tree itself is one; never of those inside.
    pub follow: bool,
    /// Pack extended attributes.
    pub attributes: bool,
}

/// Packs what is at `path` of `root` into `out`, which is left for the caller to end.
///
/// # Errors
/// The first file that cannot be read, or a failure of `out`. [`ArchiveError::Shrunk`] comes after
/// everything has been packed.
pub fn pack<W: Write>(
    root: Root<'_>,
    path: &[u8],
    options: &PackOptions,
    out: &mut ChunkWriter<W>,
) -> Result<(), ArchiveError> {
    let name = match options.name.as_slice() {
        b"" => b".".to_vec(),
        name => name.to_vec(),
    };
    let mut packer = Packer {
        out: Encoder::new(out),
        asked: path,
        top: name.len(),
        name,
        attributes: options.attributes,
        links: HashMap::new(),
        content: Vec::new(),
        shrunk: None,
    };
    let place = root.find(path, options.follow);
    match place.map_err(|error| ArchiveError::file(path, "cannot be copied", error))? {
        Place::Directory(directory) => packer.tree(directory)?,
        Place::File { parent, name, .. } => packer.entry(parent.as_fd(), &name, None)?,
        Place::Free { .. } => {
            return Err(ArchiveError::file(path, "cannot be copied", Errno::NOENT));
        }
    }
    packer.out.finish()?;
    match packer.shrunk {
        None => Ok(()),
        Some((path, count)) => Err(ArchiveError::Shrunk { path, count }),
    }
}

struct Packer<'a, W> {
    out: Encoder<'a, W>,
    /// The path that was asked for: what messages begin with.
    asked: &'a [u8],
    /// The name of the member that is being packed.
    name: Vec<u8>,
    /// How much of it stands for the path that was asked for.
    top: usize,
    attributes: bool,
    /// Files with several names that have been packed under one: that one, and how many are to come.
    links: HashMap<Identity, (Vec<u8>, u64)>,
    /// What is in a small file.
    content: Vec<u8>,
    /// The first file that shrank, and how many did.
    shrunk: Option<(String, u64)>,
}

/// Directories of a directory that have not been packed yet, and how long its own name is.
struct Pending {
    directories: vec::IntoIter<Vec<u8>>,
    name_len: usize,
}

impl<W: Write> Packer<'_, W> {
    /// Packs a directory and all that is below.
    fn tree(&mut self, top: OwnedFd) -> Result<(), ArchiveError> {
        let pending = self.directory(&top)?;
        let chain = Chain::new(top, pending);
        let mut chain = chain.map_err(|error| self.failed("cannot be read", error))?;
        loop {
            let next = chain.about().directories.next();
            if let Some(name) = next {
                let here = chain.here();
                let here = here.map_err(|error| self.failed("cannot be read", error))?;
                self.push(&name);
                if let Some(directory) = self.open_directory(here, &name)? {
                    let pending = self.directory(&directory)?;
                    let entered = chain.enter(&name, directory, pending);
                    entered.map_err(|error| self.failed("cannot be read", error))?;
                }
            } else if chain.depth() > 0 {
                let (_, left) = chain.leave();
                left.map_err(|error| self.failed("was moved while it was read", error))?;
            } else {
                return Ok(());
            }
            let len = chain.about().name_len;
            self.name.truncate(len);
        }
    }

    /// Packs a directory and what is in it besides directories.
    fn directory(&mut self, directory: &OwnedFd) -> Result<Pending, ArchiveError> {
        let stat = fstat(directory).map_err(|error| self.failed("cannot be read", error))?;
        let attributes = self.attributes_of(directory)?;
        let name_len = self.name.len();
        self.name.push(b'/');
        let member = self.describe(&stat, Kind::Directory, attributes);
        self.name.truncate(name_len);
        self.out.member(&member)?;

        let mut directories = Vec::new();
        let failed = |packer: &Self, error| packer.failed("cannot be listed", error);
        let listing = Dir::read_from(directory).map_err(|error| failed(self, error))?;
        for entry in listing {
            let entry = entry.map_err(|error| failed(self, error))?;
            let name = entry.file_name().to_bytes();
            match (name, entry.file_type()) {
                (b"." | b"..", _) => {}
                (_, FileType::Directory) => directories.push(name.to_vec()),
                (_, file_type) => {
                    self.push(name);
                    self.entry(directory.as_fd(), name, Some((&mut directories, file_type)))?;
                    self.name.truncate(name_len);
                }
            }
        }
        Ok(Pending {
            directories: directories.into_iter(),
            name_len,
        })
    }

    /// Packs `name` of `parent`. A directory, which it may have become only now, goes to the list.
    fn entry(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        listed: Option<(&mut Vec<Vec<u8>>, FileType)>,
    ) -> Result<(), ArchiveError> {
        let listed_type = listed.as_ref().map(|(_, file_type)| *file_type);
        // A listing says what to expect; opening a file then tells for sure.
        if listed_type == Some(FileType::RegularFile) {
            return self.regular(parent, name);
        }
        let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(error) => return self.unread(error),
        };
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => return self.regular(parent, name),
            FileType::Directory => {
                if let Some((directories, _)) = listed {
                    directories.push(name.to_vec());
                }
                return Ok(());
            }
            FileType::Symlink => match readlinkat(parent, name, Vec::new()) {
                Ok(target) => Kind::Symlink(target.into_bytes()),
                Err(error) => return self.unread(error),
            },
            FileType::Fifo => Kind::Fifo,
            FileType::CharacterDevice => device(&stat, false),
            FileType::BlockDevice => device(&stat, true),
            FileType::Socket => return self.note("is a socket and was left out"),
            FileType::Unknown => return self.note("is of an unknown kind and was left out"),
        };
        if self.hard_link(&stat)? {
            return Ok(());
        }
        let member = self.describe(&stat, kind, Vec::new());
        self.out.member(&member)?;
        self.remember(&stat);
        Ok(())
    }

    /// Packs a regular file, or what has become of one since it was listed.
    fn regular(&mut self, parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), ArchiveError> {
        // O_NONBLOCK: a FIFO in its place must not hold this up.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let opened = openat(parent, name, flags | OFlags::CLOEXEC, Mode::empty());
        let file = match opened {
            Ok(file) => File::from(file),
            Err(error) => return self.unread(error),
        };
        let stat = fstat(&file).map_err(|error| self.failed("cannot be read", error))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return self.note("was replaced while it was copied and was left out");
        }
        if self.hard_link(&stat)? {
            return Ok(());
        }
        let attributes = self.attributes_of(&file)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if size <= SMALL {
            self.small(&file, &stat, attributes)?;
        } else {
            self.large(&file, &stat, attributes)?;
        }
        self.out.end_member()?;
        self.remember(&stat);
        Ok(())
    }

    fn small(
        &mut self,
        file: &File,
        stat: &Stat,
        attributes: Vec<Attribute>,
    ) -> Result<(), ArchiveError> {
        let mut content = std::mem::take(&mut self.content);
        content.clear();
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let limit = if size == 0 { MAX_UNSIZED } else { SMALL };
        let read = file.take(limit).read_to_end(&mut content);
        read.map_err(|error| self.failed("cannot be read", error))?;
        if size == 0 && content.len() as u64 == limit {
            return Err(self.failed("cannot be copied: it has no end", Errno::FBIG));
        }
        let kind = Kind::File {
            size: content.len() as u64,
            extents: None,
        };
        let member = self.describe(stat, kind, attributes);
        self.out.member(&member)?;
        self.out.data(&content)?;
        self.content = content;
        Ok(())
    }

    fn large(
        &mut self,
        file: &File,
        stat: &Stat,
        attributes: Vec<Attribute>,
    ) -> Result<(), ArchiveError> {
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let allocated = u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512);
        let extents = match allocated < size {
            true => map::find(file, size).map_err(|error| self.failed("cannot be read", error))?,
            false => None,
        };
        let whole = [Extent {
            offset: 0,
            len: size,
        }];
        let parts = extents.clone().unwrap_or_else(|| whole.to_vec());
        let kind = Kind::File { size, extents };
        let member = self.describe(stat, kind, attributes);
        self.out.member(&member)?;
        for part in parts {
            if !self.part(file, part)? {
                let (_, count) = self.shrunk.get_or_insert((self.path(), 0));
                *count += 1;
                break;
            }
        }
        let now = fstat(file).map_err(|error| self.failed("cannot be read", error))?;
        let changed = |stat: &Stat| (stat.st_size, stat.st_mtime, stat.st_mtime_nsec);
        if changed(&now) != changed(stat) {
            self.note("changed while it was copied")?;
        }
        Ok(())
    }

    /// Packs a part of a file; false where the file ends before it does.
    fn part(&mut self, file: &File, part: Extent) -> Result<bool, ArchiveError> {
        let mut at = part.offset;
        let end = part.offset.saturating_add(part.len);
        while at < end {
            let room = self.out.room()?;
            let len = usize::try_from(end - at).map_or(room.len(), |left| left.min(room.len()));
            let read = pread(file, room.get_mut(..len).unwrap_or_default(), at);
            match read {
                Ok(0) => return Ok(false),
                Ok(len) => {
                    self.out.advance(len);
                    at += len as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(self.failed("cannot be read", error)),
            }
        }
        Ok(true)
    }

    /// Opens a directory that was listed; None where it is gone, with a note.
    fn open_directory(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<Option<OwnedFd>, ArchiveError> {
        match chain::open(parent, name) {
            Ok(directory) => Ok(Some(directory)),
            Err(error) => self.unread(error).map(|()| None),
        }
    }

    /// Packs a link to the member that this file has been packed as already; false where it has not.
    fn hard_link(&mut self, stat: &Stat) -> Result<bool, ArchiveError> {
        let id = Identity::from(stat);
        let Some((name, to_come)) = self.links.get_mut(&id) else {
            return Ok(false);
        };
        let kind = Kind::HardLink(name.clone());
        *to_come -= 1;
        if *to_come == 0 {
            self.links.remove(&id);
        }
        let member = self.describe(stat, kind, Vec::new());
        self.out.member(&member)?;
        Ok(true)
    }

    /// Remembers a file that was packed, where it has more names.
    fn remember(&mut self, stat: &Stat) {
        #[allow(
            clippy::useless_conversion,
            reason = "its type depends on the processor"
        )]
        let names = u64::from(stat.st_nlink);
        if names > 1 {
            let more = (self.name.clone(), names - 1);
            self.links.insert(Identity::from(stat), more);
        }
    }

    fn describe(&self, stat: &Stat, kind: Kind, attributes: Vec<Attribute>) -> Member {
        Member {
            name: self.name.clone(),
            kind,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            modified: Time {
                seconds: stat.st_mtime,
                nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
            },
            attributes,
        }
    }

    fn attributes_of(&mut self, file: impl AsFd) -> Result<Vec<Attribute>, ArchiveError> {
        if !self.attributes {
            return Ok(Vec::new());
        }
        let found = attributes::of(file);
        let mut found =
            found.map_err(|error| self.failed("has attributes that cannot be read", error))?;
        // Room for the name is kept.
        let mut room = MAX_EXTENDED / 2;
        let all = found.len();
        found.retain(|(name, value)| {
            let len = (name.len() + value.len()) as u64;
            let fits = len <= room;
            room -= if fits { len } else { 0 };
            fits
        });
        if found.len() < all {
            self.note("has more extended attributes than were copied")?;
        }
        Ok(found)
    }

    fn push(&mut self, name: &[u8]) {
        self.name.push(b'/');
        self.name.extend_from_slice(name);
    }

    /// What a message calls the member.
    fn path(&self) -> String {
        let below = self.name.get(self.top..).unwrap_or_default();
        super::shown(&[self.asked, below].concat())
    }

    fn failed(&self, what: &'static str, error: impl Into<std::io::Error>) -> ArchiveError {
        ArchiveError::File {
            path: self.path(),
            what,
            source: error.into(),
        }
    }

    /// A listed file that cannot be read: not an error where it was removed or replaced since.
    fn unread(&mut self, error: Errno) -> Result<(), ArchiveError> {
        match error {
            Errno::NOENT => self.note("vanished while it was copied"),
            Errno::LOOP | Errno::NOTDIR | Errno::NXIO => {
                self.note("was replaced while it was copied and was left out")
            }
            error => Err(self.failed("cannot be read", error)),
        }
    }

    fn note(&mut self, what: &str) -> Result<(), ArchiveError> {
        let note = format!("{:?} {what}", self.path());
        self.out.note(note)
    }
}

fn device(stat: &Stat, block: bool) -> Kind {
    Kind::Device {
        block,
        major: major(stat.st_rdev),
        minor: minor(stat.st_rdev),
    }
}
