//! The disk behind its registers and rings, on both engines and on real files.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::FromRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::time::Duration;

use tempfile::TempDir;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::disk::{DiskError, open_image};
use super::*;
use crate::testing::{Buffer, HIGH_REGION, INDIRECT, MockDriver, NEXT, PATIENCE, WRITE};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
const SERIAL: &str = "serial-of-20-letters";
const MIB: usize = 1 << 20;

/// A small xorshift generator: tests have to be repeatable.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let words = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes());
        words.take(len).collect()
    }
}

/// Runs a test on threads and, where this host has it, on io_uring.
fn on_each_engine(test: impl Fn(EngineKind)) {
    test(EngineKind::Threads);
    test(EngineKind::Auto);
}

fn config(file: File) -> BlockConfig {
    BlockConfig {
        file,
        read_only: false,
        serial: SERIAL.to_owned(),
        queues: 1,
    }
}

fn image_of(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

/// A file that lives in memory: its filesystem punches holes but knows no ZERO_RANGE.
fn memory_file(content: &[u8]) -> File {
    // SAFETY: the name is a C string; the result is checked and owned by nobody else.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"image".as_ptr(), libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0, "memfd_create");
        File::from_raw_fd(fd)
    };
    file.write_all(content).unwrap();
    file
}

struct Fixture {
    driver: MockDriver,
    file: File,
    stats: Arc<BlockStats>,
    /// Two pages for headers, statuses and ranges.
    scratch: u64,
}

impl Fixture {
    fn new(engine: EngineKind, content: &[u8]) -> Self {
        Self::with(engine, config(image_of(content)), u64::MAX)
    }

    fn with(engine: EngineKind, config: BlockConfig, features: u64) -> Self {
        let file = config.file.try_clone().unwrap();
        let block = Block::with_engine(config, engine).unwrap();
        let stats = block.stats().remove(0);
        let mut driver = MockDriver::started_with(Box::new(block), features);
        let scratch = driver.alloc(8192);
        Self {
            driver,
            file,
            stats,
            scratch,
        }
    }

    fn content(&self) -> Vec<u8> {
        let mut content = vec![0; self.file.metadata().unwrap().len() as usize];
        self.file.read_exact_at(&mut content, 0).unwrap();
        content
    }

    /// Header, `data`, status; gives the status and the used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let (header, status) = (self.scratch, self.scratch + 16);
        self.driver.write(header, &header_bytes(kind, sector));
        self.driver.write(status, &[0xee]);
        let mut buffers = vec![Buffer::readable(header, 16)];
        buffers.extend_from_slice(data);
        buffers.push(Buffer::writable(status, 1));
        let len = self.driver.request(0, &buffers);
        (self.driver.read(status, 1)[0], len)
    }

    fn read(&mut self, sector: u64, len: usize) -> (u8, Vec<u8>) {
        let data = self.driver.alloc(len as u64);
        let (status, _) = self.request(
            VIRTIO_BLK_T_IN,
            sector,
            &[Buffer::writable(data, len as u32)],
        );
        (status, self.driver.read(data, len))
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        let addr = self.driver.alloc_with(data);
        let buffer = Buffer::readable(addr, data.len() as u32);
        self.request(VIRTIO_BLK_T_OUT, sector, &[buffer]).0
    }

    fn range(&mut self, kind: u32, sector: u64, count: u32, flags: u32) -> u8 {
        let range = self.scratch + 64;
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        self.driver.write(range, &bytes);
        self.request(kind, 0, &[Buffer::readable(range, 16)]).0
    }

    /// Submits raw descriptors 0.. with head 0 and gives the used length.
    fn raw(&mut self, descriptors: &[Descriptor]) -> u32 {
        self.driver.submit_raw(0, descriptors, 0);
        self.driver.notify(0);
        let used = self.driver.wait_used(0);
        assert_eq!(used.head, 0);
        used.len
    }

    /// A correct read in raw descriptors: the device still works.
    fn assert_alive(&mut self) {
        let (header, status) = (self.scratch, self.scratch + 16);
        self.driver.write(header, &header_bytes(VIRTIO_BLK_T_IN, 0));
        self.driver.write(status, &[0xee]);
        let len = self.raw(&[
            Descriptor::new(header, 16, NEXT, 1),
            Descriptor::new(self.scratch + 4096, 512, NEXT | WRITE, 2),
            Descriptor::new(status, 1, WRITE, 0),
        ]);
        assert_eq!((len, self.driver.read(status, 1)[0]), (513, OK));
        assert_eq!(
            self.driver.status() & NEEDS_RESET,
            0,
            "the device asks for a reset"
        );
    }
}

