//! The x86 setup header of a bzImage: where the compressed kernel is in the file.
//!
//! Specification: Documentation/arch/x86/boot.rst ("The Linux/x86 Boot Protocol") of the kernel.

use std::ops::Range;

use thiserror::Error;

const SETUP_SECTS: usize = 0x1f1;
const SYSSIZE: usize = 0x1f4;
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;
const VERSION: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const XLOADFLAGS: usize = 0x236;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// First bytes of a file that hold all that [`SetupHeader::parse`] reads but the version string.
pub const HEADER_LEN: usize = PAYLOAD_LENGTH + 4;
const SECTOR: usize = 512;
const BOOT_FLAG_MAGIC: u16 = 0xaa55;
const HEADER_MAGIC: [u8; 4] = *b"HdrS";
/// `payload_offset` and `payload_length` came with boot protocol 2.08.
const MIN_PROTOCOL: u16 = 0x0208;
/// `xloadflags` came with boot protocol 2.12.
const XLOADFLAGS_PROTOCOL: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1 << 0;
const MAX_VERSION_LEN: usize = 256;

/// Why a file is no bzImage that can be unpacked.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BzImageError {
    /// The boot flag or the `HdrS` magic is missing.
    #[error("it has no Linux boot header, so it is no bzImage")]
    NoHeader,
    /// The boot protocol does not say where the payload is.
    #[error(
        "its boot protocol {}.{:02} is older than 2.08, which says where the kernel is in the file",
        .0 >> 8, .0 & 0xff
    )]
    OldProtocol(u16),
    /// The kernel has no 64-bit entry.
    #[error("it is a 32-bit x86 kernel; a machine needs an x86_64 one")]
    Not64Bit,
    /// The header promises more bytes than there are.
    #[error("it is truncated: its header promises {expected} bytes and it has {actual}")]
    Truncated {
        /// Bytes that the header's sizes add up to.
        expected: u64,
        /// Bytes that are there.
        actual: u64,
    },
    /// The payload is said to lie outside of the protected-mode code.
    #[error("its header places the compressed kernel outside of the file's code")]
    PayloadOutside,
}

/// What the setup header of a bzImage says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetupHeader {
    /// Where the payload (the compressed vmlinux) is, in bytes from the start of the file.
    pub payload: Range<usize>,
    /// The release that `uname -r` will print, where the header names one.
    pub version: Option<String>,
}

impl SetupHeader {
    /// Whether a file that begins with `head` says that it is a bzImage.
    pub fn is_present(head: &[u8]) -> bool {
        u16_at(head, BOOT_FLAG) == Some(BOOT_FLAG_MAGIC)
            && head.get(HEADER..HEADER + 4) == Some(&HEADER_MAGIC)
    }

    /// Parses the header of a whole bzImage.
    ///
    /// # Errors
    /// A [`BzImageError`] that says why `image` cannot be unpacked; a payload range that is
    /// returned lies inside of `image`.
    pub fn parse(image: &[u8]) -> Result<Self, BzImageError> {
        if !Self::is_present(image) {
            return Err(BzImageError::NoHeader);
        }
        let protocol = u16_at(image, VERSION).ok_or(BzImageError::NoHeader)?;
        if protocol < MIN_PROTOCOL {
            return Err(BzImageError::OldProtocol(protocol));
        }
        let truncated = |expected: u64| BzImageError::Truncated {
            expected,
            actual: image.len() as u64,
        };
        let flags = u16_at(image, XLOADFLAGS).ok_or(truncated(HEADER_LEN as u64))?;
        if protocol >= XLOADFLAGS_PROTOCOL && flags & XLF_KERNEL_64 == 0 {
            return Err(BzImageError::Not64Bit);
        }
        let sectors = match image.get(SETUP_SECTS) {
            Some(0) | None => 4,
            Some(&n) => usize::from(n),
        };
        let code = (sectors + 1) * SECTOR;
        let field = |at| u32_at(image, at).ok_or(truncated(HEADER_LEN as u64));
        let code_len = u64::from(field(SYSSIZE)?) * 16;
        let end = code as u64 + code_len;
        if end > image.len() as u64 {
            return Err(truncated(end));
        }
        let start = code as u64 + u64::from(field(PAYLOAD_OFFSET)?);
        let stop = start + u64::from(field(PAYLOAD_LENGTH)?);
        if stop > end || start == stop {
            return Err(BzImageError::PayloadOutside);
        }
        Ok(Self {
            // Both are below the length of a slice.
            payload: start as usize..stop as usize,
            version: version(image, code),
        })
    }
}

