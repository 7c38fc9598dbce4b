//! From a descriptor chain to host memory: buffers that a device may hand to the kernel.
//!
//! The guest wrote every address and length in a chain. [`ChainBuffers::load`] walks it once,
//! checks each buffer against guest memory, and keeps the result as iovecs. What a device does
//! afterwards needs no further look at the descriptors, which the guest may have changed since.
//! Virtio 1.2, section 2.7.

use std::ops::Deref;

use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// The most buffers that one chain may have here: what one `readv` or `writev` takes (IOV_MAX).
pub const MAX_SEGMENTS: usize = 1024;

/// What is wrong with a descriptor chain.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    /// The chain loops, jumps outside of its table, nests indirect tables, or is longer than 4 GiB.
    #[error("the descriptor chain is cut off: a loop, a bad index or a bad indirect table")]
    Broken,
    /// A buffer reaches outside of guest memory.
    #[error("the buffer {addr:#x}+{len:#x} is not guest memory")]
    NotMemory {
        /// Guest physical address of the buffer.
        addr: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A device-readable buffer follows a device-writable one (forbidden by section 2.7.4.2).
    #[error("a device-readable buffer follows a device-writable one")]
    BadOrder,
    /// The chain has more than [`MAX_SEGMENTS`] buffers.
    #[error("the descriptor chain has more than {MAX_SEGMENTS} buffers")]
    TooMany,
}

/// The buffers of one chain, checked: first those that the device reads, then those it writes.
///
/// Keeps its allocations from one chain to the next, so a device that holds one of these per
/// request in flight allocates nothing once it is warm.
#[derive(Debug)]
pub struct ChainBuffers {
    /// Keeps what the iovecs point to mapped.
    memory: GuestMemoryMmap,
    readable: Iovecs,
    writable: Iovecs,
    last: Option<LastByte>,
}

/// Where a byte of guest memory is mapped.
#[derive(Debug)]
struct LastByte(*mut u8);

// SAFETY: as for `Iovecs`: a pointer to shared guest memory.
unsafe impl Send for LastByte {}

impl ChainBuffers {
    /// No buffers yet; chains that are loaded later lie in `memory`.
    pub fn new(memory: GuestMemoryMmap) -> Self {
        Self {
            memory,
            readable: Iovecs::default(),
            writable: Iovecs::default(),
            last: None,
        }
    }

    /// Replaces the buffers by those of `chain`. After an error there are none.
    ///
    /// Takes at most [`MAX_SEGMENTS`] steps, whatever the guest wrote. Buffers of length zero are
    /// dropped.
    pub fn load<M>(&mut self, chain: DescriptorChain<M>) -> Result<(), ChainError>
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        self.clear();
        let loaded = self.walk(chain);
        if loaded.is_err() {
            self.clear();
        }
        loaded
    }

    fn walk<M>(&mut self, chain: DescriptorChain<M>) -> Result<(), ChainError>
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let mut complete = false;
        for (steps, descriptor) in chain.enumerate() {
            if steps == MAX_SEGMENTS {
                return Err(ChainError::TooMany);
            }
            // The iterator ends early on whatever it cannot follow; only a last descriptor
            // without NEXT tells that the chain was seen whole.
            complete = !descriptor.has_next();
            let (addr, len) = (descriptor.addr(), descriptor.len());
            if descriptor.is_write_only() {
                push(&self.memory, &mut self.writable, addr, len)?;
            } else if self.writable.is_empty() {
                push(&self.memory, &mut self.readable, addr, len)?;
            } else {
                return Err(ChainError::BadOrder);
            }
        }
        complete.then_some(()).ok_or(ChainError::Broken)
    }

    /// Forgets all buffers and keeps the allocations.
    pub fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.last = None;
    }

    /// Takes the last writable byte off, for [`Self::write_last`]; false where there is none. Where
    /// a device reports the outcome at the end of a chain, it does this before anything else.
    #[must_use]
    pub fn reserve_last(&mut self) -> bool {
        self.last = self.writable.take_last();
        self.last.is_some()
    }

    /// Writes the byte that [`Self::reserve_last`] took; false, and nothing happens, where it took
    /// none.
    pub fn write_last(&mut self, value: u8) -> bool {
        let Some(LastByte(byte)) = self.last.take() else {
            return false;
        };
        // SAFETY: the pointer came out of a checked iovec of at least one byte of `self.memory`,
        // which stays mapped as long as `self` lives.
        unsafe { byte.write_volatile(value) }
        true
    }

    /// What the driver wrote for the device to read, as far as it was not consumed.
    pub fn readable(&mut self) -> &mut Iovecs {
        &mut self.readable
    }

    /// What the device may write, as far as it was not consumed.
    pub fn writable(&mut self) -> &mut Iovecs {
        &mut self.writable
    }
}

