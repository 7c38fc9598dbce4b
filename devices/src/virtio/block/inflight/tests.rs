//! Requests of several steps, on an engine that does what the test says.

use std::collections::VecDeque;
use std::sync::Mutex;

use virtio_bindings::virtio_blk::*;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::*;

/// What an engine was told, and what it shall answer.
#[derive(Default)]
struct Script {
    /// Operations and the bytes in their iovecs.
    pushed: Vec<(Operation, usize)>,
    tokens: VecDeque<u16>,
    answers: VecDeque<io::Result<u32>>,
    drained: bool,
}

struct Scripted(Arc<Mutex<Script>>);

impl Engine for Scripted {
    fn completion_fd(&self) -> RawFd {
        -1
    }
    unsafe fn push(
        &mut self,
        token: u16,
        operation: Operation,
        iovecs: &[libc::iovec],
    ) -> io::Result<()> {
        let mut script = self.0.lock().unwrap();
        let len = iovecs.iter().map(|iovec| iovec.iov_len).sum();
        script.pushed.push((operation, len));
        script.tokens.push_back(token);
        Ok(())
    }
    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn reap(&mut self, completions: &mut Vec<Completion>) {
        let script = &mut *self.0.lock().unwrap();
        while let Some(result) = script.answers.pop_front() {
            let token = script.tokens.pop_front().expect("something in flight");
            completions.push(Completion { token, result });
        }
    }
    fn drain(&mut self) -> io::Result<()> {
        self.0.lock().unwrap().drained = true;
        Ok(())
    }
}

const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x5000;
const DATA: u64 = 0x8000;

struct Fixture {
    memory: GuestMemoryMmap,
    in_flight: InFlight,
    script: Arc<Mutex<Script>>,
}

impl Fixture {
    fn new(write_back: bool) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let script = Arc::new(Mutex::new(Script::default()));
        let shared = Shared {
            limits: Limits {
                sectors: 1 << 16,
                read_only: false,
            },
            serial: Serial::default(),
            write_back,
        };
        let engine = Box::new(Scripted(script.clone()));
        Self {
            in_flight: InFlight::new(engine, &memory, 4, shared, Arc::default()),
            memory,
            script,
        }
    }

    /// Begins a request with `len` bytes of data, in buffers of at most 4096 bytes.
    fn begin(&mut self, kind: u32, sector: u64, len: u32, writable: bool) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory
            .write_slice(&header, GuestAddress(HEADER))
            .unwrap();
        self.memory.write_obj(0xeeu8, GuestAddress(STATUS)).unwrap();
        let mut pieces = vec![(HEADER, 16, 0)];
        for at in (0..len).step_by(4096) {
            let flags = if writable { 2 } else { 0 };
            pieces.push((DATA + u64::from(at), (len - at).min(4096), flags));
        }
        pieces.push((STATUS, 1, 2));
        for (i, &(addr, len, flags)) in pieces.iter().enumerate() {
            let next = u16::from(i + 1 < pieces.len());
            let descriptor = Descriptor::new(addr, len, flags | next, i as u16 + 1);
            let at = GuestAddress(TABLE + i as u64 * 16);
            self.memory.write_obj(descriptor, at).unwrap();
        }
        self.memory
            .write_obj(1u16, GuestAddress(AVAIL + 2))
            .unwrap();
        let mut queue = Queue::new(64).unwrap();
        queue.set_desc_table_address(Some(TABLE as u32), None);
        queue.set_avail_ring_address(Some(AVAIL as u32), None);
        queue.set_used_ring_address(Some(0x3000), None);
        queue.set_ready(true);
        let chain = queue.iter(&self.memory).unwrap().next().unwrap();
        self.in_flight.begin(chain);
    }

    fn begin_range(&mut self, kind: u32, sector: u64, count: u32, flags: u32) {
        self.memory.write_obj(sector, GuestAddress(DATA)).unwrap();
        self.memory
            .write_obj(count, GuestAddress(DATA + 8))
            .unwrap();
        self.memory
            .write_obj(flags, GuestAddress(DATA + 12))
            .unwrap();
        self.begin(kind, 0, 16, false);
    }

    /// The one operation that is in flight.
    fn pushed(&self) -> (Operation, usize) {
        let pushed = std::mem::take(&mut self.script.lock().unwrap().pushed);
        let [operation] = pushed[..] else {
            panic!("one operation in flight, not {pushed:?}");
        };
        operation
    }

    fn answer(&mut self, result: io::Result<u32>) {
        self.script.lock().unwrap().answers.push_back(result);
        self.in_flight.reap();
    }

    fn refuse(&mut self, errno: i32) {
        self.answer(Err(io::Error::from_raw_os_error(errno)));
    }

    /// Status and used length of the finished request, if it is.
    fn outcome(&mut self) -> Option<(u8, u32)> {
        let finished = self.in_flight.finished().pop()?;
        assert!(self.in_flight.finished().is_empty());
        assert!(self.script.lock().unwrap().pushed.is_empty());
        Some((
            self.memory.read_obj(GuestAddress(STATUS)).unwrap(),
            finished.len,
        ))
    }
}

#[test]
fn a_short_read_goes_on_where_it_stopped() {
    let mut disk = Fixture::new(true);
    disk.begin(VIRTIO_BLK_T_IN, 8, 12288, true);
    assert_eq!(disk.pushed(), (Operation::Read { offset: 4096 }, 12288));
    disk.answer(Ok(5000));
    assert_eq!(disk.pushed(), (Operation::Read { offset: 9096 }, 7288));
    disk.refuse(libc::EINTR);
    assert_eq!(disk.pushed(), (Operation::Read { offset: 9096 }, 7288));
    assert_eq!(disk.outcome(), None);
    disk.answer(Ok(7288));
    assert_eq!(disk.outcome(), Some((OK, 12289)));
}

