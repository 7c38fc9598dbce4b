//! One change of the host's, made once more: the system call that raises the event for it.
//!
//! The host answers as if it had been made, and does nothing (the table in `share/src/watch/replay.rs`). The kernel
//! asks the host before it acts only where it does not believe to know. Somebody may have looked at the name since
//! it was changed, so that the kernel believes what is there now and refuses: then it is made to forget
//! that, and asked again.

use std::os::fd::{AsFd, OwnedFd};

use agent::protocol::{ChangeKind, HostChange};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, StatxFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT,
    mkdirat, mknodat, openat, renameat, statx, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::handle::Handle;
use super::view::View;
use super::watchers::Watched;
use crate::tree::path_of;

/// The kernel is to look the name up again the next time: of `fuse_notify_code`.
const NOTIFY_INVAL_ENTRY: i32 = 3;

/// So many entries of watched directories are looked at after an overflow.
const MAX_LISTED: usize = 65_536;

/// What changes are made with.
pub struct Redo<'a> {
    pub view: &'a View,
    pub watched: &'a Watched,
    /// The FUSE device of the folder.
    pub device: &'a OwnedFd,
    /// After an overflow, what has changed since then (seconds since 1970) counts as changed.
    pub since: i64,
}

impl Redo<'_> {
    /// Makes `change` once more, and with the file that it creates the changes `with_it`.
    ///
    /// # Errors
    /// Of the system call; nothing is done on the host in any case.
    pub fn make(&self, change: &HostChange, with_it: &[&HostChange]) -> Result<(), Errno> {
        if change.what == ChangeKind::Overflow {
            self.all();
            return Ok(());
        }
        if change.name.is_empty() {
            return self.to_itself(change);
        }
        let directory = self.directory(&change.dir)?;
        let name = checked(&change.name)?;
        let (read, write) = (OFlags::NOFOLLOW | OFlags::CLOEXEC, OFlags::WRONLY);
        let new = OFlags::CREATE | OFlags::EXCL | write | read;
        let readable = Mode::from_raw_mode(0o644);
        match &change.what {
            ChangeKind::CreatedFile => {
                let file = self.again(&directory, name, Errno::EXIST, || {
                    openat(&directory, name, new, readable)
                })?;
                // That it was written and closed is heard when it is closed here.
                match with_it.iter().any(|with| with.what == ChangeKind::Modified) {
                    true => modify(&file, b""),
                    false => Ok(()),
                }
            }
            ChangeKind::CreatedDirectory => self.again(&directory, name, Errno::EXIST, || {
                mkdirat(&directory, name, Mode::from_raw_mode(0o755))
            }),
            ChangeKind::CreatedSymlink => self.again(&directory, name, Errno::EXIST, || {
                symlinkat("/", &directory, name)
            }),
            ChangeKind::CreatedSpecial => self.again(&directory, name, Errno::EXIST, || {
                mknodat(&directory, name, FileType::Fifo, readable, 0)
            }),
            ChangeKind::Modified => modify(&directory, name),
            ChangeKind::Attributes => touch(&directory, name),
            ChangeKind::CloseWrite => {
                // What is no file would do something of its own when it is opened.
                let kind = statx(
                    &directory,
                    name,
                    AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC,
                    StatxFlags::TYPE,
                )?;
                match FileType::from_raw_mode(kind.stx_mode.into()) {
                    FileType::RegularFile => {
                        let flags = write | read | OFlags::NONBLOCK;
                        openat(&directory, name, flags, Mode::empty()).map(drop)
                    }
                    _ => Ok(()),
                }
            }
            ChangeKind::Deleted { is_dir } => {
                let flags = match is_dir {
                    true => AtFlags::REMOVEDIR,
                    false => AtFlags::empty(),
                };
                let lost = self.watched_at(&change.dir, &change.name);
                let done = self.again(&directory, name, Errno::NOENT, || {
                    unlinkat(&directory, name, flags)
                });
                end(lost);
                done
            }
            ChangeKind::Moved { dir, name: new } => {
                let (to, new) = (self.directory(dir)?, checked(new)?);
                let lost = self.watched_at(dir, new);
                let done = self.again(&directory, name, Errno::NOENT, || {
                    renameat(&directory, name, &to, new)
                });
                end(lost);
                done
            }
            ChangeKind::Overflow => Ok(()),
        }
    }

    /// A change of a directory, or of the one file that is shared, itself.
    fn to_itself(&self, change: &HostChange) -> Result<(), Errno> {
        let itself = match (change.dir.is_empty(), self.watched.files.get(&change.dir)) {
            (true, _) => rustix::io::fcntl_dupfd_cloexec(&self.view.top, 0)?,
            (false, Some(handle)) => self.view.open_handle(handle)?,
            (false, None) => self.view.open_directory(&change.dir)?,
        };
        match change.what {
            ChangeKind::Attributes => touch(&itself, b""),
            ChangeKind::Modified => modify(&itself, b""),
            ChangeKind::CloseWrite if is_regular(&itself)? => {
                let flags = OFlags::WRONLY | OFlags::CLOEXEC;
                openat(rustix::fs::CWD, path_of(&itself), flags, Mode::empty()).map(drop)
            }
            _ => Ok(()),
        }
    }

    /// What is watched under a name that it is about to lose.
    fn watched_at(&self, dir: &[u8], name: &[u8]) -> Option<OwnedFd> {
        let handle = self.watched.files.get(&path(dir, name))?;
        self.view.open_handle(handle).ok()
    }

    /// A directory that is watched is found whatever its path is by now.
    fn directory(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        match self.watched.files.get(path) {
            Some(handle) => self.view.open_handle(handle),
            None => self.view.open_directory(path),
        }
    }

    /// Makes a call, and once more with the name forgotten where it fails with `believed`.
    fn again<T>(
        &self,
        directory: &OwnedFd,
        name: &[u8],
        believed: Errno,
        call: impl Fn() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match call() {
            Err(errno) if errno == believed => {
                self.forget(directory, name)?;
                call()
            }
            outcome => outcome,
        }
    }

    /// Has the kernel forget what it believes of a name.
    fn forget(&self, directory: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
        let parent = Handle::of(directory)?.node().ok_or(Errno::OPNOTSUPP)?;
        let length = u32::try_from(name.len()).map_err(|_| Errno::NAMETOOLONG)?;
        let mut message = Vec::with_capacity(16 + 16 + name.len() + 1);
        // fuse_out_header, fuse_notify_inval_entry_out, and the name with its end.
        message.extend((16 + 16 + length + 1).to_ne_bytes());
        message.extend(NOTIFY_INVAL_ENTRY.to_ne_bytes());
        message.extend(0_u64.to_ne_bytes());
        message.extend(parent.to_ne_bytes());
        message.extend(length.to_ne_bytes());
        message.extend(0_u32.to_ne_bytes());
        message.extend(name);
        message.push(0);
        match rustix::io::write(self.device, &message) {
            // It had nothing to forget.
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// More has changed than could be told. inotify has no event for that which could be raised, so
    /// everything that is watched looks changed: directories get new attributes (`IN_ATTRIB`), and files that
    /// have changed lately are modified (`IN_MODIFY`). Whoever watches looks at them again.
    fn all(&self) {
        let mut left = MAX_LISTED;
        for handle in self.watched.files.values() {
            let Ok(file) = self.view.open_handle(handle) else {
                continue;
            };
            // What vanishes meanwhile is not there to be looked at either.
            match is_regular(&file) {
                Ok(true) => drop(modify(&file, b"")),
                _ => {
                    let _ = touch(&file, b"");
                    let _ = self.entries(&file, &mut left);
                }
            }
        }
    }

    /// Modifies the files of a directory that have changed lately.
    fn entries(&self, directory: &OwnedFd, left: &mut usize) -> Result<(), Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        for entry in Dir::new(openat(directory, ".", flags, Mode::empty())?)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if entry.file_type() != FileType::RegularFile {
                continue;
            }
            let Some(fewer) = left.checked_sub(1) else {
                return Ok(());
            };
            *left = fewer;
            let seen = statx(
                directory,
                name,
                AtFlags::SYMLINK_NOFOLLOW,
                StatxFlags::CTIME,
            )?;
            if seen.stx_ctime.tv_sec >= self.since {
                modify(directory, name)?;
            }
        }
        Ok(())
    }
}

