//! Files and directories as a stream, from one filesystem to another: both ends of `mvm cp`.
//!
//! The stream is a tar archive in the pax format (POSIX.1-2024, "pax Interchange Format"), with
//! GNU's extension for sparse files (GNU tar manual, "PAX Format, Version 1.0"); `tar` encodes the
//! header blocks. It travels in chunks ([`ChunkWriter`]), so that its end, and an error midway,
//! are told from a connection that broke. Nothing is stored on the way.
//!
//! [`pack()`] reads a tree and [`unpack()`] makes one. Whoever sends an archive is not trusted: what is
//! unpacked stays below the destination ([`chain`]), whatever the names in the archive say, and
//! whatever somebody else does to the destination meanwhile.

mod attributes;
mod chain;
mod chunk;
mod decode;
mod encode;
mod map;
mod member;
mod pack;
mod pax;
mod place;
mod put;
#[cfg(test)]
mod tests;
mod unpack;

use std::io;

pub use chunk::{CHUNK, ChunkReader, ChunkWriter};
pub use pack::{PackOptions, pack};
pub use place::Root;
pub use unpack::{Policy, Summary, unpack};

/// The longest name of a member, and all its other extended attributes together, in bytes.
const MAX_EXTENDED: u64 = 1 << 20;

/// Why a tree was not packed or an archive not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The archive is not what it should be.
    #[error("the archive is damaged: {0}")]
    Damaged(&'static str),
    /// There is something else than an archive.
    #[error("what should be a tar archive {0}")]
    NoArchive(&'static str),
    /// The archive holds something that must not be unpacked here.
    #[error("the archive holds {name:?}, {why}")]
    Refused {
        /// The member's name.
        name: String,
        /// A relative clause.
        why: &'static str,
    },
    /// A file could not be read or made.
    #[error("{path:?} {what}")]
    File {
        /// Its name, as the user would say it.
        path: String,
        /// What could not be done.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A path that was asked for is not fit for this.
    #[error("{path:?} {why}")]
    Unfit {
        /// As it was asked for.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Files became shorter while they were read; everything else was copied.
    #[error(
        "{path:?} became shorter while it was copied, so that the copy ends in zeros ({count} such files)"
    )]
    Shrunk {
        /// The first of them.
        path: String,
        /// How many.
        count: u64,
    },
    /// The other side stopped, and said why.
    #[error("{0}")]
    Peer(String),
    /// The connection ended before the archive did.
    #[error("the connection to the machine ended before everything was copied")]
    Lost,
    /// The stream of the archive cannot be read or written.
    #[error("the stream of the archive broke")]
    Stream(#[source] io::Error),
}

impl ArchiveError {
    /// What `error` means, which came of reading or writing the stream itself.
    pub fn stream(error: io::Error) -> Self {
        match error.downcast::<chunk::PeerFailed>() {
            Ok(failed) => Self::Peer(failed.0),
            Err(error) => match error.kind() {
                io::ErrorKind::UnexpectedEof => Self::Damaged("it ends in the middle"),
                io::ErrorKind::ConnectionAborted
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::BrokenPipe => Self::Lost,
                _ => Self::Stream(error),
            },
        }
    }

    fn file(path: &[u8], what: &'static str, source: impl Into<io::Error>) -> Self {
        Self::File {
            path: shown(path),
            what,
            source: source.into(),
        }
    }

    fn unfit(path: &[u8], why: &'static str) -> Self {
        let path = shown(path);
        Self::Unfit { path, why }
    }

    /// One sentence with the reason in it, for the other side.
    pub fn sentence(&self) -> String {
        match std::error::Error::source(self) {
            Some(source) => format!("{self}: {source}"),
            None => self.to_string(),
        }
    }
}

/// A name as it stands in messages: readable, and not endless.
fn shown(name: &[u8]) -> String {
    const LONGEST: usize = 1000;
    let start = name.len().saturating_sub(LONGEST);
    let cut = if start > 0 { "…" } else { "" };
    let end = name.get(start..).unwrap_or_default();
    format!("{cut}{}", String::from_utf8_lossy(end))
}
