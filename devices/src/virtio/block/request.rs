//! What the guest asked for: a descriptor chain decoded into a [`Request`] (Virtio 1.2, section
//! 5.2.6).
//!
//! Knows the wire format and the limits of the disk; does no I/O. After [`decode`], what is left
//! in the chain's buffers is the request's data.

use thiserror::Error;
use virtio_bindings::virtio_blk::*;

use crate::virtio::queue::ChainBuffers;

/// Bytes of a sector, the unit of every address and length in the protocol.
pub const SECTOR: u64 = 512;

/// The most sectors of one discard or write-zeroes request (2 GiB).
pub const MAX_RANGE_SECTORS: u32 = 1 << 22;

const HEADER_LEN: usize = 16;
const RANGE_LEN: usize = 16;

/// What a request is checked against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sectors of the disk.
    pub sectors: u64,
    /// Whether all that changes the disk is refused.
    pub read_only: bool,
}

/// A request whose range lies on the disk. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill the writable buffers from `offset` on.
    Read {
        /// From the start of the disk.
        offset: u64,
    },
    /// Store the readable buffers from `offset` on.
    Write {
        /// From the start of the disk.
        offset: u64,
    },
    /// Make all completed writes durable.
    Flush,
    /// The content of a range is no longer needed.
    Discard {
        /// From the start of the disk.
        offset: u64,
        /// Length, not zero.
        len: u64,
    },
    /// A range shall read as zeroes.
    WriteZeroes {
        /// From the start of the disk.
        offset: u64,
        /// Length, not zero.
        len: u64,
        /// Whether its storage may be given back.
        unmap: bool,
    },
    /// Write the serial number into the writable buffers.
    GetId,
    /// A range of no sectors: succeeds without any work.
    Nothing,
}

/// Why a chain is no request that could be carried out.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RequestError {
    /// There is no byte to put the status into.
    #[error("the request has no writable byte for its status")]
    NoStatus,
    /// The readable part is shorter than what the request type needs.
    #[error("the request is cut short")]
    TooShort,
    /// The data is no whole number of sectors, or not one range.
    #[error("the request's data has a length that its type does not allow")]
    BadLength,
    /// The range reaches past the end of the disk, or is longer than was announced.
    #[error("the request reaches past the end of the disk")]
    OutOfRange,
    /// The disk is read-only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The type or a flag is not one that was offered.
    #[error("the request's type or flags are not supported")]
    Unsupported,
}

impl RequestError {
    /// What goes into the status byte.
    pub fn status(&self) -> u8 {
        match self {
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
            _ => VIRTIO_BLK_S_IOERR as u8,
        }
    }
}

/// Takes the status byte and the header off `buffers` and says what they ask for.
///
/// After any error but [`RequestError::NoStatus`] the status byte can be written.
pub fn decode(buffers: &mut ChainBuffers, limits: &Limits) -> Result<Request, RequestError> {
    if !buffers.reserve_last() {
        return Err(RequestError::NoStatus);
    }
    let mut header = [0; HEADER_LEN];
    if !buffers.readable().read_front(&mut header) {
        return Err(RequestError::TooShort);
    }
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => {
            let offset = data_offset(sector, buffers.writable().len(), limits)?;
            Ok(Request::Read { offset })
        }
        VIRTIO_BLK_T_OUT => {
            refuse_read_only(limits)?;
            let offset = data_offset(sector, buffers.readable().len(), limits)?;
            Ok(Request::Write { offset })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Request::GetId),
        VIRTIO_BLK_T_DISCARD => Range::take(buffers, limits)?.into_discard(),
        VIRTIO_BLK_T_WRITE_ZEROES => Range::take(buffers, limits)?.into_write_zeroes(),
        _ => Err(RequestError::Unsupported),
    }
}

fn refuse_read_only(limits: &Limits) -> Result<(), RequestError> {
    if limits.read_only {
        return Err(RequestError::ReadOnly);
    }
    Ok(())
}

fn data_offset(sector: u64, len: usize, limits: &Limits) -> Result<u64, RequestError> {
    let len = len as u64;
    if !len.is_multiple_of(SECTOR) {
        return Err(RequestError::BadLength);
    }
    byte_offset(sector, len / SECTOR, limits)
}

/// The offset in bytes of a range that lies on the disk.
fn byte_offset(sector: u64, count: u64, limits: &Limits) -> Result<u64, RequestError> {
    sector
        .checked_add(count)
        .filter(|&end| end <= limits.sectors)
        .and_then(|_| sector.checked_mul(SECTOR))
        .ok_or(RequestError::OutOfRange)
}

/// `struct virtio_blk_discard_write_zeroes`, checked.
struct Range {
    offset: u64,
    len: u64,
    flags: u32,
}

impl Range {
    /// The one range that a request may hold (`max_discard_seg` and `max_write_zeroes_seg` are 1).
    fn take(buffers: &mut ChainBuffers, limits: &Limits) -> Result<Self, RequestError> {
        refuse_read_only(limits)?;
        let mut range = [0; RANGE_LEN];
        if buffers.readable().len() != RANGE_LEN || !buffers.readable().read_front(&mut range) {
            return Err(RequestError::BadLength);
        }
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = range;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([n0, n1, n2, n3]);
        if count > MAX_RANGE_SECTORS {
            return Err(RequestError::OutOfRange);
        }
        Ok(Self {
            offset: byte_offset(sector, count.into(), limits)?,
            len: u64::from(count) * SECTOR,
            flags: u32::from_le_bytes(flags),
        })
    }

    fn into_discard(self) -> Result<Request, RequestError> {
        let Self { offset, len, flags } = self;
        // No flag is allowed here, UNMAP neither (section 5.2.6.2).
        match (flags, len) {
            (0, 0) => Ok(Request::Nothing),
            (0, _) => Ok(Request::Discard { offset, len }),
            _ => Err(RequestError::Unsupported),
        }
    }

    fn into_write_zeroes(self) -> Result<Request, RequestError> {
        let Self { offset, len, flags } = self;
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
            return Err(RequestError::Unsupported);
        }
        if len == 0 {
            return Ok(Request::Nothing);
        }
        let unmap = flags != 0;
        Ok(Request::WriteZeroes { offset, len, unmap })
    }
}
