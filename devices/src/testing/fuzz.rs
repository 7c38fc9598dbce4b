//! A hostile guest made of bytes: what a fuzzer feeds to a device.

use std::time::{Duration, Instant};

use virtio_queue::desc::split::Descriptor;

use super::{HIGH_REGION, MockDriver, PAGE, REGION_SIZE};
use crate::bus::BusDevice;
use crate::virtio::VirtioDevice;
use crate::virtio::mmio::MMIO_SIZE;

/// How long the program waits for an interrupt after a notification, at most.
const SETTLE: Duration = Duration::from_millis(2);

/// Where programs put headers and data: beyond the rings that a start lays out.
const SCRATCH: u64 = 16 << 20;

/// Plays `data` against `device`, as a program of register accesses, ring contents and
/// notifications; then resets and starts the device as a good driver would.
///
/// Any `data` is a program. It begins on a started device, so that short ones reach the rings.
///
/// # Panics
/// Where the device does not come back after the reset.
pub fn fuzz_device(device: Box<dyn VirtioDevice>, data: &[u8]) {
    let mut driver = MockDriver::started(device);
    let mut program = Program(data);
    while let Some(operation) = program.byte() {
        if driver.play(operation, &mut program).is_none() {
            break;
        }
    }
    driver.next_free = PAGE;
    driver.start(u64::MAX);
}

/// What is left of the bytes.
struct Program<'a>(&'a [u8]);

impl Program<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }
    fn byte(&mut self) -> Option<u8> {
        self.take().map(u8::from_le_bytes)
    }
    fn half(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }
    fn word(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    /// An address: mostly one near the scratch area, sometimes one at an edge or anywhere.
    fn address(&mut self) -> Option<u64> {
        let near = u64::from(self.half()?);
        Some(match self.byte()? {
            0..=199 => SCRATCH + near,
            200..=219 => REGION_SIZE as u64 - near,
            220..=239 => HIGH_REGION.wrapping_add(near).wrapping_sub(0x8000),
            240..=249 => u64::MAX - near,
            _ => self.take().map(u64::from_le_bytes)?,
        })
    }
}

impl MockDriver {
    /// One operation of a program; None where the program ends in its middle.
    fn play(&mut self, operation: u8, program: &mut Program<'_>) -> Option<()> {
        let queues = self.transport.kicks().len().max(1);
        match operation % 12 {
            0 => {
                let register = u32::from(program.byte()?) * 4;
                self.write32(register, program.word()?);
            }
            1 => {
                let offset = u64::from(program.half()?) % MMIO_SIZE;
                let width = usize::from(program.byte()? % 9);
                let value: [u8; 8] = program.take()?;
                self.transport.write(offset, value.get(..width)?);
            }
            2 => {
                let offset = u64::from(program.half()?) % MMIO_SIZE;
                let mut value = vec![0; usize::from(program.byte()? % 9)];
                self.transport.read(offset, &mut value);
            }
            3 => {
                self.next_free = PAGE;
                self.start(program.word()?.into());
            }
            4..=6 => {
                let (queue, at) = (usize::from(program.byte()?) % queues, program.half()?);
                let addr = program.address()?;
                // Small lengths reach further than large ones.
                let len = match program.byte()? {
                    255 => program.word()?,
                    len => u32::from(len) * 16,
                };
                // Two bits of a byte choose the flags: NEXT, WRITE, INDIRECT.
                let (flags, next) = (u16::from(program.byte()? & 7), program.half()?);
                let size = self.queues.get(queue)?.size.max(1);
                // Mostly a link that stays in the table.
                let next = if next & 0x8000 == 0 {
                    next % size
                } else {
                    next
                };
                let descriptor = Descriptor::new(addr, len, flags, next);
                if self.queues.get(queue)?.size > 0 {
                    self.write_descriptor(queue, at % size, descriptor);
                }
            }
            7 | 8 => {
                let (queue, head) = (usize::from(program.byte()?) % queues, program.half()?);
                let size = self.queues.get(queue)?.size;
                if size > 0 {
                    let head = if head < 0xff00 { head % size } else { head };
                    self.make_available(queue, head);
                    self.notify(queue);
                    self.wait_interrupt(Instant::now() + SETTLE);
                }
            }
            9 => {
                let (queue, idx) = (usize::from(program.byte()?) % queues, program.half()?);
                if self.queues.get(queue)?.size > 0 {
                    self.set_avail_idx(queue, idx);
                    self.notify(queue);
                }
            }
            10 => {
                let at = SCRATCH + u64::from(program.half()?);
                let bytes: [u8; 16] = program.take()?;
                self.write(at, &bytes);
            }
            _ => self.reset(),
        }
        Some(())
    }
}
