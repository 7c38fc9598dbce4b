//! Counters that one thread adds to and any thread reads.
//!
//! The thread that owns a queue owns its counters, so adding takes no locked instruction. Each
//! counter is exact; several together are no snapshot of one moment.

use std::sync::atomic::{AtomicU64, Ordering};

/// Adds to a counter of which the caller is the only writer.
pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    let sum = counter.load(Ordering::Relaxed).wrapping_add(amount);
    counter.store(sum, Ordering::Relaxed);
}

/// What a counter says now.
pub(crate) fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
