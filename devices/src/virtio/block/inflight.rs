//! The requests of one queue that are under way: a table of fixed size, each entry with its
//! buffers and the step that it is at.
//!
//! Most requests are one [`Operation`]. Some take several: a short read or write goes on where it
//! stopped, and zeroes are written by whatever means the image's filesystem offers.

use std::io;
use std::ops::Deref;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryMmap};

use super::engine::{Completion, Engine, MAX_IN_FLIGHT, Operation};
use super::request::{self, Limits, Request};
use super::stats::BlockStats;
use crate::virtio::queue::ChainBuffers;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;

/// The serial number as GET_ID returns it: padded with NULs, none where it fills all bytes.
pub type Serial = [u8; VIRTIO_BLK_ID_BYTES as usize];

/// What every queue of a device knows of it.
#[derive(Clone, Debug)]
pub struct Shared {
    /// What requests are checked against.
    pub limits: Limits,
    /// What GET_ID returns.
    pub serial: Serial,
    /// Whether the driver flushes (VIRTIO_BLK_F_FLUSH). If not, each write is durable when it
    /// completes (section 5.2.6.2).
    pub write_back: bool,
}

/// A chain that goes back to the driver.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    /// The head of the chain.
    pub head: u16,
    /// Bytes written into its buffers.
    pub len: u32,
}

/// How a range is made to read as zeroes, the best way first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum ZeroMethod {
    /// Its storage is given back.
    Punch,
    /// It is marked as zero and stays allocated.
    ZeroRange,
    /// Zeroes are written.
    Write,
}

/// What a request is waiting for.
#[derive(Clone, Copy, Debug)]
enum Step {
    Read {
        offset: u64,
    },
    Write {
        offset: u64,
    },
    Flush,
    Discard {
        offset: u64,
        len: u64,
    },
    Zero {
        offset: u64,
        len: u64,
        method: ZeroMethod,
    },
}

struct Slot {
    buffers: ChainBuffers,
    head: u16,
    step: Step,
    /// Bytes of data written into the chain's buffers so far.
    written: u32,
}

