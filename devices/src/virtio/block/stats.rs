//! Counters of one queue of a disk, shared by the queue's worker and whoever reports them.

use std::sync::atomic::AtomicU64;

use crate::counter::{add, get};

/// What one queue of a disk has done since the machine started.
#[derive(Debug, Default)]
// So that no two queues' counters share a cache line, nor a pair that is fetched together.
#[repr(align(128))]
pub struct BlockStats {
    requests: AtomicU64,
    errors: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
}

impl BlockStats {
    /// Requests that were answered, refused ones included.
    pub fn requests(&self) -> u64 {
        get(&self.requests)
    }

    /// Requests that were refused or failed.
    pub fn errors(&self) -> u64 {
        get(&self.errors)
    }

    /// Read requests that were begun.
    pub fn reads(&self) -> u64 {
        get(&self.reads)
    }

    /// Write requests that were begun.
    pub fn writes(&self) -> u64 {
        get(&self.writes)
    }

    /// Flush requests that were begun.
    pub fn flushes(&self) -> u64 {
        get(&self.flushes)
    }

    /// Bytes that the guest has read.
    pub fn bytes_read(&self) -> u64 {
        get(&self.bytes_read)
    }

    /// Bytes that the guest has written, without those of write-zeroes requests.
    pub fn bytes_written(&self) -> u64 {
        get(&self.bytes_written)
    }

    pub(super) fn begun_read(&self) {
        add(&self.reads, 1);
    }

    pub(super) fn begun_write(&self) {
        add(&self.writes, 1);
    }

    pub(super) fn begun_flush(&self) {
        add(&self.flushes, 1);
    }

    pub(super) fn read(&self, bytes: u64) {
        add(&self.bytes_read, bytes);
    }

    pub(super) fn wrote(&self, bytes: u64) {
        add(&self.bytes_written, bytes);
    }

    pub(super) fn finished(&self, failed: bool) {
        add(&self.requests, 1);
        add(&self.errors, failed.into());
    }
}
