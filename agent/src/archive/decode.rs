//! Members read from tar headers and data: what an untrusted sender wrote.
//!
//! Understood are the formats in use: ustar, pax, and GNU's with its long names and sparse files.
//! Nothing here trusts a number: headers are bounded, sizes only say how much is read.

use std::io::{BufRead, Read};

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use super::encode::{BLOCK, pad};
use super::member::{Attribute, Extent, Kind, Member, Time};
use super::{ArchiveError, MAX_EXTENDED, attributes, map, pax, shown};

/// Reads an archive.
pub struct Decoder<R> {
    from: R,
    /// Bytes of this member's data that were not read yet.
    left: u64,
    padding: usize,
    started: bool,
}

/// What extended headers say of the member behind them.
#[derive(Debug, Default)]
struct Extended {
    name: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    modified: Option<Time>,
    attributes: Vec<Attribute>,
    sparse: Sparse,
}

/// What records say of a sparse file.
#[derive(Debug, Default)]
struct Sparse {
    version: [Option<u64>; 2],
    name: Option<Vec<u8>>,
    size: Option<u64>,
    is_old: bool,
}

impl<R: BufRead> Decoder<R> {
    /// Reads from `from`, which ends with the archive.
    pub fn new(from: R) -> Self {
        Self {
            from,
            left: 0,
            padding: 0,
            started: false,
        }
    }

    /// The next member, or None at the archive's end. What was not read of the data of the one before
    /// it is passed over.
    pub fn next(&mut self) -> Result<Option<Member>, ArchiveError> {
        self.pass_over()?;
        let mut extended = Extended::default();
        let mut seen = Vec::new();
        loop {
            let Some(header) = self.header()? else {
                return if seen.is_empty() { Ok(None) } else { Err(CUT) };
            };
            let size = header.entry_size().map_err(|_| NUMBER)?;
            let entry_type = header.entry_type();
            // Or what is kept of them would grow with their number.
            if seen.contains(&entry_type) {
                return Err(ArchiveError::Damaged("a file has two extended headers"));
            }
            match entry_type {
                EntryType::XHeader => {
                    let records = self.extended(size)?;
                    extended.read(&records)?;
                }
                EntryType::GNULongName => extended.name = Some(self.long_name(size)?),
                EntryType::GNULongLink => extended.target = Some(self.long_name(size)?),
                // Comments, and defaults that nobody uses.
                EntryType::XGlobalHeader => {
                    self.extended(size)?;
                    continue;
                }
                _ => return self.member(&header, extended).map(Some),
            }
            seen.push(entry_type);
        }
    }

    /// Some of this member's data that was not read yet; nothing at its end.
    pub fn data(&mut self) -> Result<&[u8], ArchiveError> {
        if self.left == 0 {
            return Ok(&[]);
        }
        let left = self.left;
        let data = self.from.fill_buf().map_err(ArchiveError::stream)?;
        if data.is_empty() {
            return Err(CUT);
        }
        let len = usize::try_from(left).map_or(data.len(), |left| left.min(data.len()));
        Ok(data.get(..len).unwrap_or_default())
    }

    /// Says that the first `len` bytes of [`Self::data`] have been used.
    pub fn consume(&mut self, len: usize) {
        self.left = self.left.saturating_sub(len as u64);
        self.from.consume(len);
    }

    /// Reads what follows the archive's end, to the end of the stream.
    pub fn drain(&mut self) -> Result<(), ArchiveError> {
        loop {
            let len = self.from.fill_buf().map_err(ArchiveError::stream)?.len();
            if len == 0 {
                return Ok(());
            }
            self.from.consume(len);
        }
    }

    fn pass_over(&mut self) -> Result<(), ArchiveError> {
        self.left = self.left.checked_add(self.padding as u64).ok_or(NUMBER)?;
        self.padding = 0;
        while self.left > 0 {
            let len = self.data()?.len();
            self.consume(len);
        }
        Ok(())
    }

