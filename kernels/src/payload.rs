//! Unpacks the compressed kernel of a bzImage into the ELF file that it was made from.
//!
//! The kernel's build appends the uncompressed size to the payload as 4 little-endian bytes (a
//! gzip member ends with that size by itself), so it is known beforehand how much must come out.

use std::io::{self, BufRead, Read, Write};

use thiserror::Error;

use crate::bzimage::{BzImageError, SetupHeader};

/// The largest uncompressed kernel that is accepted, in bytes. A distribution's is 30 to 80 MiB.
pub const MAX_VMLINUX: u64 = 1 << 30;

/// Memory for a decoder's dictionary, in bytes: `xz -9 --lzma2=dict=128MiB` is what x86 uses.
const DICTIONARY_LIMIT: u64 = 512 << 20;

/// A block of LZ4's legacy frame, in bytes once unpacked.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;
const LZ4_LEGACY_MAGIC: [u8; 4] = 0x184c_2102u32.to_le_bytes();
const LZOP_MAGIC: [u8; 9] = [0x89, b'L', b'Z', b'O', 0, b'\r', b'\n', 0x1a, b'\n'];
/// lzop never writes larger blocks, in bytes once unpacked.
const LZOP_MAX_BLOCK: u32 = 64 << 20;

/// Why a kernel's payload did not come out.
#[derive(Debug, Error)]
pub enum PayloadError {
    /// The file around it is no usable bzImage.
    #[error(transparent)]
    BzImage(#[from] BzImageError),
    /// The payload begins like nothing that the kernel's build writes.
    #[error("its payload is compressed in a way that is not known (it begins with {0:02x?})")]
    UnknownCompression([u8; 4]),
    /// More would come out than is accepted.
    #[error("its payload is larger than {limit} bytes once unpacked")]
    TooLarge {
        /// The most that was to come out, in bytes.
        limit: u64,
    },
    /// Another size came out than was written at the payload's end.
    #[error("its payload is damaged: {actual} bytes came out in place of {expected}")]
    WrongSize {
        /// The size that the payload's end names, in bytes.
        expected: u64,
        /// What came out, in bytes.
        actual: u64,
    },
    /// The decoder stopped.
    #[error("its {compression} payload is damaged")]
    Damaged {
        /// How the payload is compressed.
        compression: Compression,
        /// What the decoder said.
        source: io::Error,
    },
    /// What came out is no ELF file.
    #[error("its payload does not hold an ELF kernel")]
    NotElf,
    /// The result could not be written.
    #[error("the unpacked kernel could not be written")]
    Write(#[source] io::Error),
}

/// The ways in which the kernel's build compresses (`CONFIG_KERNEL_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// `CONFIG_KERNEL_GZIP`
    Gzip,
    /// `CONFIG_KERNEL_XZ`, usually with the x86 branch filter.
    Xz,
    /// `CONFIG_KERNEL_ZSTD`
    Zstd,
    /// `CONFIG_KERNEL_LZ4`: the legacy frame.
    Lz4,
    /// `CONFIG_KERNEL_BZIP2`
    Bzip2,
    /// `CONFIG_KERNEL_LZMA`: the "alone" format.
    Lzma,
    /// `CONFIG_KERNEL_LZO`: an lzop file.
    Lzo,
}

impl std::fmt::Display for Compression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "uncompressed",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "lzma",
            Self::Lzo => "lzo",
        })
    }
}

impl Compression {
    /// How a payload that begins with `head` is compressed.
    pub fn detect(head: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Compression); 8] = [
            (b"\x7fELF", Compression::None),
            (b"\x1f\x8b", Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
            (&LZ4_LEGACY_MAGIC, Compression::Lz4),
            (b"BZh", Compression::Bzip2),
            (b"\x5d\0\0", Compression::Lzma),
            (&LZOP_MAGIC, Compression::Lzo),
        ];
        MAGICS
            .iter()
            .find(|(magic, _)| head.starts_with(magic))
            .map(|&(_, compression)| compression)
    }
}

/// Unpacks the kernel of a bzImage into memory: the ELF file, at most `limit` bytes.
///
/// # Errors
/// A [`PayloadError`] that says why nothing, or not all, came out.
pub fn unpack(image: &[u8], limit: u64) -> Result<Vec<u8>, PayloadError> {
    let mut vmlinux = Vec::new();
    unpack_into(image, &mut vmlinux, limit)?;
    Ok(vmlinux)
}

