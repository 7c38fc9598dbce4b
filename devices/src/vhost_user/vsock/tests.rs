//! A hypervisor that is not one: it brings shared memory and rings over the vhost-user socket.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend};

use super::*;

const CID: u64 = 77;
const SIZE: u16 = 16;
const PATIENCE: Duration = Duration::from_secs(30);
const OP_REQUEST: u16 = 1;
const OP_RESPONSE: u16 = 2;
const OP_RW: u16 = 5;

/// The three parts and the buffers of queue `index`.
fn layout(index: u64) -> [u64; 4] {
    let base = 0x10_0000 * (index + 1);
    [base, base + 0x1000, base + 0x2000, base + 0x3000]
}

struct Machine {
    frontend: Frontend,
    memory: GuestMemoryMmap,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    made_available: [u16; 2],
    used: [u16; 2],
}

impl Machine {
    fn start(path: &std::path::Path) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 << 20).unwrap();
        let offset = FileOffset::new(File::from(file.as_fd().try_clone_to_owned().unwrap()), 0);
        let ranges = [(GuestAddress(0), 16 << 20, Some(offset))];
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
        let mut frontend = Frontend::connect(path, NUM_QUEUES as u64).unwrap();
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        assert_ne!(features & 1 << VIRTIO_F_VERSION_1, 0);
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        frontend
            .set_features(features & !(1 << VIRTIO_RING_F_EVENT_IDX))
            .unwrap();
        let region = memory.iter().next().unwrap();
        let info = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        frontend.set_mem_table(&[info]).unwrap();
        let new_event = |_| EventFd::new(EFD_NONBLOCK).unwrap();
        let mut machine = Self {
            frontend,
            kicks: (0..2).map(new_event).collect(),
            calls: (0..2).map(new_event).collect(),
            made_available: [0; 2],
            used: [0; 2],
            memory,
        };
        for index in 0..2 {
            machine.set_up(index);
        }
        machine
    }

    fn set_up(&mut self, index: usize) {
        let host = self.memory.iter().next().unwrap().as_ptr() as u64;
        let [desc, avail, used, _] = layout(index as u64).map(|addr| host + addr);
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, SIZE).unwrap();
        frontend.set_vring_base(index, 0).unwrap();
        let config = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: desc,
            used_ring_addr: used,
            avail_ring_addr: avail,
            log_addr: None,
        };
        frontend.set_vring_addr(index, &config).unwrap();
        frontend.set_vring_call(index, &self.calls[index]).unwrap();
        frontend.set_vring_kick(index, &self.kicks[index]).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
    }

    /// Makes buffer `slot` of a queue available.
    fn submit(&mut self, index: usize, slot: u16, len: u32) {
        let [desc, avail, _, buffers] = layout(index as u64);
        let flags = if index == 0 { VRING_DESC_F_WRITE } else { 0 };
        let addr = buffers + u64::from(slot) * 4096;
        let descriptor = Descriptor::new(addr, len, flags as u16, 0);
        let put = |addr, value: u16| {
            self.memory
                .write_obj(value.to_le(), GuestAddress(addr))
                .unwrap();
        };
        self.memory
            .write_obj(descriptor, GuestAddress(desc + u64::from(slot) * 16))
            .unwrap();
        let next = self.made_available[index];
        put(avail + 4 + u64::from(next % SIZE) * 2, slot);
        std::sync::atomic::fence(Ordering::SeqCst);
        put(avail + 2, next + 1);
        self.made_available[index] = next + 1;
        self.kicks[index].write(1).unwrap();
    }

    fn send(&mut self, slot: u16, header: &[u8], data: &[u8]) {
        let addr = layout(1)[3] + u64::from(slot) * 4096;
        let bytes = [header, data].concat();
        self.memory.write_slice(&bytes, GuestAddress(addr)).unwrap();
        self.submit(1, slot, bytes.len() as u32);
    }

    /// The next packet, once the call eventfd said so.
    fn receive(&mut self) -> Vec<u8> {
        let [_, _, used, buffers] = layout(0);
        let deadline = Instant::now() + PATIENCE;
        let index = || -> u16 { self.memory.read_obj(GuestAddress(used + 2)).unwrap() };
        while index() == self.used[0] {
            assert!(Instant::now() < deadline, "no packet came");
            let mut call = [PollFd::from_borrowed_fd(
                // SAFETY: the eventfd is open while `self` lives.
                unsafe { std::os::fd::BorrowedFd::borrow_raw(self.calls[0].as_raw_fd()) },
                PollFlags::IN,
            )];
            let timeout = rustix::event::Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            if poll(&mut call, Some(&timeout)).unwrap() > 0 {
                self.calls[0].read().unwrap();
            }
        }
        let at = used + 4 + u64::from(self.used[0] % SIZE) * 8;
        let [head, len]: [u32; 2] = self.memory.read_obj(GuestAddress(at)).unwrap();
        self.used[0] += 1;
        let mut bytes = vec![0; len as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(buffers + u64::from(head) * 4096))
            .unwrap();
        bytes
    }
}

