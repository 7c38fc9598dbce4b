//! Where the data of a sparse file is: found in a file, written to an archive, read from one.
//!
//! In an archive it is a list of decimal numbers, one a line, in front of the data: how many
//! extents, then the offset and length of each (GNU tar manual, "PAX Format, Version 1.0").

use std::fs::File;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::encode::BLOCK;
use super::member::Extent;
use super::{ArchiveError, pax};

/// Extents of one file: more than a file gets that was not made to have many. What is behind the
/// last of them is taken as data.
pub const MAX_EXTENTS: usize = 1 << 18;

/// The extents of `file`, which is `size` bytes long; None where it has no holes, or the
/// filesystem does not tell.
pub fn find(file: &File, size: u64) -> Result<Option<Vec<Extent>>, Errno> {
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let offset = match seek(file, SeekFrom::Data(at)) {
            Ok(offset) => offset,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(None),
            Err(error) => return Err(error),
        };
        let end = if extents.len() + 1 == MAX_EXTENTS {
            size
        } else {
            match seek(file, SeekFrom::Hole(offset)) {
                Ok(end) => end,
                // It became shorter since.
                Err(Errno::NXIO) => break,
                Err(error) => return Err(error),
            }
        };
        // Whole blocks, as programs write and expect them in archives.
        let offset = offset - offset % BLOCK as u64;
        let end = end.next_multiple_of(BLOCK as u64).min(size);
        if offset >= end {
            break;
        }
        let len = end - offset;
        extents.push(Extent { offset, len });
        at = end;
    }
    let whole = Extent {
        offset: 0,
        len: size,
    };
    Ok((extents != [whole]).then_some(extents))
}

/// The text of a map for a file of `size` bytes, not padded.
pub fn text(extents: &[Extent], size: u64) -> Vec<u8> {
    // A last extent of no bytes says where the file ends, as other programs expect.
    let end = [Extent {
        offset: size,
        len: 0,
    }];
    let with_end = extents.iter().chain(&end);
    let mut text = format!("{}\n", extents.len() + 1).into_bytes();
    for extent in with_end {
        text.extend_from_slice(format!("{}\n{}\n", extent.offset, extent.len).as_bytes());
    }
    text
}

/// Reads a map line by line.
#[derive(Debug, Default)]
pub struct Parser {
    line: Vec<u8>,
    count: Option<u64>,
    offset: Option<u64>,
    extents: Vec<Extent>,
}

impl Parser {
    /// Takes the next byte; the extents when the map is complete.
    pub fn take(&mut self, byte: u8) -> Result<Option<Vec<Extent>>, ArchiveError> {
        if byte != b'\n' {
            // 2^64 has 20 digits.
            if self.line.len() == 20 {
                return Err(DAMAGED);
            }
            self.line.push(byte);
            return Ok(None);
        }
        let number = pax::number(&self.line).ok_or(DAMAGED)?;
        self.line.clear();
        let Some(count) = self.count else {
            // One more: the end.
            if number > MAX_EXTENTS as u64 + 1 {
                return Err(ArchiveError::Damaged("a sparse file has too many parts"));
            }
            self.count = Some(number);
            return Ok((number == 0).then(Vec::new));
        };
        let Some(offset) = self.offset.take() else {
            self.offset = Some(number);
            return Ok(None);
        };
        let len = number;
        self.extents.push(Extent { offset, len });
        let complete = self.extents.len() as u64 == count;
        Ok(complete.then(|| std::mem::take(&mut self.extents)))
    }
}

const DAMAGED: ArchiveError = ArchiveError::Damaged("the map of a sparse file makes no sense");

/// Checks that `extents` ascend, do not overlap and end within `size`, hold `data` bytes, and
/// are whole blocks but for the last: programs disagree on what else would be in the archive.
pub fn check(extents: &[Extent], size: u64, data: u64) -> Result<(), ArchiveError> {
    let mut at = 0u64;
    let mut left = data;
    for extent in extents {
        let end = extent.offset.checked_add(extent.len).ok_or(DAMAGED)?;
        let is_partial = extent.len > 0 && !(data - left).is_multiple_of(BLOCK as u64);
        if extent.offset < at || end > size || is_partial {
            return Err(DAMAGED);
        }
        left = left.checked_sub(extent.len).ok_or(DAMAGED)?;
        at = end;
    }
    if left > 0 { Err(DAMAGED) } else { Ok(()) }
}
