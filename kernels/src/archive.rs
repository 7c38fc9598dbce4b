//! The regular files of a tar archive from an untrusted place, one after the other.
//!
//! Nothing is unpacked here: the caller is shown each file and decides. Names that lead out of
//! the archive, and sizes beyond what was allowed, end the reading; links and devices are passed
//! over.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tar::EntryType;
use thiserror::Error;

/// The longest file name that is accepted, in bytes (`PATH_MAX`).
const MAX_NAME: u64 = 4096;
/// The largest extended header that is accepted, in bytes.
const MAX_EXTENSION: u64 = 64 << 10;

/// Memory for a decoder's dictionary, in bytes.
const DICTIONARY_LIMIT: u64 = 256 << 20;

/// Why an archive was not read to its end.
#[derive(Debug, Error)]
pub enum ArchiveError {
    /// It is cut off or its headers are damaged.
    #[error("the archive is damaged or truncated")]
    Damaged(#[source] io::Error),
    /// It is not compressed in a known way.
    #[error("the archive member {0} is compressed in a way that is not known")]
    UnknownCompression(String),
    /// A file's name leads elsewhere.
    #[error("the archive is hostile: it holds a file named {0:?}")]
    UnsafeName(String),
    /// There is more in it than was allowed.
    #[error("the archive holds more than {limit} {what}, which no such package does")]
    TooLarge {
        /// How many were allowed.
        limit: u64,
        /// Of what: "bytes", "files".
        what: &'static str,
    },
    /// The caller could not use a file.
    #[error("unpacking {path} failed")]
    Visit {
        /// The file's name in the archive.
        path: PathBuf,
        /// What the caller said.
        source: io::Error,
    },
}

/// How much of an archive is read.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of the uncompressed archive.
    pub bytes: u64,
    /// Entries of any kind.
    pub entries: u64,
}

/// A regular file of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name: relative, without `..`.
    pub path: PathBuf,
    /// Bytes in it.
    pub size: u64,
    /// Whether it is marked as a program.
    pub is_executable: bool,
    /// When it was changed last: seconds since 1970-01-01 UTC.
    pub modified: u64,
}

/// Is shown a file of an archive and its contents, and says when it could not use them.
pub type Visitor<'a> = dyn FnMut(&Member, &mut dyn Read) -> io::Result<()> + 'a;

/// Calls `visit` for each regular file. What the visitor leaves unread is passed over.
///
/// # Errors
/// The first thing that is wrong with the archive, or that `visit` returns.
pub fn for_each_file(
    tar: impl Read,
    limits: Limits,
    visit: &mut Visitor<'_>,
) -> Result<(), ArchiveError> {
    let too_large = |limit, what| ArchiveError::TooLarge { limit, what };
    let mut bounded = Bounded {
        inner: tar,
        left: limits.bytes,
        exceeded: false,
    };
    let result = read_entries(&mut bounded, limits, visit).and_then(|()| {
        // A decoder checks its sums at the very end, which lies behind the archive's own.
        io::copy(&mut bounded, &mut io::sink()).map_err(ArchiveError::Damaged)?;
        Ok(())
    });
    if bounded.exceeded {
        return Err(too_large(limits.bytes, "bytes"));
    }
    result
}

fn read_entries(
    tar: impl Read,
    limits: Limits,
    visit: &mut Visitor<'_>,
) -> Result<(), ArchiveError> {
    let mut archive = tar::Archive::new(tar);
    // Raw, because the crate would read a long name of any length into memory.
    let entries = archive.entries().map_err(ArchiveError::Damaged)?.raw(true);
    let mut long_name: Option<Vec<u8>> = None;
    let mut count = 0u64;
    for entry in entries {
        let mut entry = entry.map_err(ArchiveError::Damaged)?;
        count += 1;
        if count > limits.entries {
            return Err(ArchiveError::TooLarge {
                limit: limits.entries,
                what: "files",
            });
        }
        let size = entry.header().entry_size().map_err(ArchiveError::Damaged)?;
        match entry.header().entry_type() {
            EntryType::GNULongName => {
                let mut name = small(&mut entry, size, MAX_NAME)?;
                while name.last() == Some(&0) {
                    name.pop();
                }
                long_name = Some(name);
            }
            EntryType::XHeader => {
                let text = small(&mut entry, size, MAX_EXTENSION)?;
                long_name = pax_path(&text).map_err(ArchiveError::Damaged)?;
            }
            EntryType::GNULongLink | EntryType::XGlobalHeader => {}
            EntryType::Regular | EntryType::Continuous => {
                let name = match long_name.take() {
                    Some(name) => name,
                    None => entry.header().path_bytes().into_owned(),
                };
                let path = safe_path(&name).ok_or_else(|| {
                    ArchiveError::UnsafeName(String::from_utf8_lossy(&name).into_owned())
                })?;
                let header = entry.header();
                let member = Member {
                    path,
                    size,
                    is_executable: header.mode().is_ok_and(|mode| mode & 0o111 != 0),
                    modified: header.mtime().unwrap_or(0),
                };
                visit(&member, &mut entry).map_err(|source| ArchiveError::Visit {
                    path: member.path,
                    source,
                })?;
            }
            _ => long_name = None,
        }
    }
    Ok(())
}

