//! What a machine in the background printed, kept in files that rotate: byte for byte, in the order in which it
//! came, with the time and the stream of each piece.
//!
//! A set of records is the file `NAME`, which grows, and `NAME.1` and `NAME.2`, which came before it, the oldest
//! last. A file is a sequence of records and nothing else:
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | nanoseconds since 1970-01-01 UTC, little endian |
//! | 1 | the [`Stream`] |
//! | 4 | how many bytes follow, little endian, at most [`MAX_DATA`] |
//! | … | what was printed |
//!
//! The writer holds a lock (flock) on the file that grows, so that whoever follows knows when no more can come.

mod cursor;
mod follow;
mod sink;
#[cfg(test)]
mod tests;
mod writer;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use follow::read;
pub use writer::Writer;

/// The most bytes in one record.
pub const MAX_DATA: usize = 1 << 20;

/// Bytes before a record's data.
const HEADER: usize = 13;

/// How many files there are of a set.
const FILES: usize = 3;

/// Some records that belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Set {
    /// The name of the file that grows.
    name: &'static str,
    /// How long who prints may be held up by a disk that does not keep up, before output is lost.
    patience: Duration,
    /// The longest file, in bytes.
    max_file: u64,
}

/// What a machine's command printed.
pub const LOG: Set = Set {
    name: "log",
    patience: Duration::from_secs(1),
    max_file: 10_000_000,
};

/// What came out of a machine's serial port; a virtual CPU is what waits for that.
pub const CONSOLE: Set = Set {
    name: "console",
    patience: Duration::ZERO,
    max_file: 10_000_000,
};

impl Set {
    /// The name of the file that was the growing one `age` files ago.
    fn file(self, age: usize) -> String {
        match age {
            0 => self.name.to_owned(),
            _ => format!("{}.{age}", self.name),
        }
    }
}

/// Where a record came from. The numbers are those on disk; 0 is none, as a crash of the host can leave zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// The command's standard output.
    Stdout = 1,
    /// The command's standard error.
    Stderr = 2,
    /// The command's terminal.
    Terminal = 3,
    /// The machine's serial port.
    Console = 4,
    /// mvm itself, about these records; one sentence.
    Note = 5,
}

impl Stream {
    fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Stdout,
            Self::Stderr,
            Self::Terminal,
            Self::Console,
            Self::Note,
        ]
        .into_iter()
        .find(|stream| *stream as u8 == byte)
    }
}

/// What is before a record's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    at_ns: u64,
    stream: Stream,
    len: usize,
}

impl Header {
    /// That of `len` bytes, at most [`MAX_DATA`], printed now.
    fn now(stream: Stream, len: usize) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            at_ns: now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)),
            stream,
            len,
        }
    }

    fn encode(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&self.at_ns.to_le_bytes());
        bytes[8] = self.stream as u8;
        // MAX_DATA fits.
        bytes[9..].copy_from_slice(&(self.len as u32).to_le_bytes());
        bytes
    }

    /// None where that is no header.
    fn decode(bytes: &[u8; HEADER]) -> Option<Self> {
        let [time @ .., stream, a, b, c, d] = *bytes;
        let len = u32::from_le_bytes([a, b, c, d]) as usize;
        let stream = Stream::from_byte(stream)?;
        (len <= MAX_DATA).then_some(Self {
            at_ns: u64::from_le_bytes(time),
            stream,
            len,
        })
    }
}