/// The table, and the engine that works on it.
pub struct InFlight {
    engine: Box<dyn Engine>,
    slots: Vec<Slot>,
    free: Vec<u16>,
    shared: Shared,
    stats: Arc<BlockStats>,
    /// The best method that has not failed on this image yet.
    zero_method: ZeroMethod,
    /// As above, for requests that allow to give storage back.
    unmap_method: ZeroMethod,
    finished: Vec<Finished>,
    completions: Vec<Completion>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Err(error) = self.engine.drain() {
            tracing::error!("disk I/O cannot be awaited, its buffers stay mapped: {error}");
            // The kernel may still write there.
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

impl InFlight {
    /// An empty table for `size` requests in `memory`.
    pub fn new(
        engine: Box<dyn Engine>,
        memory: &GuestMemoryMmap,
        size: u16,
        shared: Shared,
        stats: Arc<BlockStats>,
    ) -> Self {
        let size = size.min(MAX_IN_FLIGHT);
        let slot = |_| Slot {
            buffers: ChainBuffers::new(memory.clone()),
            head: 0,
            step: Step::Flush,
            written: 0,
        };
        Self {
            engine,
            slots: (0..size).map(slot).collect(),
            free: (0..size).rev().collect(),
            shared,
            stats,
            zero_method: ZeroMethod::ZeroRange,
            unmap_method: ZeroMethod::Punch,
            finished: Vec::with_capacity(size.into()),
            completions: Vec::with_capacity(size.into()),
        }
    }

    /// Readable while [`Self::reap`] has something to do.
    pub fn completion_fd(&self) -> RawFd {
        self.engine.completion_fd()
    }

    /// Whether another request can be begun.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// What was finished since the last call with an emptied list.
    pub fn finished(&mut self) -> &mut Vec<Finished> {
        &mut self.finished
    }

    /// Begins the request in `chain`, or finishes it at once. Needs [`Self::has_room`].
    pub fn begin<M>(&mut self, chain: DescriptorChain<M>)
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let Some(token) = self.free.pop() else {
            return;
        };
        let Some(slot) = self.slots.get_mut(usize::from(token)) else {
            return;
        };
        slot.head = chain.head_index();
        slot.written = 0;
        let decoded = match slot.buffers.load(chain) {
            Ok(()) => request::decode(&mut slot.buffers, &self.shared.limits),
            Err(error) => {
                tracing::debug!("block request refused: {error}");
                self.finish(token, IOERR);
                return;
            }
        };
        let step = match decoded {
            Ok(Request::GetId) => {
                slot.written = write_serial(&mut slot.buffers, &self.shared.serial);
                self.finish(token, OK);
                return;
            }
            Ok(Request::Nothing) => {
                self.finish(token, OK);
                return;
            }
            Ok(Request::Flush) => {
                self.stats.begun_flush();
                Step::Flush
            }
            Ok(Request::Read { offset }) => {
                self.stats.begun_read();
                Step::Read { offset }
            }
            Ok(Request::Write { offset }) => {
                self.stats.begun_write();
                Step::Write { offset }
            }
            Ok(Request::Discard { offset, len }) => Step::Discard { offset, len },
            Ok(Request::WriteZeroes { offset, len, unmap }) => Step::Zero {
                offset,
                len,
                method: if unmap {
                    self.unmap_method
                } else {
                    self.zero_method
                },
            },
            Err(error) => {
                tracing::debug!("block request refused: {error}");
                self.finish(token, error.status());
                return;
            }
        };
        slot.step = step;
        self.start(token);
    }

    /// Hands what was begun to the kernel.
    pub fn submit(&mut self) -> io::Result<()> {
        self.engine.submit()
    }

    /// Takes in what has ended; steps that follow are pushed, not submitted. Does not wait.
    pub fn reap(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        self.engine.reap(&mut completions);
        for completion in completions.drain(..) {
            self.advance(completion);
        }
        self.completions = completions;
    }

    /// Pushes the step that the request is at, or finishes it where nothing is left to move.
    fn start(&mut self, token: u16) {
        let durable = !self.shared.write_back;
        let Some(slot) = self.slots.get_mut(usize::from(token)) else {
            return;
        };
        let buffers = &mut slot.buffers;
        let (operation, iovecs) = match slot.step {
            Step::Read { offset } => (Operation::Read { offset }, buffers.writable().as_slice()),
            Step::Write { offset } => (
                Operation::Write { offset, durable },
                buffers.readable().as_slice(),
            ),
            Step::Flush => (Operation::Flush, &[][..]),
            Step::Discard { offset, len } => (punch(offset, len), &[][..]),
            Step::Zero {
                offset,
                len,
                method,
            } => {
                let operation = match method {
                    ZeroMethod::Punch => punch(offset, len),
                    ZeroMethod::ZeroRange => Operation::Allocate {
                        mode: libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
                        offset,
                        len,
                    },
                    ZeroMethod::Write => Operation::WriteZeroes { offset, len },
                };
                (operation, &[][..])
            }
        };
        if iovecs.is_empty() && matches!(slot.step, Step::Read { .. } | Step::Write { .. }) {
            self.finish(token, OK);
            return;
        }
        // SAFETY: the iovec array and the guest memory behind it belong to `slot.buffers`, which
        // nothing changes before this token's completion: the slot is not in the free list, and
        // only `advance` and `begin` load or consume buffers. At drop the engine is drained first,
        // and where that fails the slots are leaked.
        let pushed = unsafe { self.engine.push(token, operation, iovecs) };
        if let Err(error) = pushed {
            tracing::warn!("a disk operation could not be queued: {error}");
            self.finish(token, IOERR);
        }
    }

    /// Moves a request on by the outcome of its step.
    fn advance(&mut self, completion: Completion) {
        let Completion { token, result } = completion;
        let Some(slot) = self.slots.get_mut(usize::from(token)) else {
            return;
        };
        let moved = match result {
            Ok(moved) => moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                self.start(token);
                return;
            }
            Err(error) => {
                self.fail(token, &error);
                return;
            }
        };
        let bytes = u64::from(moved);
        match &mut slot.step {
            // Nothing moved: the image became shorter than it was, or its storage is full.
            Step::Read { .. } | Step::Write { .. } if moved == 0 => self.finish(token, IOERR),
            Step::Read { offset } => {
                let rest = slot.buffers.writable();
                let done = !rest.skip_front(moved as usize) || rest.is_empty();
                *offset = offset.saturating_add(bytes);
                slot.written = slot.written.saturating_add(moved);
                self.stats.read(bytes);
                self.finish_or_go_on(token, done);
            }
            Step::Write { offset } => {
                let rest = slot.buffers.readable();
                let done = !rest.skip_front(moved as usize) || rest.is_empty();
                *offset = offset.saturating_add(bytes);
                self.stats.wrote(bytes);
                self.finish_or_go_on(token, done);
            }
            Step::Flush | Step::Discard { .. } => self.finish(token, OK),
            Step::Zero {
                offset,
                len,
                method: ZeroMethod::Write,
            } if bytes < *len => {
                if moved == 0 {
                    self.finish(token, IOERR);
                    return;
                }
                *offset = offset.saturating_add(bytes);
                *len -= bytes;
                self.start(token);
            }
            Step::Zero { .. } if self.shared.write_back => self.finish(token, OK),
            Step::Zero { .. } => {
                slot.step = Step::Flush;
                self.start(token);
            }
        }
    }

