//! virtio-balloon (Virtio 1.2, section 5.5): a guest gives memory back to the host.
//!
//! In two ways: the host asks for a number of pages (the target) and the guest's driver inflates,
//! or the guest reports pages that are free at the moment and may have back at any time (free page
//! reporting). Both end in [`release::release`].

mod release;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use crate::interrupt::Interrupt;
use crate::virtio::queue::ChainBuffers;
use crate::virtio::ring::Ring;
use crate::virtio::{ActivateError, Activation, VirtioDevice, read_config_bytes};
use crate::worker::Worker;

/// The driver may take pages back when its guest runs out of memory.
pub const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
/// The driver reports free pages.
pub const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

/// A page of the balloon is 4 KiB, whatever the page size of either side.
const VIRTIO_BALLOON_PFN_SHIFT: u32 = 12;
const PAGES_PER_MIB: u32 = 1 << (20 - VIRTIO_BALLOON_PFN_SHIFT);

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// The specification numbers the reporting queue 4; drivers that count only the queues which
/// exist (Linux among them) take 2. So from here on all are reporting queues.
const REPORTING: usize = 2;
const QUEUE_SIZES: [u16; 5] = [128; 5];

/// Where `actual` stands in the configuration space.
const ACTUAL: u64 = 4;

/// Chains that are served before the worker looks at its other events.
const BATCH: usize = 64;
/// Page numbers that one chain may hold: 256 MiB worth. What comes after them is not released.
const MAX_PAGES: usize = 1 << 16;

/// What a balloon is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BalloonConfig {
    /// How much memory the guest is to give up at first, in MiB.
    pub target_mib: u32,
    /// The guest may take memory back when it runs out of it.
    pub deflate_on_oom: bool,
    /// The guest reports free pages, which the host takes without asking for them.
    pub free_page_reporting: bool,
}

/// What device, worker and handle share.
#[derive(Debug, Default)]
struct Shared {
    /// num_pages: what the host wants.
    target: AtomicU32,
    /// What the driver says that it has given up.
    actual: AtomicU32,
    released: AtomicU64,
    /// The interrupt of the active device. Locked to change the target and at activation and
    /// reset, never on a data path.
    interrupt: Mutex<Option<Arc<Interrupt>>>,
}

impl Shared {
    fn interrupt(&self) -> MutexGuard<'_, Option<Arc<Interrupt>>> {
        self.interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The host's hold on a balloon, good as long as the machine runs and harmless afterwards.
#[derive(Debug, Clone)]
pub struct BalloonHandle(Arc<Shared>);

impl BalloonHandle {
    /// Asks the guest to give up `mib` MiB in all; it does so when and as far as it can.
    pub fn set_target_mib(&self, mib: u32) {
        let pages = mib.saturating_mul(PAGES_PER_MIB);
        self.0.target.store(pages, Ordering::Release);
        if let Some(interrupt) = &*self.0.interrupt() {
            interrupt.signal_config();
        }
    }

    /// What the guest is asked to give up, in MiB.
    pub fn target_mib(&self) -> u32 {
        self.0.target.load(Ordering::Acquire) / PAGES_PER_MIB
    }

    /// What the guest says that it has given up, in MiB. It may lie.
    pub fn actual_mib(&self) -> u32 {
        self.0.actual.load(Ordering::Acquire) / PAGES_PER_MIB
    }

