//! COM1: a 16550A UART whose output goes to a host stream and whose input comes from one.
//!
//! The registers are `vm-superio`'s. What is added here is the host side: a vCPU only ever appends
//! to a bounded buffer, and a thread of the port's own carries that to the host, so that a reader
//! that stopped reading (a full pipe, a terminal held by Ctrl-S) cannot hold a vCPU.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;

/// The port's first I/O address on a PC.
pub const COM1_PORT: u64 = 0x3f8;
/// How many I/O ports it takes.
pub const COM1_LEN: u64 = 8;
/// The port's interrupt on a PC.
pub const COM1_IRQ: u32 = 4;

/// Output that may wait for a slow reader; more than a verbose boot prints.
const OUTPUT_CAPACITY: usize = 1 << 20;
/// How long a vCPU waits for a reader that fell behind, before output is dropped until it reads again.
const OUTPUT_PATIENCE: Duration = Duration::from_millis(500);
/// How long dropping the port waits for its last output to reach the host.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);
/// Pause before trying a non-blocking output again.
const RETRY_PAUSE: Duration = Duration::from_millis(5);
/// The modem control register: leaving its loopback mode makes room for input.
const MCR_OFFSET: u8 = 4;

/// The serial port. Put it on the port bus at [`COM1_PORT`].
pub struct Serial {
    uart: Mutex<Uart>,
    room: EventFd,
    output: Arc<Output>,
}

type Uart = vm_superio::Serial<Line, Room, Feed>;

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

impl Serial {
    /// A port that raises its interrupt by writing to `irq` and sends what the guest prints to
    /// `output`.
    ///
    /// `output` is written by a thread of its own; when it fails, what the guest prints from then
    /// on is dropped, and when it blocks for long, what does not fit a buffer of 1 MiB is. Errors
    /// when the thread or a descriptor cannot be made.
    pub fn new(irq: EventFd, output: Box<dyn Write + Send>) -> io::Result<Self> {
        let room = EventFd::new(EFD_NONBLOCK)?;
        let queue = Arc::new(Output::default());
        let uart = vm_superio::Serial::with_events(
            Line(irq),
            Room(room.try_clone()?),
            Feed(queue.clone()),
        );
        let carried = queue.clone();
        thread::Builder::new()
            .name("serial".to_owned())
            .spawn(move || carried.carry(output))?;
        Ok(Self {
            uart: Mutex::new(uart),
            room,
            output: queue,
        })
    }

    /// Gives `bytes` to the guest; returns how many fitted the port's FIFO of 64 bytes.
    ///
    /// When it is fewer than all, wait for [`Serial::room`] and offer the rest again.
    pub fn input(&self, bytes: &[u8]) -> usize {
        if bytes.is_empty() {
            return 0;
        }
        let mut uart = self.uart();
        // Room that is told about after this point is news.
        let _ = self.room.read();
        // Fails when the FIFO is full, which is "none fitted", or when the interrupt's eventfd
        // would overflow, which means that it is raised.
        uart.enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// Becomes readable when the guest has emptied the FIFO, so that [`Serial::input`] has room.
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    /// How many bytes of output were dropped because the host did not take them.
    pub fn lost(&self) -> u64 {
        self.output.state().lost
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        // The registers hold no invariant that a panic could have broken.
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.uart().read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            // Output never fails ([`Feed`]), and a failed interrupt is one that is raised already.
            let _ = self.uart().write(offset, *byte);
            if offset == MCR_OFFSET {
                let _ = self.room.write(1);
            }
        }
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        self.output.close();
    }
}

/// The port's interrupt.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the host that the FIFO is empty.
struct Room(EventFd);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // Fails only when the counter would overflow: then it is readable already.
        let _ = self.0.write(1);
    }
}

/// The vCPU's end of the output buffer.
struct Feed(Arc<Output>);

impl Write for Feed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the guest has printed and the host has not taken yet.
#[derive(Default)]
struct Output {
    state: Mutex<OutputState>,
    changed: Condvar,
}

#[derive(Default)]
struct OutputState {
    waiting: VecDeque<u8>,
    /// The reader let the buffer fill up and a vCPU has waited for it once already.
    stalled: bool,
    /// Nothing more will be printed.
    closed: bool,
    /// The thread has ended: all is written, or the output failed.
    ended: bool,
    lost: u64,
}

impl Output {
    fn state(&self) -> MutexGuard<'_, OutputState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, bytes: &[u8]) {
        let mut state = self.state();
        let full = |state: &mut OutputState| {
            !state.ended && state.waiting.len() + bytes.len() > OUTPUT_CAPACITY
        };
        if full(&mut state) && !state.stalled {
            (state, _) = self
                .changed
                .wait_timeout_while(state, OUTPUT_PATIENCE, full)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.ended || full(&mut state) {
            state.stalled = true;
            state.lost = state.lost.saturating_add(bytes.len() as u64);
            return;
        }
        let was_empty = state.waiting.is_empty();
        state.waiting.extend(bytes);
        if was_empty {
            self.changed.notify_all();
        }
    }

