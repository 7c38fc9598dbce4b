//! virtio-net, the network device (Virtio 1.2, section 5.1), on a TAP interface.
//!
//! Frames go between the TAP's descriptor and guest memory with one `readv` or `writev` each; host
//! and guest leave checksums and segmentation to each other through the header before the frame.
//! Each pair of queues has a worker of its own ([`pair`]), which owns both queues and one of the
//! TAP's; the control queue's worker ([`control`]) says how many pairs are in use.

mod control;
mod pair;
mod rx;
mod tap;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::*;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::ring::Ring;
use crate::virtio::{ActivateError, Activation, ActiveQueue, VirtioDevice, read_config_bytes};
use crate::worker::Worker;

pub use tap::{HEADER_LEN, Tap, TapError};

use control::ControlWorker;
use pair::{PairWorker, Sender};

/// Entries of a receive or transmit queue.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue.
const CONTROL_QUEUE_SIZE: u16 = 64;
/// The most pairs of queues: as many as a TAP has.
pub const MAX_QUEUE_PAIRS: u16 = 256;

/// The longest frame that segmentation offload makes, with the header (Virtio 1.2, section 5.1.6.3.1).
pub const MAX_FRAME: usize = 65_562;

/// What a network device is made of.
#[derive(Debug)]
pub struct NetConfig {
    /// The host's side, with as many queues as there are pairs.
    pub tap: Tap,
    /// The guest's MAC address; None lets the guest choose.
    pub mac: Option<[u8; 6]>,
    /// Pairs of receive and transmit queues, 1 to [`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u16,
}

/// Why a network device could not be made.
#[derive(Debug, Error)]
pub enum NetError {
    /// The number of pairs is out of range, or the TAP has another number of queues.
    #[error(
        "a network device with {pairs} pairs of queues cannot be made on interface {tap}, which was opened with {queues}"
    )]
    QueuePairs {
        /// Pairs asked for.
        pairs: u16,
        /// The interface's name.
        tap: String,
        /// Queues that it was opened with.
        queues: usize,
    },
    /// The MAC address is one of a group, or zero.
    #[error("{} is no address for a network card: the lowest bit of its first byte must be 0, and not all of it", Mac(*.0))]
    GroupMac([u8; 6]),
}