const NEEDS_RESET: u32 = virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;

fn header_bytes(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

#[test]
fn sectors_are_read_and_written_where_they_belong() {
    on_each_engine(|engine| {
        let content = Random(7).bytes(MIB);
        let mut disk = Fixture::new(engine, &content);
        assert_eq!(disk.read(3, 2048), (OK, content[1536..3584].to_vec()));
        let new = Random(8).bytes(4096);
        assert_eq!(disk.write(2040, &new), OK);
        let mut expected = content.clone();
        expected[2040 * 512..].copy_from_slice(&new);
        assert!(disk.content() == expected, "{engine:?}: wrong bytes");
        assert_eq!(disk.stats.bytes_read(), 2048);
        assert_eq!(disk.stats.bytes_written(), 4096);
        assert_eq!((disk.stats.reads(), disk.stats.writes()), (1, 1));
        assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
        assert_eq!(disk.stats.flushes(), 1);
        assert_eq!((disk.stats.requests(), disk.stats.errors()), (3, 0));
    });
}

#[test]
fn the_used_length_counts_what_was_written_into_the_chain() {
    let mut disk = Fixture::new(EngineKind::Auto, &[1; 8192]);
    let data = disk.driver.alloc(4096);
    let read = disk.request(VIRTIO_BLK_T_IN, 0, &[Buffer::writable(data, 4096)]);
    assert_eq!(read, (OK, 4097));
    let write = disk.request(VIRTIO_BLK_T_OUT, 0, &[Buffer::readable(data, 4096)]);
    assert_eq!(write, (OK, 1));
}

#[test]
fn a_request_may_be_cut_into_any_pieces() {
    on_each_engine(|engine| {
        let content = Random(9).bytes(64 << 10);
        let mut disk = Fixture::new(engine, &content);
        let at = disk.driver.alloc(8192);
        disk.driver.write(at, &header_bytes(VIRTIO_BLK_T_IN, 1));
        // The header in three pieces, the data in odd ones and in both regions of memory, the
        // status at the end of the last piece of data, empty buffers between.
        let pieces = [
            Buffer::readable(at, 3),
            Buffer::readable(at + 3, 0),
            Buffer::readable(at + 3, 9),
            Buffer::readable(at + 12, 4),
            Buffer::writable(at + 100, 1),
            Buffer::writable(HIGH_REGION + 77, 500),
            Buffer::writable(at + 101, 0),
            Buffer::writable(at + 200, 524),
        ];
        for indirect in [false, true] {
            disk.driver.write(at + 200, &[0xee; 524]);
            let head = if indirect {
                disk.driver.submit_indirect(0, &pieces)
            } else {
                disk.driver.submit(0, &pieces)
            };
            disk.driver.kick(0);
            let used = disk.driver.wait_used(0);
            assert_eq!((used.head, used.len), (head, 1025), "indirect: {indirect}");
            let mut read = disk.driver.read(at + 100, 1);
            read.extend(disk.driver.read(HIGH_REGION + 77, 500));
            read.extend(disk.driver.read(at + 200, 524));
            assert_eq!(read.pop(), Some(OK));
            assert!(read == content[512..1536], "{engine:?}: wrong bytes");
        }
    });
}

#[test]
fn a_buffer_across_the_end_of_memory_or_in_the_hole_is_refused() {
    let mut disk = Fixture::new(EngineKind::Auto, &[1; 8192]);
    let end = crate::testing::REGION_SIZE as u64;
    let before = disk.driver.read(end - 256, 256);
    for addr in [
        end - 256,
        end,
        HIGH_REGION - 512,
        HIGH_REGION - 1,
        HIGH_REGION + end - 1,
        u64::MAX - 100,
        u64::MAX,
    ] {
        let buffer = Buffer::writable(addr, 512);
        let (status, len) = disk.request(VIRTIO_BLK_T_IN, 0, &[buffer]);
        assert_eq!((status, len), (0xee, 0), "{addr:#x}");
    }
    assert_eq!(disk.driver.read(end - 256, 256), before);
    assert_eq!(disk.read(0, 512).0, OK);
}

#[test]
fn many_requests_in_flight_keep_the_data_whole() {
    const AREAS: u64 = 64;
    const AREA: u64 = 64 << 10;
    on_each_engine(|engine| {
        let mut random = Random(0x1234_5678);
        let mut model = random.bytes((AREAS * AREA) as usize);
        let mut disk = Fixture::new(engine, &model);
        let headers = disk.driver.alloc(AREAS * 32);
        let data = disk.driver.alloc(AREAS * AREA);
        for round in 0..40 {
            // One request per area, so that none overlap; each may be anywhere in its area.
            let mut expected = Vec::new();
            let mut heads = Vec::new();
            for area in 0..AREAS {
                let sectors = 1 + random.below(AREA / 512);
                let first = area * AREA / 512 + random.below(AREA / 512 - sectors + 1);
                let (from, len) = ((first * 512) as usize, (sectors * 512) as usize);
                let (header, buffer) = (headers + area * 32, data + area * AREA);
                let kind = if random.below(2) == 0 {
                    let new = random.bytes(len);
                    disk.driver.write(buffer, &new);
                    model[from..from + len].copy_from_slice(&new);
                    VIRTIO_BLK_T_OUT
                } else {
                    expected.push((buffer, from, len));
                    VIRTIO_BLK_T_IN
                };
                disk.driver.write(header, &header_bytes(kind, first));
                disk.driver.write(header + 16, &[0xee]);
                let chain = [
                    Buffer::readable(header, 16),
                    Buffer {
                        addr: buffer,
                        len: len as u32,
                        writable: kind == VIRTIO_BLK_T_IN,
                    },
                    Buffer::writable(header + 16, 1),
                ];
                heads.push(disk.driver.submit(0, &chain));
                if random.below(8) == 0 {
                    disk.driver.kick(0);
                }
            }
            disk.driver.kick(0);
            for _ in 0..AREAS {
                let used = disk.driver.wait_used(0);
                let at = heads.iter().position(|&head| head == used.head);
                heads.swap_remove(at.expect("a chain is used once"));
            }
            for area in 0..AREAS {
                let status = disk.driver.read(headers + area * 32 + 16, 1)[0];
                assert_eq!(status, OK, "{engine:?}, round {round}, area {area}");
            }
            for (buffer, from, len) in expected {
                assert!(
                    disk.driver.read(buffer, len) == model[from..from + len],
                    "{engine:?}, round {round}: wrong bytes read at {from}"
                );
            }
        }
        assert!(disk.content() == model, "{engine:?}: wrong bytes on disk");
    });
}

#[test]
fn a_ring_full_of_indirect_requests_is_served() {
    on_each_engine(|engine| {
        let mut disk = Fixture::new(engine, &[5; MIB]);
        let data = disk.driver.alloc(u64::from(QUEUE_SIZE) * 512);
        let statuses = disk.driver.alloc(QUEUE_SIZE.into());
        let header = disk.driver.alloc_with(&header_bytes(VIRTIO_BLK_T_IN, 8));
        for round in 0..3 {
            disk.driver.write(statuses, &vec![0xee; QUEUE_SIZE.into()]);
            for i in 0..u64::from(QUEUE_SIZE) {
                let chain = [
                    Buffer::readable(header, 16),
                    Buffer::writable(data + i * 512, 512),
                    Buffer::writable(statuses + i, 1),
                ];
                disk.driver.submit_indirect(0, &chain);
            }
            disk.driver.kick(0);
            for _ in 0..QUEUE_SIZE {
                assert_eq!(disk.driver.wait_used(0).len, 513, "{engine:?} {round}");
            }
            let statuses = disk.driver.read(statuses, QUEUE_SIZE.into());
            assert!(statuses.iter().all(|&status| status == OK), "{engine:?}");
        }
    });
}

#[test]
fn a_driver_without_event_idx_or_flush_is_served_too() {
    on_each_engine(|engine| {
        let mut disk = Fixture::with(engine, config(image_of(&[0; 64 << 10])), 0);
        assert_eq!(disk.driver.features(), 1 << 32);
        for sector in 0..100 {
            assert_eq!(disk.write(sector, &[sector as u8; 512]), OK);
        }
        assert_eq!(
            disk.range(VIRTIO_BLK_T_WRITE_ZEROES, 10, 5, 0),
            OK,
            "{engine:?}"
        );
        let content = disk.content();
        assert_eq!(content[9 * 512], 9);
        assert_eq!(content[10 * 512..15 * 512], [0; 5 * 512]);
        assert_eq!(content[99 * 512], 99);
    });
}

#[test]
fn queues_work_beside_each_other() {
    on_each_engine(|engine| {
        const QUEUES: usize = 4;
        let content = Random(3).bytes(MIB);
        let mut config = config(image_of(&content));
        config.queues = QUEUES as u16;
        let mut disk = Fixture::with(engine, config, u64::MAX);
        let data = disk.driver.alloc(QUEUES as u64 * 4096);
        for queue in 0..QUEUES {
            let at = queue as u64;
            let header = disk
                .driver
                .alloc_with(&header_bytes(VIRTIO_BLK_T_IN, at * 8));
            let chain = [
                Buffer::readable(header, 16),
                Buffer::writable(data + at * 4096, 4096),
                Buffer::writable(header + 16, 1),
            ];
            disk.driver.submit(queue, &chain);
        }
        for queue in (0..QUEUES).rev() {
            disk.driver.kick(queue);
        }
        // All queues share one interrupt, so each wait may take in another one's.
        let mut open: Vec<_> = (0..QUEUES).collect();
        while !open.is_empty() {
            open.retain(|&queue| disk.driver.pop_used(queue).is_none());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(disk.driver.read(data, QUEUES * 4096) == content[..QUEUES * 4096]);
    });
}

#[test]
fn a_flush_succeeds_on_every_engine() {
    on_each_engine(|engine| {
        let mut disk = Fixture::new(engine, &[0; 4096]);
        assert_eq!(disk.write(0, &[1; 512]), OK);
        assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    });
}

#[test]
fn the_serial_number_is_returned_as_far_as_there_is_room() {
    let mut disk = Fixture::new(EngineKind::Auto, &[0; 4096]);
    for room in [20, 25, 8] {
        let id = disk.driver.alloc(64);
        let reply = disk.request(VIRTIO_BLK_T_GET_ID, 0, &[Buffer::writable(id, room)]);
        let len = room.min(20);
        assert_eq!(reply, (OK, len + 1));
        let mut expected = SERIAL.as_bytes()[..len as usize].to_vec();
        expected.resize(64, 0);
        assert_eq!(disk.driver.read(id, 64), expected);
    }
    assert_eq!(disk.request(VIRTIO_BLK_T_GET_ID, 0, &[]), (OK, 1));
}

#[test]
fn zeroed_ranges_read_as_zeroes_and_nothing_else_changes() {
    on_each_engine(|engine| {
        for make in [image_of, memory_file] {
            let mut expected = vec![0xab; MIB];
            let mut disk = Fixture::with(engine, config(make(&expected)), u64::MAX);
            let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
            let ranges = [
                (101, 300, 0),
                (501, 7, unmap),
                (1024, 1024, 0),
                (600, 0, 0),
                (2048, 0, 0),
            ];
            for (sector, count, flags) in ranges {
                let status = disk.range(VIRTIO_BLK_T_WRITE_ZEROES, sector, count, flags);
                assert_eq!(status, OK, "{engine:?}, {sector}+{count}");
                expected[sector as usize * 512..][..count as usize * 512].fill(0);
            }
            assert!(disk.content() == expected, "{engine:?}: wrong bytes");
        }
    });
}

#[test]
fn a_discard_gives_storage_back_and_changes_nothing_else() {
    on_each_engine(|engine| {
        // A file in memory, because not every filesystem can give storage back.
        let mut expected = vec![0xab; MIB];
        let mut disk = Fixture::with(engine, config(memory_file(&expected)), u64::MAX);
        let before = disk.file.metadata().unwrap().blocks();
        assert_eq!(disk.range(VIRTIO_BLK_T_DISCARD, 8, 1024, 0), OK);
        assert_eq!(disk.range(VIRTIO_BLK_T_DISCARD, 2048, 0, 0), OK);
        expected[8 * 512..][..1024 * 512].fill(0);
        assert!(disk.content() == expected, "{engine:?}: wrong bytes");
        assert_eq!(disk.file.metadata().unwrap().blocks(), before - 1024);
    });
}

#[test]
fn ranges_past_the_end_or_with_unknown_flags_are_refused() {
    let mut disk = Fixture::new(EngineKind::Auto, &[0xab; 64 << 10]);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        for (sector, count) in [
            (127, 2),
            (128, 1),
            (0, u32::MAX),
            (0, 129),
            (u64::MAX, 1),
            (u64::MAX - 3, 8),
            (1 << 55, 0),
        ] {
            let status = disk.range(kind, sector, count, 0);
            assert_eq!(status, IOERR, "type {kind}, {sector}+{count}");
        }
        assert_eq!(disk.range(kind, 0, 1, 2), UNSUPP);
        assert_eq!(disk.range(kind, 0, 1, u32::MAX), UNSUPP);
        for len in [0, 8, 15, 17, 32] {
            let range = Buffer::readable(disk.scratch + 64, len);
            assert_eq!(disk.request(kind, 0, &[range]).0, IOERR, "{len} bytes");
        }
    }
    assert_eq!(disk.range(VIRTIO_BLK_T_DISCARD, 0, 1, 1), UNSUPP);
    assert_eq!(disk.content(), vec![0xab; 64 << 10]);
}

#[test]
fn reads_and_writes_past_the_end_or_of_odd_length_fail_and_change_nothing() {
    on_each_engine(|engine| {
        // The tail of 100 bytes is no sector.
        let content = vec![0xab; (64 << 10) + 100];
        let mut disk = Fixture::new(engine, &content);
        let data = disk.driver.alloc(4096);
        for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
            for (sector, len) in [
                (127, 1024),
                (128, 512),
                (u64::MAX, 512),
                (u64::MAX, 1024),
                (u64::MAX / 512, 512),
                (1 << 55, 512),
                (0, 511),
                (0, 1),
                (0, 513),
            ] {
                let buffer = Buffer {
                    addr: data,
                    len,
                    writable: kind == VIRTIO_BLK_T_IN,
                };
                let status = disk.request(kind, sector, &[buffer]).0;
                assert_eq!(status, IOERR, "{engine:?} type {kind} {sector}+{len}");
            }
            assert_eq!(disk.request(kind, 128, &[]).0, OK, "nothing at the end");
            assert_eq!(disk.request(kind, 129, &[]).0, IOERR);
        }
        assert!(disk.content() == content);
        assert_eq!(disk.driver.read(data, 4096), vec![0; 4096]);
    });
}