/// Unpacks the kernel of a bzImage into `out`, at most `limit` bytes, and returns how many.
///
/// # Errors
/// A [`PayloadError`]; what `out` then holds is not a kernel.
pub fn unpack_into(image: &[u8], out: &mut dyn Write, limit: u64) -> Result<u64, PayloadError> {
    let header = SetupHeader::parse(image)?;
    let payload = image
        .get(header.payload)
        .ok_or(BzImageError::PayloadOutside)?;
    let mut head = [0; 4];
    for (to, from) in head.iter_mut().zip(payload) {
        *to = *from;
    }
    let compression = Compression::detect(payload).ok_or(PayloadError::UnknownCompression(head))?;
    if compression == Compression::None {
        let mut sink = Sink::new(out, limit);
        sink.take(payload)?;
        return sink.finish();
    }
    let (data, size) = payload
        .split_last_chunk::<4>()
        .ok_or(PayloadError::UnknownCompression(head))?;
    let expected = u64::from(u32::from_le_bytes(*size));
    if expected > limit {
        return Err(PayloadError::TooLarge { limit });
    }
    // A gzip member ends with the size; elsewhere it is no part of the compressed data.
    let data = match compression {
        Compression::Gzip => payload,
        _ => data,
    };
    let mut sink = Sink::new(out, expected);
    let result = decode(compression, data, &mut sink);
    match result {
        // More than the named size came out.
        Err(PayloadError::TooLarge { .. }) => Err(PayloadError::WrongSize {
            expected,
            actual: expected.saturating_add(1),
        }),
        Err(error) => Err(error),
        Ok(()) if sink.written != expected => Err(PayloadError::WrongSize {
            expected,
            actual: sink.written,
        }),
        Ok(()) => sink.finish(),
    }
}

fn decode(compression: Compression, data: &[u8], sink: &mut Sink<'_>) -> Result<(), PayloadError> {
    let damaged = |source| PayloadError::Damaged {
        compression,
        source,
    };
    let mut reader: Box<dyn Read + '_> = match compression {
        Compression::None => Box::new(data),
        Compression::Gzip => Box::new(flate2::bufread::GzDecoder::new(data)),
        Compression::Bzip2 => Box::new(bzip2::bufread::BzDecoder::new(data)),
        Compression::Zstd => Box::new(
            zstd::stream::read::Decoder::with_buffer(data)
                .map_err(damaged)?
                .single_frame(),
        ),
        Compression::Xz => Box::new(xz(data, false).map_err(damaged)?),
        Compression::Lzma => Box::new(xz(data, true).map_err(damaged)?),
        Compression::Lz4 => return lz4_legacy(data, sink),
        Compression::Lzo => return lzop(data, sink),
    };
    let mut buffer = vec![0; 256 << 10];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => sink.take(buffer.get(..n).unwrap_or_default())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(damaged(error)),
        }
    }
}

/// A decoder for one xz stream, or for the older lzma format, with bounded memory.
fn xz<R: BufRead>(data: R, lzma: bool) -> io::Result<liblzma::bufread::XzDecoder<R>> {
    let stream = if lzma {
        liblzma::stream::Stream::new_lzma_decoder(DICTIONARY_LIMIT)
    } else {
        liblzma::stream::Stream::new_stream_decoder(DICTIONARY_LIMIT, 0)
    };
    Ok(liblzma::bufread::XzDecoder::new_stream(data, stream?))
}

/// LZ4's legacy frame: the magic, then blocks of at most 8 MiB, each behind its compressed size.
fn lz4_legacy(data: &[u8], sink: &mut Sink<'_>) -> Result<(), PayloadError> {
    let damaged = |what: String| PayloadError::Damaged {
        compression: Compression::Lz4,
        source: io::Error::new(io::ErrorKind::InvalidData, what),
    };
    let mut rest = data;
    // Not more than may come out: one byte more shows that there is more.
    let room = usize::try_from(sink.limit.saturating_add(1)).unwrap_or(LZ4_LEGACY_BLOCK);
    let mut block = vec![0; room.min(LZ4_LEGACY_BLOCK)];
    while let Some((size, after)) = rest.split_first_chunk::<4>() {
        rest = after;
        // Frames may follow each other.
        if *size == LZ4_LEGACY_MAGIC {
            continue;
        }
        let size = u32::from_le_bytes(*size) as usize;
        let (compressed, after) = rest
            .split_at_checked(size)
            .ok_or_else(|| damaged(format!("a block of {size} bytes is cut off")))?;
        let len = lz4_flex::block::decompress_into(compressed, &mut block)
            .map_err(|error| damaged(error.to_string()))?;
        sink.take(block.get(..len).unwrap_or_default())?;
        rest = after;
    }
    if rest.is_empty() {
        Ok(())
    } else {
        Err(damaged("bytes are left over".to_owned()))
    }
}

