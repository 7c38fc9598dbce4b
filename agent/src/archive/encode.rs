//! Members written as tar headers and data.

use std::io::Write;

use tar::{EntryType, Header};

use super::member::{Extent, Kind, Member, Time};
use super::{ArchiveError, ChunkWriter, MAX_EXTENDED, map, pax};

/// Bytes of a block: headers are blocks, and data is padded to whole ones.
pub const BLOCK: usize = 512;

const ZEROS: [u8; BLOCK] = [0; BLOCK];

/// The length of a ustar header's fields for a name and a link's target.
const NAME_FIELD: usize = 100;

/// The largest size, and time, that a header's eleven octal digits hold.
const MAX_OCTAL: u64 = (1 << 33) - 1;

/// The largest user or group id that a header's seven octal digits hold.
const MAX_ID: u32 = (1 << 21) - 1;

/// Writes an archive.
pub struct Encoder<'a, W> {
    out: &'a mut ChunkWriter<W>,
    /// Bytes of data that this member still has to get.
    left: u64,
    padding: usize,
}

impl<'a, W: Write> Encoder<'a, W> {
    /// Writes to `out`.
    pub fn new(out: &'a mut ChunkWriter<W>) -> Self {
        Self {
            out,
            left: 0,
            padding: 0,
        }
    }

    /// Writes the headers of `member`. The data of its extents has to follow.
    ///
    /// Fails with Unfit where its name is longer than an archive may hold.
    pub fn member(&mut self, member: &Member) -> Result<(), ArchiveError> {
        let (stored, map) = match &member.kind {
            Kind::File {
                size,
                extents: Some(extents),
            } => {
                let mut text = map::text(extents, *size);
                text.resize(text.len().next_multiple_of(BLOCK), 0);
                let data: u64 = extents.iter().map(|extent: &Extent| extent.len).sum();
                (data + text.len() as u64, text)
            }
            Kind::File { size, .. } => (*size, Vec::new()),
            _ => (0, Vec::new()),
        };
        let records = records(member, stored);
        if records.len() as u64 > MAX_EXTENDED {
            return Err(ArchiveError::unfit(
                &member.name,
                "has a name or attributes of more than 1 MiB",
            ));
        }
        if !records.is_empty() {
            self.extended(&records)?;
        }
        let mut header = Header::new_ustar();
        fill(&mut header, member, stored)?;
        header.set_cksum();
        self.write(header.as_bytes())?;
        self.write(&map)?;
        self.left = stored - map.len() as u64;
        self.padding = pad(stored);
        Ok(())
    }

    /// Room for data of this member, less than it needs only where the chunk is full.
    pub fn room(&mut self) -> Result<&mut [u8], ArchiveError> {
        let room = self.out.room().map_err(ArchiveError::stream)?;
        let len = usize::try_from(self.left).map_or(room.len(), |left| left.min(room.len()));
        Ok(room.get_mut(..len).unwrap_or_default())
    }

    /// Takes the first `len` bytes of [`Self::room`].
    pub fn advance(&mut self, len: usize) {
        self.left = self.left.saturating_sub(len as u64);
        self.out.advance(len);
    }

    /// Writes data of this member.
    pub fn data(&mut self, data: &[u8]) -> Result<(), ArchiveError> {
        self.left = self.left.saturating_sub(data.len() as u64);
        self.write(data)
    }

    /// Ends this member's data; what is missing of it becomes zeros.
    pub fn end_member(&mut self) -> Result<(), ArchiveError> {
        while self.left > 0 {
            let room = self.room()?;
            room.fill(0);
            let len = room.len();
            self.advance(len);
        }
        let padding = std::mem::take(&mut self.padding);
        self.write(ZEROS.get(..padding).unwrap_or_default())
    }

    /// Ends the archive.
    pub fn finish(&mut self) -> Result<(), ArchiveError> {
        self.write(&ZEROS)?;
        self.write(&ZEROS)
    }

    /// Says something to the person who waits for the copy.
    pub fn note(&mut self, note: String) -> Result<(), ArchiveError> {
        self.out.note(note).map_err(ArchiveError::stream)
    }

