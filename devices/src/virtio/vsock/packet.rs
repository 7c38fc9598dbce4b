//! What travels in the rings: the packet header, and the descriptor chains that carry packets.
//!
//! Virtio 1.2, sections 5.10.6 and 2.7.4 (message framing). The `virtio-vsock` crate's packet
//! type wants header and data in one or two descriptors and each in one memory region; Linux
//! sends zero-copy data in up to 18 descriptors and the specification leaves the layout free, so
//! chains are read here as what they are: lists of pieces of guest memory.

use std::marker::PhantomData;
use std::ops::{Deref, Range};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// Bytes of a packet header (`struct virtio_vsock_hdr`).
pub const HEADER_SIZE: usize = 44;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only socket type there is here.
pub const VIRTIO_VSOCK_TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_OP_REQUEST`: opens a connection.
pub const VIRTIO_VSOCK_OP_REQUEST: u16 = 1;
/// `VIRTIO_VSOCK_OP_RESPONSE`: accepts a connection.
pub const VIRTIO_VSOCK_OP_RESPONSE: u16 = 2;
/// `VIRTIO_VSOCK_OP_RST`: refuses or ends a connection.
pub const VIRTIO_VSOCK_OP_RST: u16 = 3;
/// `VIRTIO_VSOCK_OP_SHUTDOWN`: the sender will not send, or not receive, any more.
pub const VIRTIO_VSOCK_OP_SHUTDOWN: u16 = 4;
/// `VIRTIO_VSOCK_OP_RW`: data.
pub const VIRTIO_VSOCK_OP_RW: u16 = 5;
/// `VIRTIO_VSOCK_OP_CREDIT_UPDATE`: the header's credit fields are news.
pub const VIRTIO_VSOCK_OP_CREDIT_UPDATE: u16 = 6;
/// `VIRTIO_VSOCK_OP_CREDIT_REQUEST`: asks for a credit update.
pub const VIRTIO_VSOCK_OP_CREDIT_REQUEST: u16 = 7;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet will receive no more.
pub const VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the packet will send no more.
pub const VIRTIO_VSOCK_SHUTDOWN_F_SEND: u32 = 2;
/// Both directions: the sender is closing.
pub const VIRTIO_VSOCK_SHUTDOWN_BOTH: u32 =
    VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE | VIRTIO_VSOCK_SHUTDOWN_F_SEND;

/// The most descriptors of one chain, in an indirect table too: a driver must not make a chain
/// longer than the queue (Virtio 1.2, section 2.7.5.3.1), and no queue here is larger than this.
pub const MAX_CHAIN: usize = 256;

/// A packet header, in the host's byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender's context id.
    pub src_cid: u64,
    /// Receiver's context id.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of data that follow the header.
    pub len: u32,
    /// Socket type.
    pub socket_type: u16,
    /// `VIRTIO_VSOCK_OP_*`.
    pub op: u16,
    /// Meaning depends on `op`.
    pub flags: u32,
    /// Bytes that the sender can buffer for this connection.
    pub buf_alloc: u32,
    /// Bytes of this connection that the sender has taken out of its buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// The header as it stands in guest memory.
    pub fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// Reads a header as it stands in guest memory.
    pub fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(part(bytes, 0)),
            dst_cid: u64::from_le_bytes(part(bytes, 8)),
            src_port: u32::from_le_bytes(part(bytes, 16)),
            dst_port: u32::from_le_bytes(part(bytes, 20)),
            len: u32::from_le_bytes(part(bytes, 24)),
            socket_type: u16::from_le_bytes(part(bytes, 28)),
            op: u16::from_le_bytes(part(bytes, 30)),
            flags: u32::from_le_bytes(part(bytes, 32)),
            buf_alloc: u32::from_le_bytes(part(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(part(bytes, 40)),
        }
    }
}

fn part<const N: usize>(bytes: &[u8; HEADER_SIZE], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

/// Pieces of guest memory in the form that `sendmsg` and `recvmsg` take.
///
/// The lifetime is that of the borrow of guest memory: while it lasts, no region is unmapped.
#[derive(Debug, Default)]
pub(super) struct GuestIoVec<'m> {
    pieces: Vec<libc::iovec>,
    memory: PhantomData<VolatileSlice<'m>>,
}

impl<'m> GuestIoVec<'m> {
    pub fn push(&mut self, piece: VolatileSlice<'m>) {
        self.pieces.push(libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        });
    }

    /// Bytes in all pieces.
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.iov_len).sum()
    }

    pub fn clear(&mut self) {
        self.pieces.clear();
    }

    pub fn truncate(&mut self, pieces: usize) {
        self.pieces.truncate(pieces);
    }

    pub fn as_raw(&self) -> &[libc::iovec] {
        &self.pieces
    }

    /// Shortens the whole to at most `bytes`.
    pub fn limit(&mut self, mut bytes: usize) {
        let mut keep = 0;
        for piece in &mut self.pieces {
            if bytes == 0 {
                break;
            }
            piece.iov_len = piece.iov_len.min(bytes);
            bytes -= piece.iov_len;
            keep += 1;
        }
        self.pieces.truncate(keep);
    }
}

/// The next chain that the driver made available, or None.
///
/// An error means that the available ring cannot be right (its index ran away).
pub(super) fn pop<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemoryMmap,
) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, virtio_queue::Error> {
    Ok(queue.iter(memory)?.next())
}

/// Puts back the last `chains` chains that were popped.
pub(super) fn unpop(queue: &mut Queue, chains: usize) {
    for _ in 0..chains {
        queue.set_next_avail(queue.next_avail().wrapping_sub(1));
    }
}

/// Calls `each` with every piece of memory of `chain`; false where the chain is not one of
/// wholly `writable` (or wholly readable) descriptors in guest memory, of at most [`MAX_CHAIN`].
fn pieces<'m, M>(
    chain: DescriptorChain<M>,
    memory: &'m GuestMemoryMmap,
    writable: bool,
    mut each: impl FnMut(VolatileSlice<'m>),
) -> bool
where
    M: Deref<Target = GuestMemoryMmap>,
{
    let access = if writable {
        Permissions::Write
    } else {
        Permissions::Read
    };
    for (count, descriptor) in chain.enumerate() {
        if count == MAX_CHAIN || descriptor.is_write_only() != writable {
            return false;
        }
        let Ok(slices) = memory.get_slices(descriptor.addr(), descriptor.len() as usize, access)
        else {
            return false;
        };
        for slice in slices {
            match slice {
                Ok(slice) => each(slice),
                Err(_) => return false,
            }
        }
    }
    true
}

/// Splits `piece` where a header of which `have` bytes are there already ends.
fn carve<'m>(
    piece: VolatileSlice<'m>,
    have: usize,
) -> (Option<VolatileSlice<'m>>, Option<VolatileSlice<'m>>) {
    let missing = HEADER_SIZE - have;
    if missing == 0 {
        return (None, Some(piece));
    }
    match piece.split_at(missing.min(piece.len())) {
        Ok((header, data)) => (Some(header), (!data.is_empty()).then_some(data)),
        Err(_) => (None, None),
    }
}

/// A packet from the guest: its header, copied once, and where its data lies.
#[derive(Debug, Default)]
pub(super) struct TxPacket<'m> {
    pub header: Header,
    pub data: Vec<VolatileSlice<'m>>,
}

impl<'m> TxPacket<'m> {
    /// Reads the packet in `chain`, reusing this one's room; false where there is none.
    pub fn read(
        &mut self,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
        memory: &'m GuestMemoryMmap,
    ) -> bool {
        self.data.clear();
        let mut bytes = [0; HEADER_SIZE];
        let mut have = 0;
        let data = &mut self.data;
        let well_formed = pieces(chain, memory, false, |piece| {
            let (header, rest) = carve(piece, have);
            if let Some(header) = header {
                have += header.copy_to(&mut bytes[have..]);
            }
            data.extend(rest);
        });
        if !well_formed || have < HEADER_SIZE {
            return false;
        }
        self.header = Header::from_bytes(&bytes);
        self.limit(self.header.len as usize)
    }

    /// Cuts the data to `len` bytes; false where there is less.
    fn limit(&mut self, mut len: usize) -> bool {
        let mut keep = 0;
        for piece in &mut self.data {
            if len == 0 {
                break;
            }
            let take = piece.len().min(len);
            match piece.subslice(0, take) {
                Ok(cut) => *piece = cut,
                Err(_) => return false,
            }
            len -= take;
            keep += 1;
        }
        self.data.truncate(keep);
        len == 0
    }
}

/// One buffer of a [`RxBatch`].
#[derive(Debug)]
struct RxBuffer {
    head: u16,
    header: Range<usize>,
    capacity: usize,
}

/// Receive buffers that one `recvmsg` fills: the guest's buffers are small (4 KiB under Linux),
/// a host stream's reads are not.
#[derive(Debug, Default)]
pub(super) struct RxBatch<'m> {
    buffers: Vec<RxBuffer>,
    headers: Vec<VolatileSlice<'m>>,
    data: GuestIoVec<'m>,
    capacity: usize,
}

/// What became of an attempt to add a buffer to a [`RxBatch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Added {
    /// There is one more.
    Yes,
    /// The driver has made none available.
    Empty,
    /// It cannot hold a packet; it went back to the driver unused.
    Malformed,
}

