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

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    use vm_memory::Bytes;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const SIZE: u16 = 2048;
    const TABLE: u64 = 0x1_0000;
    const AVAIL: u64 = 0x2_0000;
    const USED: u64 = 0x3_0000;
    /// Two regions that touch: a buffer may lie in both.
    const BORDER: u64 = 0x10_0000;

    fn memory() -> GuestMemoryMmap {
        let regions = [GuestAddress(0), GuestAddress(BORDER)];
        GuestMemoryMmap::from_ranges(&regions.map(|start| (start, BORDER as usize))).unwrap()
    }

    /// Loads the chain of `pieces`: address, length, flags without NEXT.
    fn load(
        memory: &GuestMemoryMmap,
        pieces: &[(u64, u32, u16)],
    ) -> Result<ChainBuffers, ChainError> {
        for (i, &(addr, len, flags)) in pieces.iter().enumerate() {
            let more = if i + 1 < pieces.len() { NEXT } else { 0 };
            let descriptor = Descriptor::new(addr, len, flags | more, i as u16 + 1);
            let at = GuestAddress(TABLE + i as u64 * 16);
            memory.write_obj(descriptor, at).unwrap();
        }
        memory.write_obj(1u16, GuestAddress(AVAIL + 2)).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(TABLE as u32), None);
        queue.set_avail_ring_address(Some(AVAIL as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        let chain = queue.iter(memory).unwrap().next().unwrap();
        let mut buffers = ChainBuffers::new(memory.clone());
        buffers.load(chain).map(|()| buffers)
    }

    #[test]
    fn bytes_come_off_the_front_across_pieces_and_regions() {
        let memory = memory();
        let text: Vec<u8> = (0..100).collect();
        memory
            .write_slice(&text, GuestAddress(BORDER - 50))
            .unwrap();
        let pieces = [(BORDER - 50, 60, 0), (0, 0, 0), (BORDER + 10, 40, 0)];
        let mut buffers = load(&memory, &pieces).unwrap();
        let readable = buffers.readable();
        assert_eq!((readable.len(), readable.as_slice().len()), (100, 3));
        let mut start = [0; 45];
        assert!(readable.read_front(&mut start));
        assert_eq!(start, text[..45]);
        assert!(readable.skip_front(10));
        assert_eq!((readable.len(), readable.as_slice().len()), (45, 2));
        let mut too_much = [0; 46];
        assert!(!readable.read_front(&mut too_much));
        assert_eq!(readable.len(), 45, "a failed read takes nothing");
        let mut rest = [0; 45];
        assert!(readable.read_front(&mut rest));
        assert_eq!(rest, text[55..]);
        assert!(readable.is_empty() && readable.as_slice().is_empty());
    }

    #[test]
    fn bytes_are_put_at_the_front_and_the_last_is_kept_for_the_end() {
        let memory = memory();
        let pieces = [(0x100, 3, WRITE), (0x200, 2, WRITE), (0x300, 1, WRITE)];
        let mut buffers = load(&memory, &pieces).unwrap();
        assert!(!buffers.write_last(9), "nothing was reserved");
        assert!(buffers.reserve_last());
        assert_eq!(buffers.writable().as_slice().len(), 2);
        assert!(buffers.writable().write_front(&[1, 2, 3, 4]));
        assert!(!buffers.writable().write_front(&[5, 6]));
        assert!(buffers.write_last(9));
        assert!(!buffers.write_last(8), "once only");
        let mut bytes = [0u8; 8];
        for (i, addr) in [0x100, 0x101, 0x102, 0x103, 0x200, 0x201, 0x300, 0x301]
            .into_iter()
            .enumerate()
        {
            bytes[i] = memory.read_obj(GuestAddress(addr)).unwrap();
        }
        assert_eq!(bytes, [1, 2, 3, 0, 4, 0, 9, 0]);
    }

    #[test]
    fn the_last_byte_may_be_part_of_a_piece_that_was_begun() {
        let memory = memory();
        let mut buffers = load(&memory, &[(0x100, 2, WRITE)]).unwrap();
        assert!(buffers.writable().write_front(&[1]));
        assert!(buffers.reserve_last());
        assert!(buffers.writable().is_empty());
        assert!(!buffers.reserve_last(), "nothing is left");
    }

    #[test]
    fn chains_up_to_the_limit_are_taken_and_longer_ones_refused() {
        let memory = memory();
        let mut pieces = vec![(0x100, 1, 0); MAX_SEGMENTS];
        let mut longest = load(&memory, &pieces).unwrap();
        assert_eq!(longest.readable().as_slice().len(), MAX_SEGMENTS);
        pieces.push((0x100, 1, 0));
        assert_eq!(load(&memory, &pieces).unwrap_err(), ChainError::TooMany);
        // A buffer over the border of two regions is two pieces.
        let pieces = vec![(BORDER - 1, 2, 0); MAX_SEGMENTS];
        assert_eq!(load(&memory, &pieces).unwrap_err(), ChainError::TooMany);
    }

    #[test]
    fn buffers_outside_of_memory_are_named() {
        let memory = memory();
        for (addr, len) in [(BORDER * 2, 1), (BORDER * 2 - 1, 2), (u64::MAX, 1)] {
            let error = load(&memory, &[(0, 16, 0), (addr, len, WRITE)]).unwrap_err();
            assert_eq!(error, ChainError::NotMemory { addr, len });
        }
    }

    #[test]
    fn a_readable_buffer_after_a_writable_one_is_refused() {
        let pieces = [(0, 16, WRITE), (0x100, 16, 0)];
        assert_eq!(load(&memory(), &pieces).unwrap_err(), ChainError::BadOrder);
    }
}