#[test]
fn a_read_only_disk_refuses_what_would_change_it() {
    let mut config = config(image_of(&[0xab; 4096]));
    config.read_only = true;
    let mut disk = Fixture::with(EngineKind::Auto, config, u64::MAX);
    let offered = disk.driver.features();
    assert_ne!(offered & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(
        offered & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES),
        0
    );
    assert_eq!(disk.write(0, &[1; 512]), IOERR);
    assert_eq!(disk.range(VIRTIO_BLK_T_DISCARD, 0, 1, 0), IOERR);
    assert_eq!(disk.range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 0), IOERR);
    assert_eq!(disk.read(0, 512), (OK, vec![0xab; 512]));
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    assert_eq!(disk.content(), vec![0xab; 4096]);
}

#[test]
fn unknown_request_types_are_unsupported() {
    let mut disk = Fixture::new(EngineKind::Auto, &[0; 4096]);
    for kind in [2, 3, 5, 14, 15, 0x8000_0000, u32::MAX] {
        assert_eq!(disk.request(kind, 0, &[]), (UNSUPP, 1), "type {kind}");
    }
    assert_eq!(disk.stats.errors(), 7);
}

#[test]
fn a_host_that_refuses_the_write_gives_the_guest_an_error_and_no_more() {
    on_each_engine(|engine| {
        let file = memory_file(&[0xab; 64 << 10]);
        rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::WRITE).unwrap();
        let mut disk = Fixture::with(engine, config(file), u64::MAX);
        assert_eq!(disk.write(0, &[1; 4096]), IOERR, "{engine:?}");
        assert_eq!(disk.range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 0), IOERR);
        assert_eq!(disk.range(VIRTIO_BLK_T_DISCARD, 0, 8, 0), IOERR);
        assert_eq!(disk.read(0, 512), (OK, vec![0xab; 512]));
    });
}