    fn extended(&mut self, records: &[u8]) -> Result<(), ArchiveError> {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XHeader);
        header.as_old_mut().name[..b"pax".len()].copy_from_slice(b"pax");
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(records.len() as u64);
        header.set_cksum();
        self.write(header.as_bytes())?;
        self.write(records)?;
        let padding = pad(records.len() as u64);
        self.write(ZEROS.get(..padding).unwrap_or_default())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ArchiveError> {
        self.out.write_all(bytes).map_err(ArchiveError::stream)
    }
}

/// Bytes from `len` to a whole number of blocks.
pub fn pad(len: u64) -> usize {
    (BLOCK - (len % BLOCK as u64) as usize) % BLOCK
}

/// What a ustar header cannot say.
fn records(member: &Member, stored: u64) -> Vec<u8> {
    let mut records = Vec::new();
    match &member.kind {
        Kind::File {
            size,
            extents: Some(_),
        } => {
            pax::push(&mut records, b"GNU.sparse.major", b"1");
            pax::push(&mut records, b"GNU.sparse.minor", b"0");
            pax::push(&mut records, b"GNU.sparse.name", &member.name);
            let size = size.to_string();
            pax::push(&mut records, b"GNU.sparse.realsize", size.as_bytes());
        }
        _ if member.name.len() > NAME_FIELD => pax::push(&mut records, b"path", &member.name),
        _ => {}
    }
    if let Kind::Symlink(target) | Kind::HardLink(target) = &member.kind
        && target.len() > NAME_FIELD
    {
        pax::push(&mut records, b"linkpath", target);
    }
    if stored > MAX_OCTAL {
        pax::push(&mut records, b"size", stored.to_string().as_bytes());
    }
    for (keyword, id) in [(b"uid", member.uid), (b"gid", member.gid)] {
        if id > MAX_ID {
            pax::push(&mut records, keyword, id.to_string().as_bytes());
        }
    }
    if member.modified != whole_seconds(member.modified) {
        let text = pax::time_text(member.modified);
        pax::push(&mut records, b"mtime", text.as_bytes());
    }
    for (name, value) in &member.attributes {
        let keyword = [super::attributes::KEYWORD, name].concat();
        pax::push(&mut records, &keyword, value);
    }
    records
}

/// The nearest time that a ustar header can say.
fn whole_seconds(time: Time) -> Time {
    Time {
        seconds: time.seconds.clamp(0, MAX_OCTAL as i64),
        nanoseconds: 0,
    }
}

fn fill(header: &mut Header, member: &Member, stored: u64) -> Result<(), ArchiveError> {
    let (entry_type, target) = match &member.kind {
        Kind::File { .. } => (EntryType::Regular, None),
        Kind::Directory => (EntryType::Directory, None),
        Kind::Symlink(target) => (EntryType::Symlink, Some(target)),
        Kind::HardLink(target) => (EntryType::Link, Some(target)),
        Kind::Fifo => (EntryType::Fifo, None),
        Kind::Device { block: true, .. } => (EntryType::Block, None),
        Kind::Device { block: false, .. } => (EntryType::Char, None),
        Kind::Unknown(flag) => (EntryType::new(*flag), None),
    };
    header.set_entry_type(entry_type);
    let sparse = matches!(
        &member.kind,
        Kind::File {
            extents: Some(_),
            ..
        }
    );
    if sparse {
        // The name under which a program that knows no sparse files unpacks map and data.
        put(&mut header.as_old_mut().name, b"GNUSparseFile.0/file");
    } else {
        put(&mut header.as_old_mut().name, &member.name);
    }
    if let Some(target) = target {
        put(&mut header.as_old_mut().linkname, target);
    }
    header.set_mode(member.mode & 0o7777);
    header.set_uid(member.uid.into());
    header.set_gid(member.gid.into());
    header.set_size(stored);
    // Not negative after the clamping.
    header.set_mtime(whole_seconds(member.modified).seconds as u64);
    if let Kind::Device { major, minor, .. } = member.kind {
        header
            .set_device_major(major)
            .and_then(|()| header.set_device_minor(minor))
            .map_err(ArchiveError::stream)?;
    }
    Ok(())
}

/// As much of `text` as the field holds; a record says the rest.
fn put(field: &mut [u8; NAME_FIELD], text: &[u8]) {
    for (to, from) in field.iter_mut().zip(text) {
        *to = *from;
    }
}
