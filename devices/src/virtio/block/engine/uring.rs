//! The io_uring engine: one ring per queue, its descriptor polled by the queue's worker.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::super::disk::Disk;
use super::{Completion, Engine, MAX_IN_FLIGHT, Operation, ZEROES};

/// A ring and the image that it works on.
///
/// The image is not registered with the ring: a ring goes away in the background after its
/// descriptor was closed, and a registered file would stay open, and locked, until then.
pub struct Uring {
    ring: IoUring,
    in_flight: u32,
    disk: Arc<Disk>,
}

impl fmt::Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uring")
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

impl Uring {
    /// Makes a ring; fails where the kernel has no io_uring, forbids it, or lacks an operation.
    pub fn new(disk: Arc<Disk>) -> io::Result<Self> {
        let ring = IoUring::builder()
            .dontfork()
            .build(u32::from(MAX_IN_FLIGHT))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Write::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        // SUBMIT_STABLE: the kernel has its own copy of the iovec array after submission.
        if !needed.iter().all(|&code| probe.is_supported(code))
            || !ring.params().is_feature_submit_stable()
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            ring,
            in_flight: 0,
            disk,
        })
    }

    fn retry_interrupted(enter: impl Fn() -> io::Result<usize>) -> io::Result<()> {
        loop {
            match enter() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(drop),
            }
        }
    }
}

fn entry(image: types::Fd, operation: Operation, iovecs: &[libc::iovec]) -> squeue::Entry {
    // At most MAX_SEGMENTS entries.
    let count = iovecs.len() as u32;
    match operation {
        Operation::Read { offset } => opcode::Readv::new(image, iovecs.as_ptr(), count)
            .offset(offset)
            .build(),
        Operation::Write { offset, durable } => opcode::Writev::new(image, iovecs.as_ptr(), count)
            .offset(offset)
            .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
            .build(),
        Operation::WriteZeroes { offset, len } => {
            let len = len.min(ZEROES.len() as u64) as u32;
            opcode::Write::new(image, ZEROES.as_ptr(), len)
                .offset(offset)
                .build()
        }
        Operation::Flush => opcode::Fsync::new(image)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Operation::Allocate { mode, offset, len } => opcode::Fallocate::new(image, len)
            .offset(offset)
            .mode(mode)
            .build(),
    }
}

impl Engine for Uring {
    fn completion_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    unsafe fn push(
        &mut self,
        token: u16,
        operation: Operation,
        iovecs: &[libc::iovec],
    ) -> io::Result<()> {
        let entry =
            entry(types::Fd(self.disk.as_raw_fd()), operation, iovecs).user_data(token.into());
        // SAFETY: the entry is well formed (built above); the iovecs and what they point to stay
        // valid until completion, which our caller promised; ZEROES is static.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
        self.in_flight += 1;
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        Self::retry_interrupted(|| self.ring.submit())
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        for entry in self.ring.completion() {
            self.in_flight = self.in_flight.saturating_sub(1);
            completions.push(Completion {
                // What `push` put there.
                token: entry.user_data() as u16,
                result: u32::try_from(entry.result())
                    .map_err(|_| io::Error::from_raw_os_error(entry.result().wrapping_neg())),
            });
        }
    }

    fn drain(&mut self) -> io::Result<()> {
        while self.in_flight > 0 {
            Self::retry_interrupted(|| self.ring.submit_and_wait(1))?;
            let ended = self.ring.completion().count() as u32;
            self.in_flight = self.in_flight.saturating_sub(ended);
        }
        Ok(())
    }
}