#[test]
fn an_image_that_shrinks_under_the_guest_reads_as_an_error() {
    on_each_engine(|engine| {
        let mut disk = Fixture::new(engine, &[0xab; 64 << 10]);
        disk.file.set_len(1024).unwrap();
        // Half of it is there.
        assert_eq!(disk.read(1, 1024).0, IOERR, "{engine:?}");
        assert_eq!(disk.read(64, 512).0, IOERR, "{engine:?}");
        assert_eq!(disk.read(0, 1024), (OK, vec![0xab; 1024]));
    });
}

#[test]
fn chains_that_cannot_be_right_are_given_back_and_the_device_lives() {
    on_each_engine(|engine| {
        let mut disk = Fixture::new(engine, &[0xab; 64 << 10]);
        let (s, data) = (disk.scratch, disk.scratch + 4096);
        disk.driver.write(s, &header_bytes(VIRTIO_BLK_T_IN, 0));
        let header = |flags, next| Descriptor::new(s, 16, flags, next);
        let table = disk.driver.alloc(4096);
        let mut nested = vec![];
        for _ in 0..4 {
            nested.extend(table.to_le_bytes());
            nested.extend(64u32.to_le_bytes());
            nested.extend(INDIRECT.to_le_bytes());
            nested.extend(0u16.to_le_bytes());
        }
        disk.driver.write(table, &nested);
        let cases: &[(&str, Vec<Descriptor>)] = &[
            ("a chain that is a loop", vec![header(NEXT, 0)]),
            (
                "a loop of two",
                vec![header(NEXT, 1), Descriptor::new(data, 512, NEXT | WRITE, 0)],
            ),
            (
                "a writable loop",
                vec![header(NEXT, 1), Descriptor::new(data, 512, NEXT | WRITE, 1)],
            ),
            ("a jump out of the table", vec![header(NEXT, QUEUE_SIZE)]),
            ("a jump far out of the table", vec![header(NEXT, 0xffff)]),
            ("no status at all", vec![header(0, 0)]),
            (
                "a status that is read-only",
                vec![
                    header(NEXT, 1),
                    Descriptor::new(data, 512, NEXT, 2),
                    Descriptor::new(s + 16, 1, 0, 0),
                ],
            ),
            (
                "a status of no bytes",
                vec![header(NEXT, 1), Descriptor::new(s + 16, 0, WRITE, 0)],
            ),
            ("an empty chain", vec![Descriptor::new(s, 0, 0, 0)]),
            (
                "a readable buffer after a writable one",
                vec![
                    Descriptor::new(s + 16, 1, NEXT | WRITE, 1),
                    Descriptor::new(s, 16, 0, 0),
                ],
            ),
            (
                "an indirect table in an indirect table",
                vec![Descriptor::new(table, 64, INDIRECT, 0)],
            ),
            (
                "an indirect table of no entries",
                vec![Descriptor::new(table, 0, INDIRECT, 0)],
            ),
            (
                "an indirect table of odd length",
                vec![Descriptor::new(table, 24, INDIRECT, 0)],
            ),
            (
                "an indirect table that is too long",
                vec![Descriptor::new(table, 0xffff_fff0, INDIRECT, 0)],
            ),
            (
                "an indirect table outside of memory",
                vec![Descriptor::new(u64::MAX - 15, 64, INDIRECT, 0)],
            ),
            (
                "a chain longer than 4 GiB",
                vec![
                    header(NEXT, 1),
                    Descriptor::new(data, u32::MAX, NEXT | WRITE, 2),
                    Descriptor::new(s + 16, 1, WRITE, 0),
                ],
            ),
        ];
        for (case, descriptors) in cases {
            disk.driver.write(s + 16, &[0xee]);
            assert_eq!(disk.raw(descriptors), 0, "{engine:?}: {case}");
            assert_eq!(disk.driver.read(s + 16, 1), [0xee], "{engine:?}: {case}");
            disk.assert_alive();
        }
    });
}

