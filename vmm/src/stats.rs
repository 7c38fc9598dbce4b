//! What a machine has used so far, from the counters of its own threads and devices.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use devices::virtio::block::BlockStats;
use devices::virtio::net::NetCounters;
use devices::virtio::vsock::VsockHandle;
use serde::{Deserialize, Serialize};

/// What a machine has used since it was launched. Each number is exact; together they are no
/// snapshot of one moment. Directions are the guest's: it receives (rx) and transmits (tx).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// The vCPUs, by number.
    pub vcpus: Vec<VcpuStats>,
    /// Guest memory.
    pub memory: MemoryStats,
    /// The disks, in the order in which the guest sees them.
    pub disks: Vec<DiskStats>,
    /// The network cards, in the order in which the guest sees them.
    pub nets: Vec<NetStats>,
    /// The vsock device, where there is one.
    pub vsock: Option<VsockStats>,
}

/// One vCPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStats {
    /// Nanoseconds that its thread has run on a CPU of the host, in the guest or for it; 0 when the
    /// machine has ended.
    pub cpu_ns: u64,
}

/// Guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStats {
    /// Bytes that the guest has.
    pub size: u64,
    /// Bytes that the host has allocated for them: what the guest touched and did not give back.
    /// The kernel, which is mapped from its file, is not among them.
    pub resident: u64,
}

/// One disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStats {
    /// Bytes that the guest has read.
    pub read_bytes: u64,
    /// Read requests.
    pub reads: u64,
    /// Bytes that the guest has written, without zeroes that it asked for as such.
    pub written_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Requests that were refused or failed.
    pub errors: u64,
}

/// One network card. Bytes are those of Ethernet frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStats {
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames received; one may be a train of segments.
    pub rx_packets: u64,
    /// Frames for the guest that did not fit its buffers.
    pub rx_dropped: u64,
    /// Bytes transmitted.
    pub tx_bytes: u64,
    /// Frames transmitted; one may be a train of segments.
    pub tx_packets: u64,
    /// Frames from the guest that were malformed, or that the host did not take.
    pub tx_dropped: u64,
}

/// The vsock device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockStats {
    /// Connections that exist now.
    pub connections: u64,
    /// Connections opened so far, by either side.
    pub opened: u64,
    /// Connection requests refused so far, by either side.
    pub refused: u64,
    /// Stream bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Stream bytes transmitted.
    pub tx_bytes: u64,
    /// Packets transmitted.
    pub tx_packets: u64,
    /// Packets from the guest that were malformed, or not its own.
    pub dropped_packets: u64,
}

/// The devices' counters: for each device those of its queues.
#[derive(Debug, Default)]
pub(crate) struct Meters {
    pub disks: Vec<Vec<Arc<BlockStats>>>,
    pub nets: Vec<Vec<Arc<NetCounters>>>,
}

impl Meters {
    pub fn disks(&self) -> Vec<DiskStats> {
        self.disks.iter().map(|queues| disk(queues)).collect()
    }

    pub fn nets(&self) -> Vec<NetStats> {
        self.nets.iter().map(|pairs| net(pairs)).collect()
    }
}

impl VcpuStats {
    pub(crate) fn new(cpu_time: Duration) -> Self {
        Self {
            cpu_ns: u64::try_from(cpu_time.as_nanos()).unwrap_or(u64::MAX),
        }
    }
}

impl VsockStats {
    pub(crate) fn of(vsock: &VsockHandle) -> Self {
        let counters = vsock.counters();
        Self {
            connections: get(&counters.connections),
            opened: get(&counters.opened),
            refused: get(&counters.refused),
            rx_bytes: get(&counters.rx_bytes),
            rx_packets: get(&counters.rx_packets),
            tx_bytes: get(&counters.tx_bytes),
            tx_packets: get(&counters.tx_packets),
            dropped_packets: get(&counters.dropped_packets),
        }
    }
}

fn disk(queues: &[Arc<BlockStats>]) -> DiskStats {
    let sum = |value: fn(&BlockStats) -> u64| queues.iter().map(|queue| value(queue)).sum();
    DiskStats {
        read_bytes: sum(BlockStats::bytes_read),
        reads: sum(BlockStats::reads),
        written_bytes: sum(BlockStats::bytes_written),
        writes: sum(BlockStats::writes),
        flushes: sum(BlockStats::flushes),
        errors: sum(BlockStats::errors),
    }
}

fn net(pairs: &[Arc<NetCounters>]) -> NetStats {
    let sum =
        |value: fn(&NetCounters) -> &AtomicU64| pairs.iter().map(|pair| get(value(pair))).sum();
    NetStats {
        rx_bytes: sum(|pair| &pair.rx_bytes),
        rx_packets: sum(|pair| &pair.rx_frames),
        rx_dropped: sum(|pair| &pair.rx_dropped),
        tx_bytes: sum(|pair| &pair.tx_bytes),
        tx_packets: sum(|pair| &pair.tx_frames),
        tx_dropped: sum(|pair| &pair.tx_dropped),
    }
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pairs_of_a_card_are_summed_and_cards_are_not() {
        let pair = |rx_bytes: u64, tx_dropped: u64| {
            let counters = NetCounters::default();
            counters.rx_bytes.store(rx_bytes, Ordering::Relaxed);
            counters.tx_dropped.store(tx_dropped, Ordering::Relaxed);
            Arc::new(counters)
        };
        let meters = Meters {
            disks: vec![vec![Arc::default(), Arc::default()]],
            nets: vec![vec![pair(1, 2), pair(30, 40)], vec![pair(500, 600)]],
        };
        let nets = meters.nets();
        assert_eq!((nets[0].rx_bytes, nets[0].tx_dropped), (31, 42));
        assert_eq!((nets[1].rx_bytes, nets[1].tx_dropped), (500, 600));
        assert_eq!(meters.disks(), [DiskStats::default()]);
    }
}
