//! virtio-rng, the entropy device (Virtio 1.2, section 5.4): the host's random numbers for a guest.

use std::io;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::GuestMemoryMmap;

use crate::virtio::queue::{ChainBuffers, Iovecs};
use crate::virtio::ring::Ring;
use crate::virtio::{ActivateError, Activation, VirtioDevice};
use crate::worker::Worker;
use virtio_queue::QueueT;

const QUEUE_SIZES: [u16; 1] = [256];

/// The most bytes that one request is given; a driver that wanted more asks again.
const MAX_REQUEST: usize = 64 << 10;
/// How many requests are served before the worker looks whether it should stop.
const BATCH: usize = 16;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    worker: Option<Worker<RngWorker>>,
}

impl Rng {
    /// An entropy device that draws from the host's getrandom(2).
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let requests = activation
            .queues
            .into_iter()
            .next()
            .filter(|active| active.queue.ready())
            .ok_or(ActivateError::QueueMissing(0))?;
        let worker = RngWorker {
            ring: Ring::new(requests, activation.interrupt),
            buffers: ChainBuffers::new(activation.memory.clone()),
            memory: activation.memory,
        };
        self.worker = Some(Worker::spawn("rng", worker)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Owns the request queue while the device is active.
#[derive(Debug)]
struct RngWorker {
    ring: Ring,
    buffers: ChainBuffers,
    memory: GuestMemoryMmap,
}

impl RngWorker {
    fn serve(&mut self) {
        for _ in 0..BATCH {
            let Some(chain) = self.ring.pop(&self.memory) else {
                self.ring.signal(&self.memory);
                return;
            };
            let head = chain.head_index();
            // A chain that cannot be right goes back unwritten, as does one for which the host
            // has no numbers: the driver sees a length of 0.
            let written = match self.buffers.load(chain) {
                Ok(()) => fill(self.buffers.writable()).unwrap_or_else(|error| {
                    tracing::warn!("the host gave no random numbers: {error}");
                    0
                }),
                Err(_) => 0,
            };
            self.ring.add_used(&self.memory, head, written);
        }
        self.ring.signal(&self.memory);
        self.ring.rekick();
    }
}

/// Fills up to [`MAX_REQUEST`] bytes of `buffers`; gives how many.
fn fill(buffers: &mut Iovecs) -> io::Result<u32> {
    let mut chunk = [0; 4096];
    let mut written = 0;
    while written < MAX_REQUEST && !buffers.is_empty() {
        let len = buffers.len().min(chunk.len()).min(MAX_REQUEST - written);
        let Some(part) = chunk.get_mut(..len) else {
            break;
        };
        let got = getrandom(&mut *part, GetRandomFlags::empty())?;
        if !part
            .get(..got)
            .is_some_and(|part| buffers.write_front(part))
        {
            break;
        }
        written += got;
    }
    // At most MAX_REQUEST.
    Ok(written as u32)
}

impl MutEventSubscriber for RngWorker {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.ring.take_kick();
        self.serve();
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.ring.kick(), EventSet::IN)) {
            tracing::error!("the entropy device cannot watch its queue: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Buffer, HIGH_REGION, MockDriver, NEXT, PATIENCE, WRITE};
    use virtio_queue::desc::split::Descriptor;

    #[test]
    fn a_request_is_filled_with_fresh_random_bytes() {
        let mut driver = MockDriver::started(Box::new(Rng::new()));
        let addr = driver.alloc(8192);
        assert_eq!(driver.request(0, &[Buffer::writable(addr, 8192)]), 8192);
        let first = driver.read(addr, 8192);
        assert_eq!(driver.request(0, &[Buffer::writable(addr, 8192)]), 8192);
        let second = driver.read(addr, 8192);
        assert_ne!(first, second);
        assert!(first.chunks(64).all(|chunk| chunk != [0; 64]), "a hole");
    }

    #[test]
    fn many_buffers_of_odd_lengths_are_filled_to_their_ends_and_no_further() {
        let mut driver = MockDriver::started(Box::new(Rng::new()));
        let addr = driver.alloc(4096);
        let buffers: Vec<_> = (0..20)
            .map(|i| Buffer::writable(addr + i * 100, 67))
            .collect();
        assert_eq!(driver.request(0, &buffers), 20 * 67);
        for i in 0..20 {
            let gap = driver.read(addr + i * 100 + 67, 33);
            assert_eq!(gap, [0; 33], "past the end of buffer {i}");
        }
    }

    #[test]
    fn a_request_for_the_whole_memory_gets_a_bounded_part() {
        let mut driver = MockDriver::started(Box::new(Rng::new()));
        let len = driver.request(0, &[Buffer::writable(HIGH_REGION, 32 << 20)]);
        assert_eq!(len as usize, MAX_REQUEST);
        let after = driver.read(HIGH_REGION + MAX_REQUEST as u64, 4096);
        assert_eq!(after, [0; 4096]);
    }

    #[test]
    fn more_requests_than_a_batch_are_all_served() {
        let mut driver = MockDriver::started(Box::new(Rng::new()));
        let addr = driver.alloc(64);
        for _ in 0..10 * BATCH {
            driver.submit(0, &[Buffer::writable(addr, 64)]);
        }
        driver.kick(0);
        for _ in 0..10 * BATCH {
            assert_eq!(driver.wait_used(0).len, 64);
        }
    }

    #[test]
    fn chains_that_cannot_be_right_come_back_unwritten() {
        let mut driver = MockDriver::started(Box::new(Rng::new()));
        let looped = [
            Descriptor::new(HIGH_REGION, 64, NEXT | WRITE, 1),
            Descriptor::new(HIGH_REGION, 64, NEXT | WRITE, 0),
        ];
        let cases: [&[Descriptor]; 4] = [
            &looped,
            &[Descriptor::new(u64::MAX - 8, 64, WRITE, 0)],
            &[Descriptor::new(64 << 20, 64, WRITE, 0)],
            &[Descriptor::new(HIGH_REGION, 64, NEXT | WRITE, 9999)],
        ];
        for case in cases {
            driver.submit_raw(0, case, 0);
            driver.kick(0);
            assert_eq!(driver.wait_used(0).len, 0, "{case:?}");
        }
        let readable = [Descriptor::new(HIGH_REGION, 64, 0, 0)];
        driver.submit_raw(0, &readable, 0);
        driver.kick(0);
        assert_eq!(driver.wait_used(0).len, 0, "a device-readable buffer");
        assert_eq!(driver.read(HIGH_REGION, 64), [0; 64]);
    }

    #[test]
    fn an_available_index_that_jumps_or_a_bad_head_needs_a_reset_and_a_reset_heals() {
        for broken in [true, false] {
            let mut driver = MockDriver::started(Box::new(Rng::new()));
            match broken {
                true => driver.set_avail_idx(0, 5000),
                false => driver.make_available(0, 60000),
            }
            driver.notify(0);
            assert!(driver.wait_needs_reset(PATIENCE));
            driver.start(u64::MAX);
            let addr = driver.alloc(16);
            assert_eq!(driver.request(0, &[Buffer::writable(addr, 16)]), 16);
        }
    }
}