    fn finish_or_go_on(&mut self, token: u16, done: bool) {
        if done {
            self.finish(token, OK);
        } else {
            self.start(token);
        }
    }

    /// An operation failed: another way to the same end, or the driver gets to know.
    fn fail(&mut self, token: u16, error: &io::Error) {
        let Some(slot) = self.slots.get_mut(usize::from(token)) else {
            return;
        };
        let unsupported = matches!(
            error.raw_os_error(),
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
        );
        match &mut slot.step {
            // A hint only.
            Step::Discard { .. } if unsupported => self.finish(token, OK),
            Step::Zero { method, .. } if unsupported && *method != ZeroMethod::Write => {
                let next = match method {
                    ZeroMethod::Punch => ZeroMethod::ZeroRange,
                    _ => ZeroMethod::Write,
                };
                *method = next;
                self.unmap_method = self.unmap_method.max(next);
                if next == ZeroMethod::Write {
                    self.zero_method = next;
                }
                self.start(token);
            }
            step => {
                tracing::warn!("the disk image failed at {step:?}: {error}");
                self.finish(token, IOERR);
            }
        }
    }

    /// Writes the status and gives the slot back.
    fn finish(&mut self, token: u16, status: u8) {
        let Some(slot) = self.slots.get_mut(usize::from(token)) else {
            return;
        };
        let len = if slot.buffers.write_last(status) {
            slot.written.saturating_add(1)
        } else {
            0
        };
        self.finished.push(Finished {
            head: slot.head,
            len,
        });
        slot.buffers.clear();
        self.free.push(token);
        self.stats.finished(status != OK);
    }
}

fn punch(offset: u64, len: u64) -> Operation {
    Operation::Allocate {
        mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        offset,
        len,
    }
}

/// Writes as much of `serial` as the driver made room for; gives the number of bytes.
fn write_serial(buffers: &mut ChainBuffers, serial: &Serial) -> u32 {
    let len = buffers.writable().len().min(serial.len());
    // At most 20 bytes, and there is room for them.
    if buffers.writable().write_front(&serial[..len]) {
        len as u32
    } else {
        0
    }
}

#[cfg(test)]
mod tests;