    /// Bytes that were released to the host since the start, pages that the guest took back and
    /// gave up again included.
    pub fn released_bytes(&self) -> u64 {
        self.0.released.load(Ordering::Relaxed)
    }
}

/// The balloon device.
#[derive(Debug)]
pub struct Balloon {
    features: u64,
    shared: Arc<Shared>,
    worker: Option<Worker<BalloonWorker>>,
}

impl Balloon {
    /// A balloon and the host's hold on it.
    pub fn new(config: BalloonConfig) -> (Self, BalloonHandle) {
        let when = |wanted, bit: u32| if wanted { 1 << bit } else { 0 };
        let shared = Arc::new(Shared::default());
        let handle = BalloonHandle(shared.clone());
        handle.set_target_mib(config.target_mib);
        let device = Self {
            features: when(config.deflate_on_oom, VIRTIO_BALLOON_F_DEFLATE_ON_OOM)
                | when(config.free_page_reporting, VIRTIO_BALLOON_F_REPORTING),
            shared,
            worker: None,
        };
        (device, handle)
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        let (target, actual) = config.split_at_mut(4);
        target.copy_from_slice(&self.shared.target.load(Ordering::Acquire).to_le_bytes());
        actual.copy_from_slice(&self.shared.actual.load(Ordering::Acquire).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(actual)) = (offset, data.try_into()) {
            let actual = u32::from_le_bytes(actual);
            self.shared.actual.store(actual, Ordering::Release);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let reporting = activation.has_feature(VIRTIO_BALLOON_F_REPORTING);
        let Activation {
            memory,
            queues,
            interrupt,
            ..
        } = activation;
        let mut rings = Vec::new();
        for (index, queue) in queues.into_iter().enumerate() {
            if queue.queue.ready() && (index < REPORTING || reporting) {
                rings.push((index, Ring::new(queue, interrupt.clone())));
            } else if index < REPORTING {
                return Err(ActivateError::QueueMissing(index));
            }
        }
        let worker = BalloonWorker {
            rings,
            buffers: ChainBuffers::new(memory.clone()),
            memory,
            shared: self.shared.clone(),
            pages: Vec::new(),
        };
        self.worker = Some(Worker::spawn("balloon", worker)?);
        *self.shared.interrupt() = Some(interrupt);
        Ok(())
    }

    fn reset(&mut self) {
        *self.shared.interrupt() = None;
        self.worker = None;
        self.shared.actual.store(0, Ordering::Release);
    }
}

/// Owns all queues of an active balloon.
#[derive(Debug)]
struct BalloonWorker {
    /// The queues in use, with their numbers.
    rings: Vec<(usize, Ring)>,
    buffers: ChainBuffers,
    memory: GuestMemoryMmap,
    shared: Arc<Shared>,
    /// Page numbers of one chain; kept for its allocation.
    pages: Vec<u32>,
}

impl BalloonWorker {
    fn serve(&mut self, index: usize, ring: &mut Ring) {
        ring.take_kick();
        let mut left = BATCH;
        while let Some(chain) = ring.pop(&self.memory) {
            let head = chain.head_index();
            // A chain that cannot be right is given back and releases nothing.
            if self.buffers.load(chain).is_ok() {
                let released = match index {
                    INFLATE => self.inflate(),
                    // What the guest takes back comes with its first access.
                    DEFLATE => 0,
                    _ => self.report(),
                };
                self.shared
                    .released
                    .fetch_add(released as u64, Ordering::Relaxed);
            }
            ring.add_used(&self.memory, head, 0);
            left -= 1;
            if left == 0 {
                ring.rekick();
                break;
            }
        }
        ring.signal(&self.memory);
    }

    /// Releases the pages whose numbers the loaded chain holds; gives how many bytes.
    fn inflate(&mut self) -> usize {
        self.pages.clear();
        let mut number = [0; 4];
        while self.pages.len() < MAX_PAGES && self.buffers.readable().read_front(&mut number) {
            self.pages.push(u32::from_le_bytes(number));
        }
        // Runs of neighbours are released together.
        self.pages.sort_unstable();
        self.pages.dedup();
        self.pages
            .chunk_by(|a, b| a.checked_add(1) == Some(*b))
            .map(|run| self.release_run(run))
            .sum()
    }

    /// Releases consecutive pages, as far as they are memory.
    fn release_run(&self, run: &[u32]) -> usize {
        let Some(first) = run.first() else {
            return 0;
        };
        let addr = GuestAddress(u64::from(*first) << VIRTIO_BALLOON_PFN_SHIFT);
        // At most MAX_PAGES pages.
        let len = run.len() << VIRTIO_BALLOON_PFN_SHIFT;
        let Ok(slices) = self.memory.get_slices(addr, len, Permissions::ReadWrite) else {
            return 0;
        };
        slices
            .map_while(Result::ok)
            .map(|slice| {
                // SAFETY: the slice was checked against guest memory, which `self.memory` keeps
                // mapped; there are no references into guest memory.
                unsafe { release::release(slice.ptr_guard_mut().as_ptr(), slice.len()) }
            })
            .sum()
    }