#[test]
fn a_header_cut_short_is_an_error_with_a_status() {
    let mut disk = Fixture::new(EngineKind::Auto, &[0xab; 4096]);
    for len in [0, 1, 15] {
        let chain = [
            Buffer::readable(disk.scratch, len),
            Buffer::writable(disk.scratch + 16, 1),
        ];
        assert_eq!(disk.driver.request(0, &chain), 1);
        assert_eq!(disk.driver.read(disk.scratch + 16, 1), [IOERR]);
    }
}

#[test]
fn a_request_of_more_buffers_than_iovecs_is_refused() {
    let mut disk = Fixture::new(EngineKind::Auto, &[0xab; 4096]);
    let at = disk.scratch;
    disk.driver.write(at, &header_bytes(VIRTIO_BLK_T_IN, 0));
    let mut chain = vec![Buffer::readable(at, 16)];
    chain.resize(4000, Buffer::writable(at + 4096, 1));
    disk.driver.submit_indirect(0, &chain);
    disk.driver.kick(0);
    assert_eq!(disk.driver.wait_used(0).len, 0);
    disk.assert_alive();
}

type Spoil = fn(&mut MockDriver);

#[test]
fn a_ring_that_cannot_be_right_asks_for_a_reset_and_works_after_it() {
    on_each_engine(|engine| {
        let spoil: [(&str, Spoil); 3] = [
            ("an index that jumps past the ring", |driver| {
                driver.set_avail_idx(0, QUEUE_SIZE + 1);
            }),
            ("an index that goes back", |driver| {
                driver.set_avail_idx(0, 0xffff);
            }),
            ("a head outside of the table", |driver| {
                driver.make_available(0, QUEUE_SIZE);
            }),
        ];
        for (case, spoil) in spoil {
            let mut disk = Fixture::new(engine, &[0xab; 4096]);
            spoil(&mut disk.driver);
            disk.driver.notify(0);
            assert!(disk.driver.wait_needs_reset(PATIENCE), "{engine:?}: {case}");
            // A broken device is deaf, and does not spin on what it cannot read.
            disk.driver.notify(0);
            assert_eq!(disk.driver.pop_used(0), None, "{engine:?}: {case}");
            disk.driver.start(u64::MAX);
            assert_eq!(disk.read(0, 512), (OK, vec![0xab; 512]), "{case}");
        }
    });
}