/// Has the kernel look at a file that may have lost its last name: then it tells those who watch it that it is
/// gone (`IN_DELETE_SELF`).
fn end(lost: Option<OwnedFd>) {
    if let Some(file) = lost {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
        // What the host does not know any more either cannot be told of.
        let _ = statx(&file, "", flags, StatxFlags::NLINK);
    }
}

/// The path of an entry from the folder's top on; no name is the directory itself.
pub fn path(dir: &[u8], name: &[u8]) -> Vec<u8> {
    match (dir, name) {
        (dir, b"") => dir.to_vec(),
        (b"", name) => name.to_vec(),
        (dir, name) => [dir, b"/", name].concat(),
    }
}

/// A name of an entry, and nothing that leads elsewhere.
fn checked(name: &[u8]) -> Result<&[u8], Errno> {
    match name {
        b"" | b"." | b".." => Err(Errno::INVAL),
        name if name.contains(&b'/') => Err(Errno::INVAL),
        name => Ok(name),
    }
}

fn is_regular(file: &OwnedFd) -> Result<bool, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let seen = statx(file, "", flags, StatxFlags::TYPE)?;
    Ok(FileType::from_raw_mode(seen.stx_mode.into()) == FileType::RegularFile)
}

/// A time of modification alone is what a write leaves.
fn modify(at: impl AsFd, name: &[u8]) -> Result<(), Errno> {
    set_times(at, name, UTIME_OMIT)
}

fn touch(at: impl AsFd, name: &[u8]) -> Result<(), Errno> {
    set_times(at, name, UTIME_NOW)
}

fn set_times(at: impl AsFd, name: &[u8], access: i64) -> Result<(), Errno> {
    let time = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    let times = Timestamps {
        last_access: time(access),
        last_modification: time(UTIME_NOW),
    };
    utimensat(
        at,
        name,
        &times,
        AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH,
    )
}