/// The first word of the version string, which lies in the setup code.
fn version(image: &[u8], setup_len: usize) -> Option<String> {
    let offset = u16_at(image, KERNEL_VERSION)?;
    if offset == 0 {
        return None;
    }
    let start = usize::from(offset) + SECTOR;
    let end = setup_len.min(start.checked_add(MAX_VERSION_LEN)?);
    let text = image.get(start..end)?;
    let release = text.split(|&b| b == 0 || b == b' ').next()?;
    crate::version::release(release)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..)?.first_chunk::<2>()?;
    Some(u16::from_le_bytes(*field))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*field))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A bzImage around `payload`, with the smallest setup code there is.
    pub(crate) fn wrap(payload: &[u8], release: &str) -> Vec<u8> {
        let mut image = vec![0; 2 * SECTOR];
        image[SETUP_SECTS] = 1;
        image[BOOT_FLAG..][..2].copy_from_slice(&BOOT_FLAG_MAGIC.to_le_bytes());
        image[HEADER..][..4].copy_from_slice(&HEADER_MAGIC);
        image[VERSION..][..2].copy_from_slice(&0x020fu16.to_le_bytes());
        image[XLOADFLAGS..][..2].copy_from_slice(&XLF_KERNEL_64.to_le_bytes());
        let text = 0x300;
        image[KERNEL_VERSION..][..2].copy_from_slice(&((text - SECTOR) as u16).to_le_bytes());
        let banner = format!("{release} (someone@somewhere) #1 SMP\0");
        image[text..][..banner.len()].copy_from_slice(banner.as_bytes());
        // Protected-mode code in front of the payload, as in a real image.
        image.extend_from_slice(&[0x90; 64]);
        image.extend_from_slice(payload);
        image[PAYLOAD_OFFSET..][..4].copy_from_slice(&64u32.to_le_bytes());
        image[PAYLOAD_LENGTH..][..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.resize(image.len().next_multiple_of(16), 0);
        let paragraphs = (image.len() - 2 * SECTOR) / 16;
        image[SYSSIZE..][..4].copy_from_slice(&(paragraphs as u32).to_le_bytes());
        image
    }

    #[test]
    fn a_header_names_the_payload_and_the_release() {
        let image = wrap(b"payload!", "6.1.0-56-cloud-amd64");
        let header = SetupHeader::parse(&image).unwrap();
        assert_eq!(&image[header.payload], b"payload!");
        assert_eq!(header.version.as_deref(), Some("6.1.0-56-cloud-amd64"));
    }

    #[test]
    fn every_truncation_is_refused() {
        let image = wrap(b"payload of a kernel", "6.1.0");
        for len in 0..image.len() {
            assert!(
                SetupHeader::parse(&image[..len]).is_err(),
                "{len} of {} bytes were taken for a whole image",
                image.len()
            );
        }
    }

    #[test]
    fn a_payload_outside_of_the_code_is_refused() {
        let mut image = wrap(b"payload", "6.1.0");
        image[PAYLOAD_OFFSET..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(
            SetupHeader::parse(&image),
            Err(BzImageError::PayloadOutside)
        );
        let mut image = wrap(b"payload", "6.1.0");
        image[PAYLOAD_LENGTH..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(
            SetupHeader::parse(&image),
            Err(BzImageError::PayloadOutside)
        );
        let mut image = wrap(b"payload", "6.1.0");
        image[PAYLOAD_LENGTH..][..4].fill(0);
        assert_eq!(
            SetupHeader::parse(&image),
            Err(BzImageError::PayloadOutside)
        );
    }

    #[test]
    fn a_32_bit_kernel_and_an_old_protocol_are_named() {
        let mut image = wrap(b"payload", "6.1.0");
        image[XLOADFLAGS] = 0;
        assert_eq!(SetupHeader::parse(&image), Err(BzImageError::Not64Bit));
        image[VERSION..][..2].copy_from_slice(&0x0207u16.to_le_bytes());
        let error = SetupHeader::parse(&image).unwrap_err();
        assert_eq!(error, BzImageError::OldProtocol(0x0207));
        assert!(error.to_string().contains("2.07"), "{error}");
    }

    #[test]
    fn a_version_offset_outside_of_the_setup_code_names_nothing() {
        let mut image = wrap(b"payload", "6.1.0");
        image[KERNEL_VERSION..][..2].copy_from_slice(&u16::MAX.to_le_bytes());
        assert_eq!(SetupHeader::parse(&image).unwrap().version, None);
    }
}
