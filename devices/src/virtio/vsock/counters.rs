//! What a vsock device has done so far, readable from any thread.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::counter;

/// Running totals of one device. They survive a device reset.
#[derive(Debug, Default)]
pub struct Counters {
    /// Times that the device's thread looked for something to do.
    pub turns: AtomicU64,
    /// Packets taken from the guest, malformed ones included.
    pub tx_packets: AtomicU64,
    /// Bytes of stream data taken from the guest.
    pub tx_bytes: AtomicU64,
    /// Packets given to the guest.
    pub rx_packets: AtomicU64,
    /// Bytes of stream data given to the guest.
    pub rx_bytes: AtomicU64,
    /// Packets from the guest that were dropped: malformed, or not from its own context id.
    pub dropped_packets: AtomicU64,
    /// Connections that exist now, those included whose last bytes wait for the host's reader.
    pub connections: AtomicU64,
    /// Connections opened so far, by either side.
    pub opened: AtomicU64,
    /// Connection requests that were refused, by either side.
    pub refused: AtomicU64,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, amount: u64) {
        // The mux has one owner at a time.
        counter::add(counter, amount);
    }

    pub(super) fn set(gauge: &AtomicU64, value: u64) {
        gauge.store(value, Ordering::Relaxed);
    }
}
