//! From the TAP into the guest's receive queue (Virtio 1.2, section 5.1.6.4).
//!
//! Buffers are taken from the ring ahead of time and kept, checked, in a pool. While the longest
//! frame fits the pool, a frame costs one `readv` straight into it. Where the guest is short of
//! buffers, a frame is read into a buffer of the host's and copied when it fits, so none is cut.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::tap::HEADER_LEN;
use super::{MAX_FRAME, NetCounters};
use crate::counter;
use crate::virtio::queue::{ChainBuffers, MAX_SEGMENTS};
use crate::virtio::ring::Ring;

/// Frames that are received before the worker looks at its other events.
const BATCH: usize = 64;
/// Where num_buffers stands in the header.
const NUM_BUFFERS: usize = 10;

/// Why receiving paused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pause {
    /// The host has no frame: wait for the TAP.
    NoFrame,
    /// The guest has no buffer: wait for its doorbell.
    NoBuffer,
    /// There may be more of both.
    Batch,
    /// The TAP is gone or detached.
    Detached,
}

/// One checked chain of the guest's, taken from the ring and not used yet.
#[derive(Debug)]
struct Chain {
    head: u16,
    len: usize,
    buffers: ChainBuffers,
}

/// Owns a receive queue.
#[derive(Debug)]
pub(super) struct Receiver {
    ring: Ring,
    memory: GuestMemoryMmap,
    mergeable: bool,
    counters: Arc<NetCounters>,
    /// Chains in the order in which they will be filled.
    pool: VecDeque<Chain>,
    /// The sum of their lengths.
    pooled: usize,
    /// Allocations of chains that were used.
    spare: Vec<ChainBuffers>,
    /// A frame that waits for buffers, and its length; 0 is none.
    parked: Vec<u8>,
    parked_len: usize,
    iovecs: Vec<libc::iovec>,
    used: Vec<(u16, u32)>,
}

// SAFETY: the iovecs are scratch space of one call: rebuilt before each `readv`, and never
// followed otherwise.
unsafe impl Send for Receiver {}