#[test]
fn a_reset_while_busy_leaves_memory_alone_from_then_on() {
    on_each_engine(|engine| {
        let mut disk = Fixture::new(engine, &vec![0xab; 16 * MIB]);
        let header = disk.driver.alloc_with(&header_bytes(VIRTIO_BLK_T_IN, 0));
        let status = disk.driver.alloc(1);
        let len = MIB as u64;
        for round in 0..5 {
            for i in 0..64 {
                let chain = [
                    Buffer::readable(header, 16),
                    Buffer::writable(HIGH_REGION + i % 32 * len, len as u32),
                    Buffer::writable(status, 1),
                ];
                disk.driver.submit(0, &chain);
            }
            disk.driver.kick(0);
            disk.driver.reset();
            let clean = vec![0x5a; 32 * MIB];
            disk.driver.write(HIGH_REGION, &clean);
            std::thread::sleep(Duration::from_millis(20));
            assert!(
                disk.driver.read(HIGH_REGION, clean.len()) == clean,
                "{engine:?}, round {round}: I/O went on after the reset"
            );
            disk.driver.start(u64::MAX);
        }
        let (status, data) = disk.read(0, 4096);
        assert_eq!((status, data), (OK, vec![0xab; 4096]));
    });
}

#[test]
fn a_guest_that_never_stops_submitting_cannot_keep_the_device_from_a_reset() {
    on_each_engine(|engine| {
        let mut disk = Fixture::new(engine, &[0xab; 4096]);
        disk.assert_alive();
        // The chain at head 0 from then on, again and again, without waiting for its end.
        let (ring, memory) = (
            disk.driver.queue(0).avail_ring,
            disk.driver.memory().clone(),
        );
        memory
            .write_slice(&[0; QUEUE_SIZE as usize * 2], GuestAddress(ring + 4))
            .unwrap();
        let transport = disk.driver.transport().clone();
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = stop.clone();
        let used_ring = disk.driver.queue(0).used_ring;
        let guest = std::thread::spawn(move || {
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                let used: u16 = memory.read_obj(GuestAddress(used_ring + 2)).unwrap();
                let full = used.wrapping_add(QUEUE_SIZE);
                memory.write_obj(full, GuestAddress(ring + 2)).unwrap();
                crate::bus::BusDevice::write(&*transport, 0x50, &[0; 4]);
            }
        });
        while disk.stats.requests() < 1000 && disk.driver.status() & NEEDS_RESET == 0 {
            std::thread::yield_now();
        }
        disk.driver.reset();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        guest.join().unwrap();
    });
}