fn op(packet: &[u8]) -> u16 {
    u16::from_le_bytes([packet[30], packet[31]])
}

/// The header of an answer to `packet`.
fn answer(packet: &[u8], op: u16, len: u32) -> Vec<u8> {
    let mut header = packet[..44].to_vec();
    let (sources, targets) = (packet[0..8].to_vec(), packet[8..16].to_vec());
    header[0..8].copy_from_slice(&targets);
    header[8..16].copy_from_slice(&sources);
    let (source, target) = (packet[16..20].to_vec(), packet[20..24].to_vec());
    header[16..20].copy_from_slice(&target);
    header[20..24].copy_from_slice(&source);
    header[24..28].copy_from_slice(&len.to_le_bytes());
    header[30..32].copy_from_slice(&op.to_le_bytes());
    header[36..40].copy_from_slice(&65_536u32.to_le_bytes());
    header[40..44].fill(0);
    header
}

fn served(directory: &tempfile::TempDir) -> (std::path::PathBuf, VhostUserVsock, VsockHandle) {
    let path = directory.path().join("vhost");
    let listener = UnixListener::bind(&path).unwrap();
    let (vsock, handle) = VhostUserVsock::serve(listener, VsockConfig::new(CID)).unwrap();
    (path, vsock, handle)
}

fn talk(machine: &mut Machine, handle: &VsockHandle) {
    for slot in 0..4 {
        machine.submit(0, slot, 4096);
    }
    let mut stream = handle.connect(80).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"to the guest").unwrap();
    let request = machine.receive();
    assert_eq!(op(&request), OP_REQUEST);
    assert_eq!(request[8..16], CID.to_le_bytes());
    machine.send(0, &answer(&request, OP_RESPONSE, 0), &[]);
    let packet = machine.receive();
    assert_eq!((op(&packet), &packet[44..]), (OP_RW, &b"to the guest"[..]));
    machine.send(1, &answer(&request, OP_RW, 11), b"to the host");
    let mut data = [0; 11];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"to the host");
    // The machine stops: the connection ends.
    machine.frontend.get_vring_base(0).unwrap();
    machine.frontend.get_vring_base(1).unwrap();
    assert_eq!(stream.read(&mut data).unwrap(), 0);
}

#[test]
fn one_machine_after_the_other_is_reached_through_the_same_handle() {
    let directory = tempfile::tempdir().unwrap();
    let (path, vsock, handle) = served(&directory);
    for _ in 0..2 {
        let mut machine = Machine::start(&path);
        talk(&mut machine, &handle);
    }
    drop(vsock);
    assert_eq!(
        handle.connect(80).unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
}

#[test]
fn the_configuration_is_the_context_id() {
    let directory = tempfile::tempdir().unwrap();
    let (path, _vsock, _handle) = served(&directory);
    let mut machine = Machine::start(&path);
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = machine.frontend.get_config(0, 8, flags, &[0; 8]).unwrap();
    assert_eq!(config, CID.to_le_bytes());
}

#[test]
fn dropping_the_device_ends_a_running_machines_connection() {
    let directory = tempfile::tempdir().unwrap();
    let (path, vsock, handle) = served(&directory);
    let machine = Machine::start(&path);
    drop(vsock);
    assert!(handle.connect(1).is_err());
    assert!(machine.frontend.get_features().is_err());
}

#[test]
fn a_peer_that_speaks_nonsense_is_dropped_and_the_next_one_served() {
    let directory = tempfile::tempdir().unwrap();
    let (path, _vsock, handle) = served(&directory);
    for nonsense in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 4096]] {
        let mut peer = std::os::unix::net::UnixStream::connect(&path).unwrap();
        // The other side may be gone before all of it is written.
        let _ = peer.write_all(nonsense);
    }
    let mut machine = Machine::start(&path);
    talk(&mut machine, &handle);
}

#[test]
fn a_ring_that_cannot_be_right_stops_the_device_without_spinning() {
    let directory = tempfile::tempdir().unwrap();
    let (path, _vsock, handle) = served(&directory);
    let machine = Machine::start(&path);
    let avail = layout(1)[1];
    machine
        .memory
        .write_obj(5000u16, GuestAddress(avail + 2))
        .unwrap();
    machine.kicks[1].write(1).unwrap();
    // It still takes commands in, and a machine that starts over is served.
    drop(handle.connect(9).unwrap());
    drop(machine);
    let mut machine = Machine::start(&path);
    talk(&mut machine, &handle);
}