/// An lzop file: a header, then blocks behind their two sizes and the checksums that flags name.
fn lzop(data: &[u8], sink: &mut Sink<'_>) -> Result<(), PayloadError> {
    let damaged = |what: &str| PayloadError::Damaged {
        compression: Compression::Lzo,
        source: io::Error::new(io::ErrorKind::InvalidData, what.to_owned()),
    };
    let mut rest = data;
    let flags = lzop_header(&mut rest).ok_or_else(|| damaged("its lzop header is cut off"))?;
    let checksums = |adler: u32, crc: u32| {
        4 * (usize::from(flags & adler != 0) + usize::from(flags & crc != 0))
    };
    let mut block = Vec::new();
    loop {
        let cut = || damaged("a block is cut off");
        let unpacked = be32(&mut rest).ok_or_else(cut)?;
        if unpacked == 0 {
            return Ok(());
        }
        let packed = be32(&mut rest).ok_or_else(cut)?;
        if unpacked > LZOP_MAX_BLOCK || packed > unpacked {
            return Err(damaged("a block has an impossible size"));
        }
        skip(&mut rest, checksums(0x1, 0x100)).ok_or_else(cut)?;
        if packed < unpacked {
            skip(&mut rest, checksums(0x2, 0x200)).ok_or_else(cut)?;
        }
        let (input, after) = rest.split_at_checked(packed as usize).ok_or_else(cut)?;
        rest = after;
        if packed == unpacked {
            sink.take(input)?;
            continue;
        }
        block.resize(unpacked as usize, 0);
        let len = lzo::decompress_into(input, &mut block)
            .map_err(|_| damaged("a block does not decode"))?;
        if len != block.len() {
            return Err(damaged("a block is shorter than it says"));
        }
        sink.take(&block)?;
    }
}

/// Skips an lzop header and returns its flags.
fn lzop_header(rest: &mut &[u8]) -> Option<u32> {
    const HAS_FILTER: u32 = 0x800;
    skip(rest, LZOP_MAGIC.len())?;
    let version = take::<2>(rest).map(u16::from_be_bytes)?;
    // The library's version, then the version needed to extract, then the method.
    skip(rest, 2)?;
    if version >= 0x940 {
        skip(rest, 2)?;
    }
    skip(rest, 1)?;
    if version >= 0x940 {
        // The level.
        skip(rest, 1)?;
    }
    let flags = be32(rest)?;
    if flags & HAS_FILTER != 0 {
        skip(rest, 4)?;
    }
    // The mode and the time, whose upper half came later.
    skip(rest, if version >= 0x940 { 12 } else { 8 })?;
    let [name_len] = take::<1>(rest)?;
    // The name and the header's checksum.
    skip(rest, usize::from(name_len) + 4)?;
    Some(flags)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

fn be32(rest: &mut &[u8]) -> Option<u32> {
    take::<4>(rest).map(u32::from_be_bytes)
}

fn skip(rest: &mut &[u8], len: usize) -> Option<()> {
    *rest = rest.get(len..)?;
    Some(())
}

/// Counts and bounds what comes out, and refuses what does not begin like an ELF file.
struct Sink<'a> {
    out: &'a mut dyn Write,
    written: u64,
    limit: u64,
    head: Vec<u8>,
}

const ELF_MAGIC: &[u8] = b"\x7fELF";

impl<'a> Sink<'a> {
    fn new(out: &'a mut dyn Write, limit: u64) -> Self {
        Self {
            out,
            written: 0,
            limit,
            head: Vec::new(),
        }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), PayloadError> {
        let written = self.written.saturating_add(bytes.len() as u64);
        if written > self.limit {
            return Err(PayloadError::TooLarge { limit: self.limit });
        }
        let wanted = ELF_MAGIC.len().saturating_sub(self.head.len());
        self.head.extend(bytes.iter().take(wanted));
        if !ELF_MAGIC.starts_with(&self.head) {
            return Err(PayloadError::NotElf);
        }
        self.out.write_all(bytes).map_err(PayloadError::Write)?;
        self.written = written;
        Ok(())
    }

    fn finish(self) -> Result<u64, PayloadError> {
        if self.head != ELF_MAGIC {
            return Err(PayloadError::NotElf);
        }
        self.out.flush().map_err(PayloadError::Write)?;
        Ok(self.written)
    }
}

#[cfg(test)]
#[path = "payload_tests.rs"]
mod tests;