#[test]
fn dropping_a_busy_device_ends_its_threads() {
    on_each_engine(|engine| {
        let mut disk = Fixture::new(engine, &vec![0xab; MIB]);
        let header = disk.driver.alloc_with(&header_bytes(VIRTIO_BLK_T_IN, 0));
        for _ in 0..64 {
            let chain = [
                Buffer::readable(header, 16),
                Buffer::writable(HIGH_REGION, MIB as u32),
                Buffer::writable(header + 16, 1),
            ];
            disk.driver.submit(0, &chain);
        }
        disk.driver.kick(0);
        let transport = Arc::downgrade(disk.driver.transport());
        drop(disk);
        assert!(transport.upgrade().is_none());
    });
}

#[test]
fn the_configuration_space_describes_the_disk() {
    let mut config = config(image_of(&vec![0; 3 * 512 + 511]));
    config.queues = 3;
    let disk = Fixture::with(EngineKind::Auto, config, u64::MAX);
    let field = |at, len| {
        let mut bytes = disk.driver.config(at, len);
        bytes.resize(8, 0);
        u64::from_le_bytes(bytes.try_into().unwrap())
    };
    assert_eq!(field(0, 8), 3, "capacity, the odd tail left out");
    assert_eq!(field(12, 4), 254, "seg_max");
    assert_eq!(field(20, 4), 512, "blk_size");
    assert_eq!(field(24, 1), 3, "physical_block_exp");
    assert_eq!(field(34, 2), 3, "num_queues");
    assert_eq!(field(36, 4), 1 << 22, "max_discard_sectors");
    assert_eq!(field(48, 4), 1 << 22, "max_write_zeroes_sectors");
    assert_eq!(field(60, 8), 0, "past the end");
    assert_ne!(disk.driver.features() & 1 << VIRTIO_BLK_F_MQ, 0);
}