    /// The next header block; None at the archive's end, which is a block of zeros.
    fn header(&mut self) -> Result<Option<Header>, ArchiveError> {
        let mut header = Header::new_old();
        if !self.started
            && self
                .from
                .fill_buf()
                .map_err(ArchiveError::stream)?
                .is_empty()
        {
            return Err(ArchiveError::NoArchive("is empty"));
        }
        self.block(header.as_mut_bytes())?;
        if header.as_bytes().iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let mut signed = header.clone();
        signed.set_cksum();
        let sums = (signed.cksum(), header.cksum());
        if !matches!(sums, (Ok(right), Ok(written)) if right == written) {
            return Err(match self.started {
                true => ArchiveError::Damaged("a header has the wrong checksum"),
                false => no_archive(header.as_bytes()),
            });
        }
        self.started = true;
        Ok(Some(header))
    }

    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<(), ArchiveError> {
        self.from.read_exact(block).map_err(ArchiveError::stream)
    }

    fn extended(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        if size > MAX_EXTENDED {
            return Err(ArchiveError::Damaged(
                "an extended header has more than 1 MiB",
            ));
        }
        let mut content = Vec::new();
        let read = (&mut self.from).take(size).read_to_end(&mut content);
        read.map_err(ArchiveError::stream)?;
        if (content.len() as u64) < size {
            return Err(CUT);
        }
        let mut padding = [0; BLOCK];
        let padding = padding.get_mut(..pad(size)).unwrap_or_default();
        self.from
            .read_exact(padding)
            .map_err(ArchiveError::stream)?;
        Ok(content)
    }

    fn long_name(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        let mut name = self.extended(size)?;
        let len = name.iter().position(|&byte| byte == 0);
        name.truncate(len.unwrap_or(name.len()));
        Ok(name)
    }

    fn member(&mut self, header: &Header, extended: Extended) -> Result<Member, ArchiveError> {
        let header_name = || header.path_bytes().into_owned();
        let name = extended.name.unwrap_or_else(header_name);
        let name = extended.sparse.name.unwrap_or(name);
        let target = extended.target.or_else(|| {
            let target = header.link_name_bytes();
            target.map(|target| target.into_owned())
        });
        let stored = match extended.size {
            Some(size) => size,
            None => header.entry_size().map_err(|_| NUMBER)?,
        };
        let old_name = header.as_ustar().is_none() && header.as_gnu().is_none();
        let mut kind = match header.entry_type() {
            // Before ustar a directory was a file whose name ends so.
            EntryType::Regular if old_name && name.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File {
                size: stored,
                extents: None,
            },
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink(target.ok_or(NO_TARGET)?),
            EntryType::Link => Kind::HardLink(target.ok_or(NO_TARGET)?),
            EntryType::Fifo => Kind::Fifo,
            EntryType::Block => device(header, true)?,
            EntryType::Char => device(header, false)?,
            other => Kind::Unknown(other.as_byte()),
        };
        match kind {
            Kind::File { .. } | Kind::Unknown(_) => {
                self.left = stored;
                self.padding = pad(stored);
            }
            // Programs disagree whether data follows.
            Kind::HardLink(_) if stored > 0 => return Err(NUMBER),
            _ => {}
        }
        if header.entry_type() == EntryType::GNUSparse {
            kind = self.old_sparse(header, stored)?;
        } else if extended.sparse.is_old {
            let name = shown(&name);
            let why = "a sparse file in an obsolete format";
            return Err(ArchiveError::Refused { name, why });
        } else if extended.sparse.version == [Some(1), Some(0)] {
            kind = self.sparse(extended.sparse.size, stored)?;
        }
        let id = |own: Option<u64>, header: std::io::Result<u64>| {
            let id = own.map_or_else(|| header.map_err(|_| NUMBER), Ok)?;
            // The highest number means "no change" to the kernel.
            let id = u32::try_from(id).ok().filter(|&id| id != u32::MAX);
            id.ok_or(NUMBER)
        };
        Ok(Member {
            name,
            kind,
            mode: header.mode().map_err(|_| NUMBER)? & 0o7777,
            uid: id(extended.uid, header.uid())?,
            gid: id(extended.gid, header.gid())?,
            modified: match extended.modified {
                Some(time) => time,
                // Binary numbers are two's complement here.
                None => Time {
                    seconds: header.mtime().map_err(|_| NUMBER)? as i64,
                    nanoseconds: 0,
                },
            },
            attributes: extended.attributes,
        })
    }

