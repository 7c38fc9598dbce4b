//! virtio-blk: disks (Virtio 1.2, section 5.2).
//!
//! [`request`] decodes what the guest wrote, [`inflight`] drives it to its end, [`engine`] does
//! the system calls, [`disk`] is the image; [`worker`] moves chains between the ring and these.
//! One worker thread per queue owns its ring, its requests and its engine; nothing is shared but
//! the image.

pub mod disk;
pub mod engine;
mod inflight;
pub mod request;
mod stats;
#[cfg(test)]
mod tests;
mod worker;

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;

use thiserror::Error;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::QueueT;

use self::disk::Disk;
use self::engine::EngineKind;
use self::inflight::{InFlight, Serial, Shared};
use self::request::MAX_RANGE_SECTORS;
pub use self::stats::BlockStats;
use self::worker::QueueWorker;
use crate::virtio::ring::Ring;
use crate::virtio::{ActivateError, Activation, VirtioDevice, read_config_bytes};
use crate::worker::Worker;

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 256;

/// The most queues of one disk: one for each vCPU that a machine can have.
pub const MAX_QUEUES: u16 = 256;

/// Data buffers of one request, so that with header and status it fits into a queue.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// Sectors, as a power of two, of the blocks that the host's page cache works in (4 KiB).
const PHYSICAL_BLOCK_EXP: u8 = 3;

const CONFIG_LEN: usize = 60;

/// What a disk is made of.
#[derive(Debug)]
pub struct BlockConfig {
    /// The image or block device, best from [`disk::open_image`]. Its size is taken once.
    pub file: File,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What the guest reads as serial number: at most 20 bytes of printable ASCII.
    pub serial: String,
    /// Queues, 1 to [`MAX_QUEUES`]; best one for each vCPU.
    pub queues: u16,
}

/// Why there can be no such disk.
#[derive(Debug, Error)]
pub enum BlockError {
    /// The number of queues is out of range.
    #[error("a disk has 1 to {MAX_QUEUES} queues, not {0}")]
    BadQueues(u16),
    /// The serial number does not fit.
    #[error("the disk serial number {0:?} is not 20 or fewer printable ASCII characters")]
    BadSerial(String),
    /// The image cannot be measured, or is no file and no block device.
    #[error("the disk image cannot be used")]
    Image(#[source] io::Error),
    /// Neither io_uring nor threads are to be had.
    #[error("no disk I/O engine could be started")]
    Engine(#[source] io::Error),
}

/// A disk.
pub struct Block {
    disk: Arc<Disk>,
    serial: Serial,
    engine: EngineKind,
    queue_sizes: Vec<u16>,
    config: [u8; CONFIG_LEN],
    /// One for each queue.
    stats: Vec<Arc<BlockStats>>,
    workers: Vec<Worker<QueueWorker>>,
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block")
            .field("disk", &self.disk)
            .field("engine", &self.engine)
            .field("queues", &self.queue_sizes.len())
            .finish_non_exhaustive()
    }
}

impl Block {
    /// A disk on the best engine that this host allows.
    pub fn new(config: BlockConfig) -> Result<Self, BlockError> {
        Self::with_engine(config, EngineKind::Auto)
    }

    /// A disk on a given engine; fails where the host refuses that engine.
    pub fn with_engine(config: BlockConfig, engine: EngineKind) -> Result<Self, BlockError> {
        if !(1..=MAX_QUEUES).contains(&config.queues) {
            return Err(BlockError::BadQueues(config.queues));
        }
        let serial = serial_bytes(&config.serial)
            .ok_or_else(|| BlockError::BadSerial(config.serial.clone()))?;
        let disk = Disk::new(config.file, config.read_only).map_err(BlockError::Image)?;
        let disk = Arc::new(disk);
        // Found out now, while a refusal can still be told to a person.
        let engine = engine.probe(&disk).map_err(BlockError::Engine)?;
        Ok(Self {
            config: config_space(disk.limits().sectors, config.queues),
            disk,
            serial,
            engine,
            queue_sizes: vec![QUEUE_SIZE; config.queues.into()],
            stats: (0..config.queues).map(|_| Arc::default()).collect(),
            workers: Vec::new(),
        })
    }

    /// The counters of each queue, which outlive resets.
    pub fn stats(&self) -> Vec<Arc<BlockStats>> {
        self.stats.clone()
    }

    /// The engine in use: never [`EngineKind::Auto`].
    pub fn engine(&self) -> EngineKind {
        self.engine
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.queue_sizes.len() > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        features
            | if self.disk.limits().read_only {
                1 << VIRTIO_BLK_F_RO
            } else {
                1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
            }
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let shared = Shared {
            limits: *self.disk.limits(),
            serial: self.serial,
            write_back: activation.has_feature(VIRTIO_BLK_F_FLUSH),
        };
        let Activation {
            memory,
            queues,
            interrupt,
            ..
        } = activation;
        for (index, (active, stats)) in queues.into_iter().zip(&self.stats).enumerate() {
            if !active.queue.ready() {
                // A driver without MQ uses the first queue only.
                if index == 0 {
                    return Err(ActivateError::QueueMissing(0));
                }
                continue;
            }
            let engine = self.engine.open(&self.disk)?;
            let size = active.queue.size();
            let in_flight = InFlight::new(engine, &memory, size, shared.clone(), stats.clone());
            let ring = Ring::new(active, interrupt.clone());
            let worker = QueueWorker::new(ring, memory.clone(), interrupt.clone(), in_flight);
            self.workers
                .push(Worker::spawn(&format!("block/{index}"), worker)?);
        }
        Ok(())
    }

    fn reset(&mut self) {
        // Dropping a worker waits for the I/O that is in flight.
        self.workers.clear();
    }
}

fn serial_bytes(serial: &str) -> Option<Serial> {
    let mut bytes = Serial::default();
    if !serial.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
        return None;
    }
    bytes
        .get_mut(..serial.len())?
        .copy_from_slice(serial.as_bytes());
    Some(bytes)
}

/// `struct virtio_blk_config` (section 5.2.4); fields of features that are not on offer are zero.
fn config_space(sectors: u64, queues: u16) -> [u8; CONFIG_LEN] {
    let physical_block = 1u32 << PHYSICAL_BLOCK_EXP;
    let mut config = [0; CONFIG_LEN];
    let mut put = |offset: usize, bytes: &[u8]| {
        config[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, &sectors.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(request::SECTOR as u32).to_le_bytes()); // blk_size
    put(24, &[PHYSICAL_BLOCK_EXP, 0]); // topology, alignment_offset
    put(26, &(physical_block as u16).to_le_bytes()); // min_io_size
    put(34, &queues.to_le_bytes()); // num_queues
    put(36, &MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
    put(40, &1u32.to_le_bytes()); // max_discard_seg
    put(44, &physical_block.to_le_bytes()); // discard_sector_alignment
    put(48, &MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    put(52, &1u32.to_le_bytes()); // max_write_zeroes_seg
    put(56, &[1]); // write_zeroes_may_unmap
    config
}
