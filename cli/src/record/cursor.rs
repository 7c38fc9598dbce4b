//! Reading one file of records, which may be growing, torn, or nothing of the kind.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{HEADER, Header, MAX_DATA, Stream};

/// Bytes read at a time, at least.
const CHUNK: usize = 64 << 10;

/// A place in a file of records: always between two of them.
#[derive(Debug)]
pub struct Cursor {
    file: File,
    /// Where the next record is.
    at: u64,
    /// What was read of the file from `at - start` on.
    buffer: Vec<u8>,
    /// Where in the buffer the next record is.
    start: usize,
}

/// What is at a cursor.
#[derive(Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// A record, which is now behind it.
    Record {
        /// Nanoseconds since 1970.
        at_ns: u64,
        /// Where it came from.
        stream: Stream,
        /// What was printed.
        data: &'a [u8],
    },
    /// The end of the file, or of its whole records: there may be more later.
    End,
    /// Something that is no record, so nothing behind it can be found.
    Damage,
}

impl Cursor {
    /// At the beginning of `file`.
    pub fn new(file: File) -> Self {
        Self {
            file,
            at: 0,
            buffer: Vec::new(),
            start: 0,
        }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where in the file the next record is or will be.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The next record.
    pub fn next(&mut self) -> io::Result<Found<'_>> {
        if !self.fill(HEADER)? {
            return Ok(Found::End);
        }
        let header = self
            .buffer
            .get(self.start..)
            .and_then(|rest| rest.first_chunk());
        let Some(header) = header.and_then(Header::decode) else {
            self.forget();
            return Ok(Found::Damage);
        };
        let whole = HEADER + header.len;
        if !self.fill(whole)? {
            return Ok(Found::End);
        }
        let from = self.start + HEADER;
        self.start += whole;
        self.at += whole as u64;
        let data = self.buffer.get(from..self.start).unwrap_or_default();
        Ok(Found::Record {
            at_ns: header.at_ns,
            stream: header.stream,
            data,
        })
    }

    /// Whether there are `wanted` bytes in the buffer, read where they were not.
    fn fill(&mut self, wanted: usize) -> io::Result<bool> {
        debug_assert!(wanted <= HEADER + MAX_DATA);
        if self.buffer.len() - self.start >= wanted {
            return Ok(true);
        }
        self.buffer.drain(..self.start);
        self.start = 0;
        let mut have = self.buffer.len();
        self.buffer.resize(wanted.max(CHUNK), 0);
        while have < wanted {
            let at = self.at + have as u64;
            match self.file.read_at(&mut self.buffer[have..], at) {
                Ok(0) => break,
                Ok(len) => have += len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.forget();
                    return Err(error);
                }
            }
        }
        self.buffer.truncate(have);
        if have < wanted {
            // Half a record may be taken back, and another one written at its place.
            self.forget();
            return Ok(false);
        }
        Ok(true)
    }

    fn forget(&mut self) {
        self.buffer.clear();
        self.start = 0;
    }
}