struct Mac([u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// What has passed through one pair of queues since the machine started. Bytes are without headers.
#[derive(Debug, Default)]
// So that no two pairs' counters share a cache line, nor two that are fetched together.
#[repr(align(128))]
pub struct NetCounters {
    /// Frames given to the guest.
    pub rx_frames: AtomicU64,
    /// Their bytes.
    pub rx_bytes: AtomicU64,
    /// Frames for the guest that did not fit its buffers.
    pub rx_dropped: AtomicU64,
    /// Frames given to the host.
    pub tx_frames: AtomicU64,
    /// Their bytes.
    pub tx_bytes: AtomicU64,
    /// Frames from the guest that could not be right, or that the host did not take.
    pub tx_dropped: AtomicU64,
}

/// The network device.
#[derive(Debug)]
pub struct Net {
    tap: Arc<Tap>,
    pairs: u16,
    features: u64,
    config: [u8; 12],
    queue_sizes: Vec<u16>,
    /// One for each pair.
    counters: Vec<Arc<NetCounters>>,
    workers: Vec<Worker<PairWorker>>,
    control: Option<Worker<ControlWorker>>,
}

impl Net {
    /// A network device on an open TAP.
    pub fn new(config: NetConfig) -> Result<Self, NetError> {
        let NetConfig {
            tap,
            mac,
            queue_pairs: pairs,
        } = config;
        if !(1..=MAX_QUEUE_PAIRS).contains(&pairs) || tap.queue_count() != usize::from(pairs) {
            return Err(NetError::QueuePairs {
                pairs,
                tap: tap.name().to_owned(),
                queues: tap.queue_count(),
            });
        }
        if let Some(mac) = mac.filter(|mac| mac[0] & 1 != 0 || *mac == [0; 6]) {
            return Err(NetError::GroupMac(mac));
        }
        // Virtio 1.2, section 5.1.6.2: an MTU below 68 must not be shown.
        let mtu = tap.mtu().filter(|mtu| *mtu >= 68);
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * usize::from(pairs)];
        if pairs > 1 {
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        Ok(Self {
            features: features(mac.is_some(), mtu.is_some(), pairs > 1),
            config: config_space(mac.unwrap_or_default(), pairs, mtu.unwrap_or_default()),
            tap: Arc::new(tap),
            pairs,
            queue_sizes,
            counters: (0..pairs).map(|_| Arc::default()).collect(),
            workers: Vec::new(),
            control: None,
        })
    }

    /// What passes through each pair of queues; the counters go on through resets.
    pub fn counters(&self) -> Vec<Arc<NetCounters>> {
        self.counters.clone()
    }
}

fn features(mac: bool, mtu: bool, several: bool) -> u64 {
    let mut bits = vec![
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_STATUS,
    ];
    bits.extend(mac.then_some(VIRTIO_NET_F_MAC));
    bits.extend(mtu.then_some(VIRTIO_NET_F_MTU));
    if several {
        bits.extend([VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ]);
    }
    bits.into_iter().fold(0, |all, bit| all | 1 << bit)
}

/// struct virtio_net_config: mac, status, max_virtqueue_pairs, mtu.
fn config_space(mac: [u8; 6], pairs: u16, mtu: u16) -> [u8; 12] {
    let mut config = [0; 12];
    config[..6].copy_from_slice(&mac);
    config[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
    config[8..10].copy_from_slice(&pairs.to_le_bytes());
    config[10..].copy_from_slice(&mtu.to_le_bytes());
    config
}

/// What the host may leave to this guest.
fn offloads(activation: &Activation) -> u32 {
    // Segments have no checksum, so without GUEST_CSUM there can be none.
    if !activation.has_feature(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let when = |feature, flag| {
        if activation.has_feature(feature) {
            flag
        } else {
            0
        }
    };
    tap::TUN_F_CSUM
        | when(VIRTIO_NET_F_GUEST_TSO4, tap::TUN_F_TSO4)
        | when(VIRTIO_NET_F_GUEST_TSO6, tap::TUN_F_TSO6)
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let several = activation.has_feature(VIRTIO_NET_F_MQ);
        let pairs = if several { usize::from(self.pairs) } else { 1 };
        self.tap.set_offload(offloads(&activation))?;
        // Section 5.1.6.5.5: until the driver says otherwise, only the first pair is in use.
        self.tap.attach_queues(1)?;
        let mergeable = activation.has_feature(VIRTIO_NET_F_MRG_RXBUF);
        let has_control = activation.has_feature(VIRTIO_NET_F_CTRL_VQ);
        let Activation {
            memory,
            queues,
            interrupt,
            ..
        } = activation;
        let unused = |queue: &ActiveQueue| !queue.queue.ready();
        if let Some(missing) = (0..2).find(|index| queues.get(*index).is_none_or(unused)) {
            return Err(ActivateError::QueueMissing(missing));
        }
        let mut queues = queues.into_iter();
        let mut attached = Vec::new();
        for (index, counters) in (0..pairs).zip(&self.counters) {
            let (Some(rx), Some(tx)) = (queues.next(), queues.next()) else {
                return Err(ActivateError::QueueMissing(2 * index));
            };
            let event = EventFd::new(EFD_NONBLOCK)?;
            attached.push(event.try_clone()?);
            let worker = PairWorker::new(
                index,
                self.tap.clone(),
                rx::Receiver::new(
                    Ring::new(rx, interrupt.clone()),
                    memory.clone(),
                    mergeable,
                    counters.clone(),
                ),
                Sender::new(
                    Ring::new(tx, interrupt.clone()),
                    memory.clone(),
                    counters.clone(),
                ),
                event,
            );
            self.workers
                .push(Worker::spawn(&format!("net{index}"), worker)?);
        }
        // Without MQ the control queue comes right after the one pair.
        if let Some(queue) = queues.next().filter(|_| has_control) {
            let ring = Ring::new(queue, interrupt);
            let worker = ControlWorker::new(ring, memory, self.tap.clone(), attached);
            self.control = Some(Worker::spawn("net-control", worker)?);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.control = None;
        self.workers.clear();
    }
}

/// Whether a host call should just be made again later.
fn would_block(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests;