#[test]
fn a_short_write_goes_on_and_fails_where_the_host_is_full() {
    let mut disk = Fixture::new(true);
    disk.begin(VIRTIO_BLK_T_OUT, 0, 8192, false);
    let write = |offset| Operation::Write {
        offset,
        durable: false,
    };
    assert_eq!(disk.pushed(), (write(0), 8192));
    disk.answer(Ok(4096));
    assert_eq!(disk.pushed(), (write(4096), 4096));
    disk.refuse(libc::ENOSPC);
    assert_eq!(disk.outcome(), Some((IOERR, 1)));
}

#[test]
fn a_transfer_that_moves_nothing_is_an_error_and_not_tried_for_ever() {
    for (kind, writable) in [(VIRTIO_BLK_T_IN, true), (VIRTIO_BLK_T_OUT, false)] {
        let mut disk = Fixture::new(true);
        disk.begin(kind, 0, 4096, writable);
        disk.pushed();
        disk.answer(Ok(0));
        assert_eq!(disk.outcome(), Some((IOERR, 1)));
    }
}

#[test]
fn without_flush_every_change_is_durable_when_it_completes() {
    let mut disk = Fixture::new(false);
    disk.begin(VIRTIO_BLK_T_OUT, 0, 512, false);
    let durable = Operation::Write {
        offset: 0,
        durable: true,
    };
    assert_eq!(disk.pushed(), (durable, 512));
    disk.answer(Ok(512));
    assert_eq!(disk.outcome(), Some((OK, 1)));
    disk.begin_range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 0);
    disk.pushed();
    disk.answer(Ok(0));
    assert_eq!(disk.pushed(), (Operation::Flush, 0));
    assert_eq!(disk.outcome(), None);
    disk.answer(Ok(0));
    assert_eq!(disk.outcome(), Some((OK, 1)));
}

#[test]
fn zeroes_are_made_by_the_best_way_that_the_image_allows() {
    let mut disk = Fixture::new(true);
    let (offset, len) = (512, 200 << 10);
    disk.begin_range(
        VIRTIO_BLK_T_WRITE_ZEROES,
        1,
        400,
        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
    );
    assert_eq!(disk.pushed().0, punch(offset, len));
    disk.refuse(libc::EOPNOTSUPP);
    let zero_range = Operation::Allocate {
        mode: libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        offset,
        len,
    };
    assert_eq!(disk.pushed().0, zero_range);
    disk.refuse(libc::EOPNOTSUPP);
    let write = |done| Operation::WriteZeroes {
        offset: offset + done,
        len: len - done,
    };
    assert_eq!(disk.pushed().0, write(0));
    disk.answer(Ok(65536));
    assert_eq!(disk.pushed().0, write(65536));
    disk.answer(Ok((len - 65536) as u32));
    assert_eq!(disk.outcome(), Some((OK, 1)));
    // What failed is not tried again.
    for flags in [0, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP] {
        disk.begin_range(VIRTIO_BLK_T_WRITE_ZEROES, 1, 400, flags);
        assert_eq!(disk.pushed().0, write(0));
        disk.refuse(libc::EIO);
        assert_eq!(disk.outcome(), Some((IOERR, 1)));
    }
}

#[test]
fn storage_is_kept_where_the_driver_does_not_allow_to_give_it_back() {
    let mut disk = Fixture::new(true);
    disk.begin_range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 0);
    let (operation, _) = disk.pushed();
    assert!(
        matches!(operation, Operation::Allocate { mode, .. } if mode & libc::FALLOC_FL_PUNCH_HOLE == 0),
        "{operation:?}"
    );
}

#[test]
fn a_discard_that_the_image_does_not_know_succeeds_and_any_other_failure_does_not() {
    for (errno, status) in [(libc::EOPNOTSUPP, OK), (libc::EIO, IOERR)] {
        let mut disk = Fixture::new(true);
        disk.begin_range(VIRTIO_BLK_T_DISCARD, 1, 8, 0);
        assert_eq!(disk.pushed().0, punch(512, 4096));
        disk.refuse(errno);
        assert_eq!(disk.outcome(), Some((status, 1)));
    }
}

#[test]
fn what_is_in_flight_is_awaited_before_its_buffers_go() {
    let mut disk = Fixture::new(true);
    disk.begin(VIRTIO_BLK_T_IN, 0, 512, true);
    let Fixture {
        in_flight, script, ..
    } = disk;
    assert!(!script.lock().unwrap().drained);
    drop(in_flight);
    assert!(script.lock().unwrap().drained);
}

#[test]
fn the_table_takes_as_many_requests_as_it_has_room_for() {
    let mut disk = Fixture::new(true);
    for _ in 0..4 {
        assert!(disk.in_flight.has_room());
        disk.begin(VIRTIO_BLK_T_FLUSH, 0, 0, false);
    }
    assert!(!disk.in_flight.has_room());
    disk.begin(VIRTIO_BLK_T_FLUSH, 0, 0, false);
    assert_eq!(disk.script.lock().unwrap().pushed.len(), 4);
    disk.script.lock().unwrap().pushed.clear();
    disk.answer(Ok(0));
    assert!(disk.in_flight.has_room());
    assert_eq!(disk.outcome(), Some((OK, 1)));
}