impl Receiver {
    pub(super) fn new(
        ring: Ring,
        memory: GuestMemoryMmap,
        mergeable: bool,
        counters: Arc<NetCounters>,
    ) -> Self {
        Self {
            ring,
            memory,
            mergeable,
            counters,
            pool: VecDeque::new(),
            pooled: 0,
            spare: Vec::new(),
            parked: vec![0; MAX_FRAME],
            parked_len: 0,
            iovecs: Vec::new(),
            used: Vec::new(),
        }
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Moves frames from `tap` to the guest until one side has no more.
    pub(super) fn receive(&mut self, tap: &File) -> Pause {
        let pause = self.receive_batch(tap);
        self.ring.signal(&self.memory);
        pause
    }

    fn receive_batch(&mut self, tap: &File) -> Pause {
        for _ in 0..BATCH {
            self.fill_pool();
            if self.parked_len > 0 {
                if !self.place_parked() {
                    return Pause::NoBuffer;
                }
                continue;
            }
            if self.pool.is_empty() {
                return Pause::NoBuffer;
            }
            let outcome = match self.gather() {
                true => self.read_to_guest(tap),
                false => self.read_to_host(tap),
            };
            match outcome {
                Ok(()) => {}
                Err(error) if super::would_block(&error) => return Pause::NoFrame,
                Err(error) => {
                    tracing::debug!("a network queue is detached from its interface: {error}");
                    return Pause::Detached;
                }
            }
        }
        Pause::Batch
    }

    /// Takes chains from the ring until the longest frame fits, or there are no more.
    fn fill_pool(&mut self) {
        for _ in 0..self.ring.size() {
            let enough = match self.mergeable {
                true => self.pooled >= MAX_FRAME,
                false => !self.pool.is_empty(),
            };
            if enough {
                return;
            }
            let Some(chain) = self.ring.pop(&self.memory) else {
                return;
            };
            let head = chain.head_index();
            let mut buffers = self
                .spare
                .pop()
                .unwrap_or_else(|| ChainBuffers::new(self.memory.clone()));
            let loaded = buffers.load(chain).is_ok();
            let len = buffers.writable().len();
            if loaded && len >= HEADER_LEN {
                self.pooled += len;
                self.pool.push_back(Chain { head, len, buffers });
            } else {
                // No room for a header: it goes back as it came.
                self.spare.push(buffers);
                self.ring.add_used(&self.memory, head, 0);
            }
        }
        // The guest offers more than its ring holds while it is looked at: other events first.
        self.ring.rekick();
    }

    /// Collects the pieces of the pool in `iovecs`; false where the longest frame does not fit them.
    fn gather(&mut self) -> bool {
        self.iovecs.clear();
        let mut covered = 0;
        for chain in &mut self.pool {
            let pieces = chain.buffers.writable().as_slice();
            if self.iovecs.len() + pieces.len() > MAX_SEGMENTS {
                return false;
            }
            self.iovecs.extend_from_slice(pieces);
            covered += chain.len;
            if covered >= MAX_FRAME {
                return true;
            }
        }
        false
    }

    /// Reads one frame into the pieces that [`Self::gather`] collected.
    fn read_to_guest(&mut self, tap: &File) -> io::Result<()> {
        // At most MAX_SEGMENTS, which is 1024.
        let count = self.iovecs.len() as libc::c_int;
        // SAFETY: `gather` just made each iovec from a checked piece of guest memory that `pool`
        // keeps mapped; nothing holds a reference into guest memory.
        let read = unsafe { libc::readv(tap.as_raw_fd(), self.iovecs.as_ptr(), count) };
        let len = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
        if !is_frame(len)? {
            return Ok(());
        }
        let count = self.chains_for(len);
        if let Some(first) = self.pool.front_mut() {
            let header = first.buffers.writable();
            // Both fit: a chain in the pool has room for the header.
            let _ = header.skip_front(NUM_BUFFERS) && header.write_front(&count.to_le_bytes());
        }
        self.publish(len, count);
        Ok(())
    }

    /// Reads one frame into the host's buffer and on into the guest's where it fits.
    fn read_to_host(&mut self, tap: &File) -> io::Result<()> {
        let mut tap = tap;
        let len = tap.read(&mut self.parked)?;
        if is_frame(len)? {
            self.parked_len = len;
            self.place_parked();
        }
        Ok(())
    }

    /// Gives the parked frame to the guest, or drops it where it can never fit; false where it
    /// has to wait for buffers.
    fn place_parked(&mut self) -> bool {
        let len = self.parked_len;
        let all_offered = !self.mergeable || self.pool.len() >= usize::from(self.ring.size());
        if len > self.pooled {
            if self.pool.is_empty() || !all_offered {
                return false;
            }
            counter::add(&self.counters.rx_dropped, 1);
            self.parked_len = 0;
            return true;
        }
        let count = self.chains_for(len);
        if let Some(num_buffers) = self.parked.get_mut(NUM_BUFFERS..HEADER_LEN) {
            num_buffers.copy_from_slice(&count.to_le_bytes());
        }
        let mut rest = self.parked.get(..len).unwrap_or(&[]);
        for chain in self.pool.iter_mut().take(count.into()) {
            let (part, after) = rest.split_at(rest.len().min(chain.len));
            // Fits: the part is no longer than the chain.
            let _ = chain.buffers.writable().write_front(part);
            rest = after;
        }
        self.parked_len = 0;
        self.publish(len, count);
        true
    }

    /// How many chains of the pool `len` bytes take.
    fn chains_for(&self, len: usize) -> u16 {
        let mut left = len;
        let mut count = 0;
        for chain in &self.pool {
            count += 1;
            left = left.saturating_sub(chain.len);
            if left == 0 {
                break;
            }
        }
        count
    }

    /// Gives the first `count` chains, which hold a frame of `len` bytes, back to the driver.
    fn publish(&mut self, len: usize, count: u16) {
        self.used.clear();
        let mut left = len;
        for chain in self.pool.drain(..usize::from(count).min(self.pool.len())) {
            let part = left.min(chain.len);
            left -= part;
            self.pooled -= chain.len;
            // A part is no longer than MAX_FRAME.
            self.used.push((chain.head, part as u32));
            self.spare.push(chain.buffers);
        }
        self.ring.add_used_together(&self.memory, &self.used);
        let bytes = len.saturating_sub(HEADER_LEN) as u64;
        counter::add(&self.counters.rx_frames, 1);
        counter::add(&self.counters.rx_bytes, bytes);
    }
}

/// Whether `len` bytes hold a header at least; an error at the end of file, which a TAP has not.
fn is_frame(len: usize) -> io::Result<bool> {
    match len {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        len => Ok(len >= HEADER_LEN),
    }
}
