//! The page of memory that holds what a driver reads of a transport: its registers.
//!
//! Virtio 1.2, section 4.2.2: offsets 0x000 to 0x0ff. `vmm` shows the guest this page where the
//! transport is, to be read without an exit. The registers stand at its end, so that the
//! configuration space (offset 0x100), which a device may change at any time, begins the next page,
//! and is no memory.
//!
//! Architecture invariant: what is in here is in no second place, and a read that comes as an
//! exit is answered from here too. The page belongs to no [`vm_memory::GuestMemoryMmap`]: whatever
//! address a guest gives a device, the device writes nothing here.

use std::fmt;
use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;

/// Bytes of the page.
pub const PAGE_SIZE: u64 = 4096;

/// Where in its first page a transport begins.
pub const PAGE_OFFSET: u64 = PAGE_SIZE - VIRTIO_MMIO_CONFIG as u64;

const WORD: usize = size_of::<u32>();
const WORDS: usize = VIRTIO_MMIO_CONFIG as usize / WORD;

/// The registers of one transport, as its driver reads them; those that can only be written are
/// zero. A page of its own, so that nothing else is shown with it.
///
/// The guest may read it at any moment, hence atomics, and hence nothing may be in here that the
/// guest is not to know yet.
#[repr(C, align(4096))]
pub struct RegisterPage {
    _before: [u8; PAGE_OFFSET as usize],
    words: [AtomicU32; WORDS],
}

const _: () = assert!(
    size_of::<RegisterPage>() as u64 == PAGE_SIZE
        && offset_of!(RegisterPage, words) as u64 == PAGE_OFFSET
);

impl Default for RegisterPage {
    fn default() -> Self {
        Self {
            _before: [0; PAGE_OFFSET as usize],
            words: [const { AtomicU32::new(0) }; WORDS],
        }
    }
}

impl fmt::Debug for RegisterPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegisterPage").finish_non_exhaustive()
    }
}

impl RegisterPage {
    /// The register at offset `register`, a constant of the specification.
    fn word(&self, register: u32) -> &AtomicU32 {
        &self.words[register as usize / WORD]
    }

    /// What `register` shows.
    pub(crate) fn get(&self, register: u32) -> u32 {
        self.word(register).load(Ordering::Acquire)
    }

    /// Has `register` show `value`; what was changed before shows before it.
    pub(crate) fn set(&self, register: u32, value: u32) {
        self.word(register).store(value, Ordering::Release);
    }

    /// Sets `bits` of `register`, whoever else changes others.
    pub(crate) fn set_bits(&self, register: u32, bits: u32) {
        self.word(register).fetch_or(bits, Ordering::AcqRel);
    }

    /// Clears `bits` of `register`, whoever else changes others.
    pub(crate) fn clear_bits(&self, register: u32, bits: u32) {
        self.word(register).fetch_and(!bits, Ordering::AcqRel);
    }

    /// Adds one to `register`.
    pub(crate) fn increment(&self, register: u32) {
        self.word(register).fetch_add(1, Ordering::AcqRel);
    }

    /// Reads as the guest does that has the page as memory: any bytes of the registers, and each
    /// register at once. What lies beyond them is left as it is.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(mut at) = usize::try_from(offset) else {
            return;
        };
        let mut rest = data;
        while let (Some(word), false) = (self.words.get(at / WORD), rest.is_empty()) {
            let bytes = word.load(Ordering::Acquire).to_le_bytes();
            let bytes = &bytes[at % WORD..];
            let (now, later) = rest.split_at_mut(bytes.len().min(rest.len()));
            now.copy_from_slice(&bytes[..now.len()]);
            at += now.len();
            rest = later;
        }
    }
}
