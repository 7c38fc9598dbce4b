//! Reading a set of records from the oldest to the last, and then those that are still to come.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;

use super::cursor::{Cursor, Found};
use super::{FILES, Set, Stream};

/// How long a writer's lock can outlive the closing of its file: the kernel tells of that first.
const CLOSING: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// How often that is waited for.
const CLOSING_TRIES: u32 = 250;

/// Gives the records of `set` in `dir` to `take`, in their order and each whole, from `since` on; with `follow`
/// also those that come, until their writer ends. An error of `take` ends it.
pub fn read(
    dir: &Path,
    set: Set,
    since: Option<SystemTime>,
    follow: bool,
    take: &mut dyn FnMut(Stream, &[u8]) -> Result<()>,
) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let from = rustix::fs::open(dir, flags, Mode::empty())
        .with_context(|| format!("cannot open {}", dir.display()))?;
    // Before the files are looked at, so that no change is missed.
    let watch = follow.then(|| watch(dir)).transpose()?;
    let since = since.and_then(|since| since.duration_since(UNIX_EPOCH).ok());
    let mut reader = Reader {
        dir: from,
        set,
        since_ns: since.map_or(0, |since| {
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        }),
        take,
    };
    let mut files = reader.files()?;
    loop {
        while files.len() > 1 {
            reader.drain(&mut files[0])?;
            files.remove(0);
        }
        let Some(last) = files.first_mut() else {
            return Ok(());
        };
        reader.drain(last)?;
        let Some(watch) = &watch else { return Ok(()) };
        files = match reader.await_more(watch, files.remove(0))? {
            Some(files) => files,
            None => return Ok(()),
        };
    }
}

struct Reader<'a> {
    dir: OwnedFd,
    set: Set,
    since_ns: u64,
    take: &'a mut dyn FnMut(Stream, &[u8]) -> Result<()>,
}

impl Reader<'_> {
    /// The files there are, the oldest first.
    fn files(&self) -> Result<Vec<Cursor>> {
        let mut files = Vec::new();
        let mut seen = Vec::new();
        // The newest first: one that is put aside meanwhile is then found twice, and none is missed.
        for age in 0..FILES {
            let name = self.set.file(age);
            let Some(file) = self
                .open(&name)
                .with_context(|| format!("cannot read {name}"))?
            else {
                continue;
            };
            let identity = identity(&file)?;
            if !seen.contains(&identity) {
                seen.push(identity);
                files.push(Cursor::new(file));
            }
        }
        files.reverse();
        Ok(files)
    }

    fn open(&self, name: &str) -> io::Result<Option<File>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match rustix::fs::openat(&self.dir, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        Ok(Some(file))
    }

    /// Gives away all whole records from `cursor` on.
    fn drain(&mut self, cursor: &mut Cursor) -> Result<()> {
        loop {
            match cursor.next().context("a log cannot be read")? {
                Found::Record {
                    at_ns,
                    stream,
                    data,
                } => {
                    if at_ns >= self.since_ns {
                        (self.take)(stream, data)?;
                    }
                }
                // The next writer takes it back, so more may come.
                Found::End | Found::Damage => return Ok(()),
            }
        }
    }

    /// Waits until there may be more than what was read up to `cursor`, and returns it with the files after its
    /// own; None where the writer has gone and there is no more.
    fn await_more(&mut self, watch: &OwnedFd, mut cursor: Cursor) -> Result<Option<Vec<Cursor>>> {
        let mut closing = 0;
        loop {
            // In this order: once it is unlocked, what is in it and after it is all there will be.
            let ended = !is_locked(cursor.file())?;
            let (newer, missed) = self.newer(&cursor)?;
            if ended || !newer.is_empty() {
                self.drain(&mut cursor)?;
                if missed {
                    let note = b"some output was put away before it was read\n";
                    (self.take)(Stream::Note, note)?;
                }
                return Ok((!newer.is_empty()).then_some(newer));
            }
            let patience = (closing > 0).then_some(&CLOSING);
            match poll(&mut [PollFd::new(watch, PollFlags::IN)], patience) {
                Ok(0) => closing -= 1,
                Ok(_) => {
                    if read_events(watch)? {
                        closing = CLOSING_TRIES;
                    }
                    self.drain(&mut cursor)?;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("a log cannot be watched"),
            }
        }
    }

    /// The files that came after that of `cursor`, the oldest first, and whether there were more: that happens
    /// where who reads is slower than who writes.
    fn newer(&self, cursor: &Cursor) -> Result<(Vec<Cursor>, bool)> {
        let own = identity(cursor.file())?;
        let mut files = self.files()?;
        let mut at = None;
        for (index, file) in files.iter().enumerate() {
            if identity(file.file())? == own {
                at = Some(index);
            }
        }
        if let Some(at) = at {
            files.drain(..=at);
        }
        let missed = at.is_none() && !files.is_empty();
        Ok((files, missed))
    }
}

/// What tells a file from all others for as long as it is open.
fn identity(file: &File) -> Result<(u64, u64)> {
    let metadata = file.metadata().context("a log cannot be looked at")?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Whether a writer has the file open.
fn is_locked(file: &File) -> Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => {
            flock(file, FlockOperation::Unlock).context("a log cannot be unlocked")?;
            Ok(false)
        }
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(error).context("a log's lock cannot be looked at"),
    }
}

/// Tells of all that happens to the files in `dir`.
fn watch(dir: &Path) -> Result<OwnedFd> {
    let cannot = || format!("{} cannot be watched", dir.display());
    let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).with_context(cannot)?;
    let events = WatchFlags::MODIFY
        | WatchFlags::CREATE
        | WatchFlags::MOVED_TO
        | WatchFlags::CLOSE_WRITE
        | WatchFlags::DELETE_SELF;
    inotify::add_watch(&watch, dir, events).with_context(cannot)?;
    Ok(watch)
}

/// Reads all events there are; whether a file was closed that had been written to.
fn read_events(watch: &OwnedFd) -> Result<bool> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(watch, &mut buffer);
    let mut closed = false;
    loop {
        match events.next() {
            Ok(event) => {
                // Where events were lost, that may have been among them.
                let telling = ReadFlags::CLOSE_WRITE | ReadFlags::QUEUE_OVERFLOW;
                closed |= event.events().intersects(telling);
            }
            Err(Errno::AGAIN) => return Ok(closed),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("a log cannot be watched"),
        }
    }
}