    /// Releases the free pages that the loaded chain consists of; gives how many bytes.
    fn report(&mut self) -> usize {
        let pieces = self.buffers.writable().as_slice();
        pieces
            .iter()
            .map(|piece| {
                // SAFETY: the piece was checked against guest memory, which `self.buffers` keeps
                // mapped; there are no references into guest memory.
                unsafe { release::release(piece.iov_base.cast(), piece.iov_len) }
            })
            .sum()
    }
}

impl MutEventSubscriber for BalloonWorker {
    fn process(&mut self, events: Events, _: &mut EventOps) {
        let mut rings = std::mem::take(&mut self.rings);
        let index = events.data() as usize;
        if let Some((_, ring)) = rings.iter_mut().find(|(number, _)| *number == index) {
            self.serve(index, ring);
        }
        self.rings = rings;
    }

    fn init(&mut self, ops: &mut EventOps) {
        for (index, ring) in &self.rings {
            // One of QUEUE_SIZES.
            let data = *index as u32;
            if let Err(error) = ops.add(Events::with_data(ring.kick(), data, EventSet::IN)) {
                tracing::error!("the balloon cannot watch queue {index}: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Buffer, HIGH_REGION, MockDriver, NEXT, PATIENCE, REGION_SIZE, WRITE};
    use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION};
    use virtio_queue::desc::split::Descriptor;

    const PAGE: u64 = 4096;
    const ALL: BalloonConfig = BalloonConfig {
        target_mib: 0,
        deflate_on_oom: true,
        free_page_reporting: true,
    };

    fn started() -> (MockDriver, BalloonHandle) {
        let (balloon, handle) = Balloon::new(ALL);
        (MockDriver::started(Box::new(balloon)), handle)
    }

    fn mark(driver: &MockDriver, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            driver.write(HIGH_REGION + page * PAGE, &[1; 64]);
        }
    }

    fn marked(driver: &MockDriver, page: u64) -> bool {
        driver.read(HIGH_REGION + page * PAGE, 1)[0] == 1
    }

    fn inflate(driver: &mut MockDriver, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        let addr = driver.alloc_with(&bytes);
        let buffer = Buffer::readable(addr, bytes.len() as u32);
        assert_eq!(driver.request(INFLATE, &[buffer]), 0);
    }

    #[test]
    fn inflating_releases_just_the_pages_that_are_named() {
        let (mut driver, handle) = started();
        mark(&driver, 0..10);
        let first = (HIGH_REGION / PAGE) as u32;
        inflate(
            &mut driver,
            &[first + 5, first + 2, first + 3, first + 2, first + 9],
        );
        let left: Vec<u64> = (0..10).filter(|page| marked(&driver, *page)).collect();
        assert_eq!(left, [0, 1, 4, 6, 7, 8]);
        assert_eq!(handle.released_bytes(), 4 * PAGE);
    }

    #[test]
    fn page_numbers_that_are_no_memory_release_nothing() {
        let (mut driver, handle) = started();
        let hole = (REGION_SIZE as u64 / PAGE) as u32;
        let end = ((HIGH_REGION + REGION_SIZE as u64) / PAGE) as u32;
        inflate(&mut driver, &[hole, hole + 1, end, u32::MAX, u32::MAX - 1]);
        assert_eq!(handle.released_bytes(), 0);
        // A run that leaves memory is released as far as it is memory.
        inflate(&mut driver, &[end - 1, end, end + 1]);
        assert!(handle.released_bytes() <= PAGE);
    }

    #[test]
    fn deflating_is_acknowledged() {
        let (mut driver, handle) = started();
        let addr = driver.alloc_with(&7_u32.to_le_bytes());
        assert_eq!(driver.request(DEFLATE, &[Buffer::readable(addr, 4)]), 0);
        assert_eq!(handle.released_bytes(), 0);
    }

    #[test]
    fn reported_pages_are_released_on_any_of_the_reporting_queues() {
        for queue in REPORTING..QUEUE_SIZES.len() {
            let (mut driver, handle) = started();
            mark(&driver, 0..8);
            let at = |page: u64, len| Buffer::writable(HIGH_REGION + page * PAGE, len);
            // Whole pages, and one that is reported in part only.
            let buffers = [at(1, 2 * PAGE as u32), at(5, PAGE as u32), at(7, 100)];
            assert_eq!(driver.request(queue, &buffers), 0);
            let left: Vec<u64> = (0..8).filter(|page| marked(&driver, *page)).collect();
            assert_eq!(left, [0, 3, 4, 6, 7], "queue {queue}");
            assert_eq!(handle.released_bytes(), 3 * PAGE);
        }
    }

    #[test]
    fn without_reporting_its_queues_are_dead() {
        let (balloon, handle) = Balloon::new(ALL);
        let wanted = !(1 << VIRTIO_BALLOON_F_REPORTING);
        let mut driver = MockDriver::started_with(Box::new(balloon), wanted);
        mark(&driver, 0..1);
        driver.submit(REPORTING, &[Buffer::writable(HIGH_REGION, PAGE as u32)]);
        driver.notify(REPORTING);
        // The worker serves its events in turn, so this comes after.
        inflate(&mut driver, &[1]);
        assert!(marked(&driver, 0));
        assert_eq!(handle.released_bytes(), PAGE);
        assert_eq!(driver.pop_used(REPORTING), None);
    }

    #[test]
    fn the_target_reaches_the_driver_with_an_interrupt_and_the_actual_size_comes_back() {
        let config = BalloonConfig {
            target_mib: 3,
            ..ALL
        };
        let (balloon, handle) = Balloon::new(config);
        let driver = MockDriver::started(Box::new(balloon));
        assert_eq!(driver.config(0, 4), (3 * 256_u32).to_le_bytes());
        let generation = driver.read32(VIRTIO_MMIO_CONFIG_GENERATION);
        handle.set_target_mib(64);
        assert_ne!(driver.read32(VIRTIO_MMIO_CONFIG_GENERATION), generation);
        assert_eq!(driver.config(0, 4), (64 * 256_u32).to_le_bytes());
        let config = u64::from(VIRTIO_MMIO_CONFIG);
        let transport = driver.transport();
        crate::bus::BusDevice::write(&**transport, config + 4, &(512_u32).to_le_bytes());
        assert_eq!((handle.target_mib(), handle.actual_mib()), (64, 2));
        handle.set_target_mib(u32::MAX);
        assert_eq!(driver.config(0, 4), u32::MAX.to_le_bytes());
        assert_eq!(driver.config(8, 8), [0; 8], "past the end");
    }

    #[test]
    fn chains_that_cannot_be_right_release_nothing_and_come_back() {
        let (mut driver, handle) = started();
        mark(&driver, 0..4);
        let cases: [(usize, Descriptor); 6] = [
            (INFLATE, Descriptor::new(HIGH_REGION, 4096, NEXT, 0)),
            (INFLATE, Descriptor::new(64 << 20, 4096, 0, 0)),
            (INFLATE, Descriptor::new(HIGH_REGION, 3, 0, 0)),
            (
                REPORTING,
                Descriptor::new(HIGH_REGION, 4096, WRITE | NEXT, 0),
            ),
            (REPORTING, Descriptor::new(u64::MAX - 4095, 8192, WRITE, 0)),
            (REPORTING, Descriptor::new(HIGH_REGION, 4096, 0, 0)),
        ];
        for (queue, case) in cases {
            driver.submit_raw(queue, &[case], 0);
            driver.kick(queue);
            assert_eq!(driver.wait_used(queue).len, 0, "{case:?}");
        }
        assert_eq!(handle.released_bytes(), 0);
        assert!((0..4).all(|page| marked(&driver, page)));
    }

    #[test]
    fn a_list_of_pages_as_long_as_memory_is_bounded() {
        let (mut driver, handle) = started();
        // All zeros: page 0 over and over, and the mock guest keeps nothing there.
        let len = REGION_SIZE as u32;
        assert_eq!(
            driver.request(INFLATE, &[Buffer::readable(HIGH_REGION, len)]),
            0
        );
        assert_eq!(handle.released_bytes(), PAGE);
    }

    #[test]
    fn an_index_that_jumps_needs_a_reset_and_the_handle_outlives_all() {
        let (mut driver, handle) = started();
        driver.set_avail_idx(DEFLATE, 3000);
        driver.notify(DEFLATE);
        assert!(driver.wait_needs_reset(PATIENCE));
        driver.start(u64::MAX);
        inflate(&mut driver, &[(HIGH_REGION / PAGE) as u32]);
        drop(driver);
        handle.set_target_mib(1);
        assert_eq!(handle.target_mib(), 1);
    }
}