#[test]
fn impossible_configurations_are_refused() {
    let with = |change: fn(&mut BlockConfig)| {
        let mut config = config(image_of(&[0; 512]));
        change(&mut config);
        Block::new(config).unwrap_err()
    };
    assert!(matches!(with(|c| c.queues = 0), BlockError::BadQueues(0)));
    assert!(matches!(
        with(|c| c.queues = 257),
        BlockError::BadQueues(257)
    ));
    for serial in ["twenty-one-characters", "tab\there", "ümlaut"] {
        let mut config = config(image_of(&[0; 512]));
        config.serial = serial.to_owned();
        assert!(matches!(Block::new(config), Err(BlockError::BadSerial(s)) if s == serial));
    }
    assert!(matches!(
        with(|c| c.file = File::open("/dev/null").unwrap()),
        BlockError::Image(_)
    ));
}

#[test]
fn an_image_is_locked_against_a_second_machine() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk.img");
    fs::write(&path, [0; 4096]).unwrap();
    let writer = open_image(&path, false).unwrap();
    for read_only in [false, true] {
        let error = open_image(&path, read_only).unwrap_err();
        assert!(
            matches!(&error, DiskError::InUse(p) if *p == path),
            "{error}"
        );
        assert!(error.to_string().contains("in use by another machine"));
    }
    let duplicate = writer.try_clone().unwrap();
    drop(writer);
    assert!(open_image(&path, false).is_err(), "a duplicate holds it");
    drop(duplicate);
    let _reader = open_image(&path, true).unwrap();
    let _second = open_image(&path, true).unwrap();
    assert!(matches!(open_image(&path, false), Err(DiskError::InUse(_))));
}

#[test]
fn an_image_is_free_as_soon_as_its_machine_is_gone() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk.img");
    fs::write(&path, [7; 4096]).unwrap();
    on_each_engine(|engine| {
        for _ in 0..20 {
            let file = open_image(&path, false).unwrap();
            let mut disk = Fixture::with(engine, config(file), u64::MAX);
            assert_eq!(disk.read(0, 512).0, OK);
        }
    });
}

#[test]
fn an_image_that_may_not_be_opened_is_named_with_what_was_tried() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk.img");
    fs::write(&path, [7; 4096]).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    // On a thread of its own: the file system's view of a user belongs to a thread.
    let errors = std::thread::spawn(move || {
        // SAFETY: changes an id of this thread only; without privilege it does nothing, and then
        // the file's mode is in the way already.
        unsafe { libc::setfsuid(65534) };
        [true, false].map(|read_only| open_image(&path, read_only).unwrap_err())
    });
    let [reading, writing] = errors.join().unwrap();
    assert!(
        matches!(
            &reading,
            DiskError::Denied {
                access: "reading",
                ..
            }
        ),
        "{reading}"
    );
    assert!(
        matches!(
            &writing,
            DiskError::Denied {
                access: "reading and writing",
                ..
            }
        ),
        "{writing}"
    );
}

#[test]
fn what_is_no_disk_image_is_named() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    for read_only in [true, false] {
        let open = |name: &str| open_image(&path(name), read_only);
        assert!(matches!(open("absent"), Err(DiskError::Missing(_))));
        fs::write(path("empty"), []).unwrap();
        assert!(matches!(open("empty"), Err(DiskError::Empty(_))));
        fs::write(path("tiny"), [0; 511]).unwrap();
        assert!(matches!(open("tiny"), Err(DiskError::Empty(_))));
        assert!(matches!(
            open("."),
            Err(DiskError::NotADisk {
                kind: "a directory",
                ..
            })
        ));
        assert!(matches!(
            open_image("/dev/null".as_ref(), read_only),
            Err(DiskError::NotADisk {
                kind: "a character device",
                ..
            })
        ));
    }
    let fifo = path("fifo");
    let made = rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    );
    made.unwrap();
    assert!(matches!(
        open_image(&fifo, false),
        Err(DiskError::NotADisk { kind: "a pipe", .. })
    ));
}

#[test]
fn an_opened_image_does_not_carry_the_flag_it_was_opened_with() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk.img");
    fs::write(&path, [7; 4096]).unwrap();
    let mut file = open_image(&path, false).unwrap();
    assert!(
        !rustix::fs::fcntl_getfl(&file)
            .unwrap()
            .contains(rustix::fs::OFlags::NONBLOCK)
    );
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut disk = Fixture::with(EngineKind::Auto, config(file), u64::MAX);
    assert_eq!(disk.read(0, 4096), (OK, vec![7; 4096]));
}

#[test]
fn programs_of_random_bytes_leave_the_device_usable() {
    on_each_engine(|engine| {
        let mut random = Random(0xf00d);
        for _ in 0..60 {
            let config = config(image_of(&[0xab; 64 << 10]));
            let block = Block::with_engine(config, engine).unwrap();
            let program = random.bytes(2000);
            crate::testing::fuzz_device(Box::new(block), &program);
        }
    });
}