fn push(
    memory: &GuestMemoryMmap,
    iovecs: &mut Iovecs,
    addr: GuestAddress,
    len: u32,
) -> Result<(), ChainError> {
    let not_memory = |_| ChainError::NotMemory { addr: addr.0, len };
    // The permission matters to an IOMMU only, and there is none.
    let slices = memory
        .get_slices(addr, len as usize, Permissions::ReadWrite)
        .map_err(not_memory)?;
    for slice in slices {
        let slice = slice.map_err(not_memory)?;
        if iovecs.list.len() == MAX_SEGMENTS {
            return Err(ChainError::TooMany);
        }
        iovecs.list.push(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        });
        iovecs.len += slice.len();
    }
    Ok(())
}

/// Pieces of guest memory in the order of the chain. Made by [`ChainBuffers`] only, which keeps
/// the memory mapped.
#[derive(Debug, Default)]
pub struct Iovecs {
    list: Vec<libc::iovec>,
    /// Entries of `list` before this one were consumed from the front.
    first: usize,
    /// Bytes in what remains. Fits: a chain is shorter than 4 GiB.
    len: usize,
}

// SAFETY: the pointers are to shared guest memory, which every thread may access; only the raw
// pointer type keeps this from being automatic. `ChainBuffers` owns the mapping and moves along.
unsafe impl Send for Iovecs {}

impl Iovecs {
    /// Bytes that remain.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing remains.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What remains, for `preadv`, `writev` and the like. None is empty; at most [`MAX_SEGMENTS`].
    ///
    /// The pointers are good as long as the [`ChainBuffers`] lives and is not loaded anew: who
    /// gives them to the kernel has to keep it so until the operation has ended.
    pub fn as_slice(&self) -> &[libc::iovec] {
        self.list.get(self.first..).unwrap_or(&[])
    }

    /// Takes `buf.len()` bytes off the front into `buf`; false, and nothing is taken, where fewer
    /// remain.
    #[must_use]
    pub fn read_front(&mut self, buf: &mut [u8]) -> bool {
        self.take_front(buf.len(), |slice, at| {
            slice.copy_to(&mut buf[at..]);
        })
    }

    /// Puts `buf` at the front and takes those bytes off; false, and nothing is written, where
    /// fewer remain.
    #[must_use]
    pub fn write_front(&mut self, buf: &[u8]) -> bool {
        self.take_front(buf.len(), |slice, at| slice.copy_from(&buf[at..]))
    }

    /// Takes `count` bytes off the front without a look at them; false, and nothing is taken,
    /// where fewer remain.
    #[must_use]
    pub fn skip_front(&mut self, count: usize) -> bool {
        self.take_front(count, |_, _| {})
    }

    /// Takes the last byte off the end; None where nothing remains.
    fn take_last(&mut self) -> Option<LastByte> {
        let last = self.list.get_mut(self.first..)?.last_mut()?;
        last.iov_len -= 1;
        let byte = last.iov_base.cast::<u8>().wrapping_add(last.iov_len);
        if last.iov_len == 0 {
            self.list.pop();
        }
        self.len -= 1;
        Some(LastByte(byte))
    }

    /// Calls `each` on the pieces of the first `count` bytes, each with its place in them.
    fn take_front(&mut self, count: usize, mut each: impl FnMut(VolatileSlice<'_>, usize)) -> bool {
        if count > self.len {
            return false;
        }
        let mut done = 0;
        while done < count {
            let Some(piece) = self.list.get_mut(self.first) else {
                return false;
            };
            let part = piece.iov_len.min(count - done);
            // SAFETY: `piece` was made by `push` from a slice of guest memory and only ever
            // shrunk since, so `part` bytes at its base are mapped; `ChainBuffers` holds the
            // mapping, and the slice does not outlive this call.
            each(
                unsafe { VolatileSlice::new(piece.iov_base.cast(), part) },
                done,
            );
            piece.iov_base = piece.iov_base.wrapping_byte_add(part);
            piece.iov_len -= part;
            if piece.iov_len == 0 {
                self.first += 1;
            }
            done += part;
            self.len -= part;
        }
        true
    }

    fn clear(&mut self) {
        self.list.clear();
        self.first = 0;
        self.len = 0;
    }
}
