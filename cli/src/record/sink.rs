//! The file of a set that grows: what is written to it is written whole, and a file that is full is put aside.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::cursor::{Cursor, Found};
use super::{FILES, HEADER, Header, Set, Stream};
use crate::lock;

/// How long another process may take to let go of the log, and how often that is looked at.
const PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);

/// Where records are written.
///
/// The directory is held open: it keeps being the machine's when the machine is renamed.
#[derive(Debug)]
pub struct Sink {
    dir: OwnedFd,
    set: Set,
    file: Option<Growing>,
}

#[derive(Debug)]
struct Growing {
    file: File,
    /// Bytes of whole records in it.
    len: u64,
}

impl Sink {
    /// The set in the directory `dir`.
    pub fn new(dir: &Path, set: Set) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            dir: rustix::fs::open(dir, flags, Mode::empty())?,
            set,
            file: None,
        })
    }

    /// Opens the file that grows, for those who follow to know that there is a writer.
    pub fn open(&mut self) -> io::Result<()> {
        self.growing().map(drop)
    }

    /// Writes `records`, each of them whole. Where this fails, returns how many bytes of data were not written.
    pub fn write(&mut self, mut records: &[u8]) -> Result<(), (io::Error, u64)> {
        while !records.is_empty() {
            let (now, later) = match self.fitting(records) {
                Ok(parts) => parts,
                Err(error) => return Err((error, data_len(records))),
            };
            if now.is_empty() {
                if let Err(error) = self.rotate() {
                    return Err((error, data_len(records)));
                }
                continue;
            }
            if let Err((error, written)) = self.append(now) {
                let lost = records.get(written..).unwrap_or_default();
                return Err((error, data_len(lost)));
            }
            records = later;
        }
        Ok(())
    }

    /// Those of `records` that go into the growing file, and those that do not. An empty file takes at least one.
    fn fitting<'a>(&mut self, records: &'a [u8]) -> io::Result<(&'a [u8], &'a [u8])> {
        let max = self.set.max_file;
        let len = self.growing()?.len;
        let (fitting, rest) = split(records, max.saturating_sub(len));
        if len > 0 || !fitting.is_empty() {
            return Ok((fitting, rest));
        }
        let first = header_at(records, 0).map_or(records.len(), |header| HEADER + header.len);
        Ok(records.split_at(first.min(records.len())))
    }

    /// Writes `records`, which fit. Where this fails, returns how many bytes of whole records were written.
    fn append(&mut self, records: &[u8]) -> Result<(), (io::Error, usize)> {
        let growing = self.growing().map_err(|error| (error, 0))?;
        let Err(error) = growing.file.write_all(records) else {
            growing.len += records.len() as u64;
            return Ok(());
        };
        // Half a record would hide all that come after it.
        let len = growing
            .file
            .metadata()
            .map_or(growing.len, |found| found.len());
        let (whole, _) = split(records, len.saturating_sub(growing.len));
        growing.len += whole.len() as u64;
        if growing.file.set_len(growing.len).is_err() {
            self.file = None;
        }
        Err((error, whole.len()))
    }

    fn growing(&mut self) -> io::Result<&mut Growing> {
        let growing = match self.file.take() {
            Some(growing) => growing,
            None => self.open_growing()?,
        };
        Ok(self.file.insert(growing))
    }

    fn open_growing(&self) -> io::Result<Growing> {
        let flags =
            OFlags::RDWR | OFlags::APPEND | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match rustix::fs::openat(&self.dir, self.set.file(0), flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return self.make_growing(&[]),
            Err(error) => return Err(error.into()),
        };
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("the log is not a regular file"));
        }
        lock(&file)?;
        // What a writer that was killed left half written is taken back.
        let mut cursor = Cursor::new(file.try_clone()?);
        while let Found::Record { .. } = cursor.next()? {}
        let len = cursor.position();
        if file.metadata()?.len() > len {
            file.set_len(len)?;
        }
        Ok(Growing { file, len })
    }

    /// Makes an empty file the growing one, after the files of these ages have been put aside.
    fn make_growing(&self, aside: &[usize]) -> io::Result<Growing> {
        let (partial, name) = (format!(".{}.new", self.set.name), self.set.file(0));
        match rustix::fs::unlinkat(&self.dir, &partial, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = File::from(rustix::fs::openat(&self.dir, &partial, flags, mode)?);
        // Before anybody sees it: one that is not locked has no writer.
        lock(&file)?;
        for age in aside {
            let (from, to) = (self.set.file(*age), self.set.file(age + 1));
            match rustix::fs::renameat(&self.dir, from, &self.dir, to) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        rustix::fs::renameat(&self.dir, partial, &self.dir, name)?;
        Ok(Growing { file, len: 0 })
    }

    /// Puts the growing file aside, and the oldest one away.
    fn rotate(&mut self) -> io::Result<()> {
        let aside: Vec<_> = (0..FILES - 1).rev().collect();
        let growing = self.make_growing(&aside)?;
        // Those who follow see the next one before this one is closed, and so unlocked.
        self.file = Some(growing);
        Ok(())
    }
}

/// Locks `file` for as long as it is open. Whoever has it can only be about to let it go: the owner of the
/// machine before this one, on its way out, or somebody who looks whether it is locked.
fn lock(file: &File) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !lock::attempt(file)? {
        if Instant::now() > deadline {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                "another process writes to the log",
            ));
        }
        thread::sleep(POLL);
    }
    Ok(())
}

/// The records of `records` that fit into `room` bytes, and the rest.
fn split(records: &[u8], room: u64) -> (&[u8], &[u8]) {
    let mut end = 0;
    while let Some(header) = header_at(records, end) {
        let next = end + HEADER + header.len;
        if next as u64 > room {
            break;
        }
        end = next;
    }
    records.split_at(end.min(records.len()))
}

/// How many bytes of data are in `records`.
fn data_len(records: &[u8]) -> u64 {
    let (mut at, mut sum) = (0, 0);
    while let Some(header) = header_at(records, at) {
        at += HEADER + header.len;
        // Those that tell of earlier losses are no output.
        if header.stream != Stream::Note {
            sum += header.len as u64;
        }
    }
    sum
}

fn header_at(records: &[u8], at: usize) -> Option<Header> {
    Header::decode(records.get(at..)?.first_chunk()?)
}