    /// Reads the map in front of a sparse file's data.
    fn sparse(&mut self, size: Option<u64>, stored: u64) -> Result<Kind, ArchiveError> {
        let size = size.ok_or(SPARSE)?;
        let mut parser = map::Parser::default();
        let mut read = 0u64;
        loop {
            let mut block = [0; BLOCK];
            read += BLOCK as u64;
            self.left = stored.checked_sub(read).ok_or(SPARSE)?;
            self.block(&mut block)?;
            for byte in block {
                if let Some(extents) = parser.take(byte)? {
                    map::check(&extents, size, self.left)?;
                    let extents = Some(extents);
                    return Ok(Kind::File { size, extents });
                }
            }
        }
    }

    /// Reads the map of GNU's own format: four extents in the header, more in blocks behind it.
    fn old_sparse(&mut self, header: &Header, stored: u64) -> Result<Kind, ArchiveError> {
        let gnu = header.as_gnu().ok_or(SPARSE)?;
        let size = gnu.real_size().map_err(|_| SPARSE)?;
        let mut extents = Vec::new();
        let mut add = |parts: &[GnuSparseHeader]| {
            for part in parts.iter().filter(|part| !part.is_empty()) {
                if extents.len() > map::MAX_EXTENTS {
                    return Err(SPARSE);
                }
                extents.push(Extent {
                    offset: part.offset().map_err(|_| SPARSE)?,
                    len: part.length().map_err(|_| SPARSE)?,
                });
            }
            Ok(())
        };
        add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = GnuExtSparseHeader::new();
            self.block(block.as_mut_bytes())?;
            add(block.sparse())?;
            more = block.is_extended();
        }
        map::check(&extents, size, stored)?;
        let extents = Some(extents);
        Ok(Kind::File { size, extents })
    }
}

impl Extended {
    fn read(&mut self, records: &[u8]) -> Result<(), ArchiveError> {
        for record in pax::Records(records) {
            let (keyword, value) = record?;
            let number = || pax::number(value).map(Some).ok_or(NUMBER);
            let text = || Some(value.to_vec());
            match keyword {
                b"path" => self.name = text(),
                b"linkpath" => self.target = text(),
                b"size" => self.size = number()?,
                b"uid" => self.uid = number()?,
                b"gid" => self.gid = number()?,
                b"mtime" => self.modified = Some(pax::time(value).ok_or(NUMBER)?),
                b"GNU.sparse.major" => self.sparse.version[0] = number()?,
                b"GNU.sparse.minor" => self.sparse.version[1] = number()?,
                b"GNU.sparse.name" => self.sparse.name = text(),
                b"GNU.sparse.realsize" => self.sparse.size = number()?,
                b"GNU.sparse.map" | b"GNU.sparse.offset" => self.sparse.is_old = true,
                _ => {
                    if let Some(name) = keyword.strip_prefix(attributes::KEYWORD) {
                        self.attributes.push((name.to_vec(), value.to_vec()));
                    }
                }
            }
        }
        Ok(())
    }
}

const CUT: ArchiveError = ArchiveError::Damaged("it ends in the middle");
const NUMBER: ArchiveError = ArchiveError::Damaged("a number in a header makes no sense");
const SPARSE: ArchiveError = ArchiveError::Damaged("the map of a sparse file makes no sense");
const NO_TARGET: ArchiveError = ArchiveError::Damaged("a link leads nowhere");

fn device(header: &Header, block: bool) -> Result<Kind, ArchiveError> {
    let number = |field: std::io::Result<Option<u32>>| field.ok().flatten().ok_or(NUMBER);
    Ok(Kind::Device {
        block,
        major: number(header.device_major())?,
        minor: number(header.device_minor())?,
    })
}

/// What is wrong with a stream whose first block is no header.
fn no_archive(block: &[u8; BLOCK]) -> ArchiveError {
    let starts: [(&[u8], &str); 4] = [
        (b"\x1f\x8b", "is compressed: pass it through `gzip -dc`"),
        (b"BZh", "is compressed: pass it through `bzip2 -dc`"),
        (b"\xfd7zXZ", "is compressed: pass it through `xz -dc`"),
        (
            b"\x28\xb5\x2f\xfd",
            "is compressed: pass it through `zstd -dc`",
        ),
    ];
    let known = starts.iter().find(|(start, _)| block.starts_with(start));
    ArchiveError::NoArchive(known.map_or("is none", |(_, what)| what))
}