/// A decoder for the archive member `name`, chosen by its suffix.
///
/// # Errors
/// When the suffix is not one of `.xz`, `.zst`, `.gz`, `.bz2` and `.tar`.
pub fn decoder<'a>(name: &str, data: impl Read + 'a) -> Result<Box<dyn Read + 'a>, ArchiveError> {
    let data = BufReader::with_capacity(256 << 10, data);
    Ok(match name.rsplit('.').next() {
        Some("xz") => {
            let stream = liblzma::stream::Stream::new_stream_decoder(
                DICTIONARY_LIMIT,
                liblzma::stream::CONCATENATED,
            )
            .map_err(|error| ArchiveError::Damaged(error.into()))?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(data, stream))
        }
        Some("zst") => {
            Box::new(zstd::stream::read::Decoder::with_buffer(data).map_err(ArchiveError::Damaged)?)
        }
        Some("gz") => Box::new(flate2::bufread::MultiGzDecoder::new(data)),
        Some("bz2") => Box::new(bzip2::bufread::MultiBzDecoder::new(data)),
        Some("tar") => Box::new(data),
        _ => return Err(ArchiveError::UnknownCompression(name.to_owned())),
    })
}

/// Writes an archive's file to `target`, which must not exist yet, and makes the directories that
/// lead to it.
///
/// # Errors
/// When a file cannot be made, or the archive ends early.
pub fn write_file(target: &Path, member: &Member, contents: &mut dyn Read) -> io::Result<()> {
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(if member.is_executable { 0o755 } else { 0o644 })
        .open(target)?;
    let copied = io::copy(&mut contents.take(member.size), &mut file)?;
    if copied == member.size {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// Reads an entry that stands for a name.
fn small(entry: &mut impl Read, size: u64, limit: u64) -> Result<Vec<u8>, ArchiveError> {
    if size > limit {
        return Err(ArchiveError::TooLarge {
            limit,
            what: "bytes of file name",
        });
    }
    let mut bytes = Vec::new();
    entry
        .take(size)
        .read_to_end(&mut bytes)
        .map_err(ArchiveError::Damaged)?;
    Ok(bytes)
}

/// The `path` record of a POSIX extended header.
fn pax_path(text: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut path = None;
    for extension in tar::PaxExtensions::new(text) {
        let extension = extension?;
        if extension.key_bytes() == b"path" {
            path = Some(extension.value_bytes().to_owned());
        }
    }
    Ok(path)
}

/// `name` as a relative path that stays below where it starts; None where it does not.
fn safe_path(name: &[u8]) -> Option<PathBuf> {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    if name.starts_with(b"/") || name.contains(&0) || name.len() as u64 > MAX_NAME {
        return None;
    }
    let mut path = PathBuf::new();
    for part in name.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return None,
            part => path.push(OsStr::from_bytes(part)),
        }
    }
    (!path.as_os_str().is_empty()).then_some(path)
}

/// A reader that fails at a limit and remembers that it did.
struct Bounded<R> {
    inner: R,
    left: u64,
    exceeded: bool,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = buffer.len();
        // One byte more than is left shows whether the archive ends here.
        let allowed = usize::try_from(self.left.saturating_add(1)).unwrap_or(len);
        let n = match buffer.get_mut(..allowed.min(len)) {
            Some(part) => self.inner.read(part)?,
            None => 0,
        };
        match self.left.checked_sub(n as u64) {
            Some(left) => self.left = left,
            None => {
                self.exceeded = true;
                return Err(io::Error::other("the archive is too large"));
            }
        }
        Ok(n)
    }
}

#[cfg(test)]
#[path = "archive_tests.rs"]
pub(crate) mod tests;