    /// The thread's body: writes what arrives until the port is dropped or `output` fails.
    fn carry(&self, mut output: Box<dyn Write + Send>) {
        let _ended = Ended(self);
        let mut batch = VecDeque::new();
        loop {
            let mut state = self
                .changed
                .wait_while(self.state(), |s| s.waiting.is_empty() && !s.closed)
                .unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(&mut state.waiting, &mut batch);
            state.stalled = false;
            drop(state);
            self.changed.notify_all();
            if batch.is_empty() {
                return;
            }
            if let Err(error) = write_patiently(&mut output, batch.make_contiguous()) {
                tracing::warn!("the serial console's output is lost from here on: {error}");
                return;
            }
            batch.clear();
        }
    }

    fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        self.changed.notify_all();
        // A thread that is still blocked after this is left behind: it holds its own output only.
        let _drained = self
            .changed
            .wait_timeout_while(state, DRAIN_PATIENCE, |s| !s.ended);
    }
}

/// Marks the output as ended however the thread ends.
struct Ended<'a>(&'a Output);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.state().ended = true;
        self.0.changed.notify_all();
    }
}

fn write_patiently(output: &mut dyn Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match output.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = bytes.get(written..).unwrap_or(&[]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY_PAUSE),
            Err(error) => return Err(error),
        }
    }
    output.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const DATA: u64 = 0;
    const IER: u64 = 1;
    const MCR: u64 = 4;
    const LSR: u64 = 5;

    #[derive(Clone, Default)]
    struct Capture(Arc<Mutex<Vec<u8>>>);

    impl Write for Capture {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Blocks until the test drops the sender.
    struct Blocked(mpsc::Receiver<()>);

    impl Write for Blocked {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Err(ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn event() -> EventFd {
        EventFd::new(EFD_NONBLOCK).unwrap()
    }

    fn read(serial: &Serial, offset: u64) -> u8 {
        let mut byte = [0];
        serial.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn what_the_guest_prints_has_reached_the_output_when_the_port_is_dropped() {
        let capture = Capture::default();
        let serial = Serial::new(event(), Box::new(capture.clone())).unwrap();
        for byte in b"Linux version\n" {
            serial.write(DATA, &[*byte]);
        }
        drop(serial);
        assert_eq!(*capture.0.lock().unwrap(), b"Linux version\n");
    }

    #[test]
    fn input_raises_the_interrupt_and_is_read_in_order() {
        let irq = event();
        let serial = Serial::new(irq.try_clone().unwrap(), Box::new(io::sink())).unwrap();
        serial.write(IER, &[1]);
        assert_eq!(serial.input(b"ls\n"), 3);
        assert_eq!(irq.read().unwrap(), 1);
        assert_eq!(read(&serial, LSR) & 1, 1, "data ready");
        assert_eq!([(); 3].map(|()| read(&serial, DATA)), *b"ls\n");
        assert_eq!(read(&serial, LSR) & 1, 0, "no data left");
    }

    #[test]
    fn input_beyond_the_fifo_waits_for_room() {
        let serial = Serial::new(event(), Box::new(io::sink())).unwrap();
        let bytes = [b'x'; 100];
        let taken = serial.input(&bytes);
        assert_eq!(taken, 64);
        assert_eq!(serial.input(&bytes[taken..]), 0);
        assert!(serial.room().read().is_err(), "no room yet");
        for _ in 0..taken {
            assert_eq!(read(&serial, DATA), b'x');
        }
        assert!(serial.room().read().is_ok(), "room was not announced");
        assert_eq!(serial.input(&bytes[taken..]), 36);
    }

    #[test]
    fn input_refused_in_loopback_mode_is_asked_for_again_afterwards() {
        let serial = Serial::new(event(), Box::new(io::sink())).unwrap();
        serial.write(MCR, &[0x10]);
        assert_eq!(serial.input(b"x"), 0);
        serial.write(MCR, &[0]);
        assert!(serial.room().read().is_ok(), "room was not announced");
        assert_eq!(serial.input(b"x"), 1);
    }

    #[test]
    fn a_blocked_output_drops_bytes_and_holds_no_vcpu() {
        let (unblock, blocked) = mpsc::channel();
        let serial = Serial::new(event(), Box::new(Blocked(blocked))).unwrap();
        let printed = 2 * OUTPUT_CAPACITY as u64 + 1;
        for _ in 0..printed {
            serial.write(DATA, b"x");
        }
        // One buffer may be in the thread's hands and one may be waiting.
        assert!(serial.lost() >= printed - 2 * OUTPUT_CAPACITY as u64);
        drop(unblock);
    }

    #[test]
    fn a_failed_output_leaves_the_port_working() {
        let (unblock, failed) = mpsc::channel();
        drop(unblock);
        let serial = Serial::new(event(), Box::new(Blocked(failed))).unwrap();
        for _ in 0..3 * OUTPUT_CAPACITY {
            serial.write(DATA, b"x");
        }
        assert_eq!(serial.input(b"y"), 1);
        assert_eq!(read(&serial, DATA), b'y');
    }

    #[test]
    fn odd_widths_and_offsets_are_ignored() {
        let capture = Capture::default();
        let serial = Serial::new(event(), Box::new(capture.clone())).unwrap();
        serial.write(DATA, &[]);
        serial.write(DATA, b"xy");
        serial.write(u64::MAX, b"x");
        serial.write(7 + 256, b"x");
        let mut wide = [0xaa; 4];
        serial.read(DATA, &mut wide);
        assert_eq!(wide, [0xaa; 4]);
        serial.read(9, &mut wide[..1]);
        drop(serial);
        assert!(capture.0.lock().unwrap().is_empty());
    }
}