impl<'m> RxBatch<'m> {
    pub fn clear(&mut self) {
        self.buffers.clear();
        self.headers.clear();
        self.data.clear();
        self.capacity = 0;
    }

    /// Buffers in the batch.
    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    /// Bytes of data that the batch can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Pieces of memory that the data is spread over.
    pub fn pieces(&self) -> usize {
        self.data.as_raw().len()
    }

    /// The data part of all buffers, to be filled in order; at most `limit` bytes of it.
    pub fn data(&mut self, limit: usize) -> &GuestIoVec<'m> {
        self.data.limit(limit);
        &self.data
    }

    /// Takes one more buffer from the driver.
    pub fn add(
        &mut self,
        queue: &mut Queue,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Added, virtio_queue::Error> {
        let Some(chain) = pop(queue, memory)? else {
            return Ok(Added::Empty);
        };
        let head = chain.head_index();
        let (header_start, data_start) = (self.headers.len(), self.pieces());
        let (mut have, mut capacity) = (0, 0usize);
        let (headers, data) = (&mut self.headers, &mut self.data);
        let well_formed = pieces(chain, memory, true, |piece| {
            let (header, rest) = carve(piece, have);
            if let Some(header) = header {
                have += header.len();
                headers.push(header);
            }
            if let Some(rest) = rest {
                capacity = capacity.saturating_add(rest.len());
                data.push(rest);
            }
        });
        if !well_formed || have < HEADER_SIZE {
            self.headers.truncate(header_start);
            self.data.truncate(data_start);
            queue.add_used(memory, head, 0)?;
            return Ok(Added::Malformed);
        }
        self.capacity = self.capacity.saturating_add(capacity);
        self.buffers.push(RxBuffer {
            head,
            header: header_start..self.headers.len(),
            capacity,
        });
        Ok(Added::Yes)
    }

    /// Gives the first buffers back to the driver as packets that hold `bytes` of data together,
    /// each with `header` and its own length, and puts the others back. At least one buffer is
    /// used, so a packet without data is sent with `bytes` 0. Returns the packets sent.
    pub fn commit(
        &mut self,
        queue: &mut Queue,
        memory: &'m GuestMemoryMmap,
        mut header: Header,
        mut bytes: usize,
    ) -> Result<usize, virtio_queue::Error> {
        let mut used = 0;
        for buffer in &self.buffers {
            if used > 0 && bytes == 0 {
                break;
            }
            let len = buffer.capacity.min(bytes);
            bytes -= len;
            header.len = u32::try_from(len).unwrap_or(u32::MAX);
            let packed = header.to_bytes();
            let mut written = 0;
            for piece in self.headers.get(buffer.header.clone()).unwrap_or(&[]) {
                piece.copy_from(&packed[written..]);
                written += piece.len();
            }
            let total = (HEADER_SIZE as u32).saturating_add(header.len);
            queue.add_used(memory, buffer.head, total)?;
            used += 1;
        }
        unpop(queue, self.buffers.len() - used);
        Ok(used)
    }

    /// Puts all buffers back.
    pub fn cancel(&mut self, queue: &mut Queue) {
        unpop(queue, self.buffers.len());
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::desc::split::Descriptor;
    use virtio_vsock::packet::VsockPacket;
    use vm_memory::{Bytes, GuestAddress};

    const HEADER: Header = Header {
        src_cid: 0x0102_0304_0506_0708,
        dst_cid: 0x1112_1314_1516_1718,
        src_port: 0x2122_2324,
        dst_port: 0x3132_3334,
        len: 4,
        socket_type: 0x4142,
        op: 0x5152,
        flags: 0x6162_6364,
        buf_alloc: 0x7172_7374,
        fwd_cnt: 0x8182_8384,
    };

    #[test]
    fn a_header_reads_as_another_implementation_reads_it() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut queue = Queue::new(16).unwrap();
        queue.set_desc_table_address(Some(0x1000), None);
        queue.set_avail_ring_address(Some(0x2000), None);
        queue.set_used_ring_address(Some(0x3000), None);
        queue.set_ready(true);
        let descriptor = Descriptor::new(0x4000, HEADER_SIZE as u32 + 4, 0, 0);
        memory.write_obj(descriptor, GuestAddress(0x1000)).unwrap();
        memory
            .write_obj(1u16.to_le(), GuestAddress(0x2002))
            .unwrap();
        memory
            .write_slice(&HEADER.to_bytes(), GuestAddress(0x4000))
            .unwrap();
        let mut chain = pop(&mut queue, &memory).unwrap().expect("a chain");
        let packet = VsockPacket::from_tx_virtq_chain(&memory, &mut chain, 1000).unwrap();
        let read = Header {
            src_cid: packet.src_cid(),
            dst_cid: packet.dst_cid(),
            src_port: packet.src_port(),
            dst_port: packet.dst_port(),
            len: packet.len(),
            socket_type: packet.type_(),
            op: packet.op(),
            flags: packet.flags(),
            buf_alloc: packet.buf_alloc(),
            fwd_cnt: packet.fwd_cnt(),
        };
        assert_eq!(read, HEADER);
        assert_eq!(Header::from_bytes(&HEADER.to_bytes()), HEADER);
    }
}
