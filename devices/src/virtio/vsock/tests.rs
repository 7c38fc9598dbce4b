//! A guest that speaks vsock, honest or not, against the whole device.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::packet::*;
use super::*;
use crate::testing::{Buffer, MockDriver, PATIENCE};

mod af_vsock;
mod flow;
mod hostile;
mod join;
mod lifecycle;
mod reserve;
mod scale;
mod uds;

const RX: usize = 0;
const TX: usize = 1;
const CID: u64 = 52;
const RX_BUFFER: u32 = 4096;
const TX_SLOTS: usize = 64;
const TX_SLOT: u64 = 64 << 10;

/// A guest's vsock driver, much like Linux's.
struct Guest {
    driver: MockDriver,
    handle: VsockHandle,
    /// Addresses of transmit buffers that are free.
    tx_free: Vec<u64>,
    tx_busy: Vec<(u16, u64)>,
    /// Address by head of what is in the receive queue.
    rx_posted: Vec<(u16, u64)>,
    /// Receive buffers that were used and not given to the device again.
    rx_idle: Vec<u64>,
    /// What the guest announces as its own credit.
    buf_alloc: u32,
    fwd_cnt: u32,
}

/// A packet that the guest received.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Packet {
    header: Header,
    data: Vec<u8>,
}

impl Packet {
    fn op(&self) -> u16 {
        self.header.op
    }
}

impl Guest {
    fn start() -> Self {
        Self::start_with(VsockConfig::new(CID))
    }

    fn start_with(config: VsockConfig) -> Self {
        let mut guest = Self::idle(config);
        guest.driver.start(u64::MAX);
        guest.post_all();
        guest
    }

    /// A guest whose driver has not started and which has no receive buffers posted.
    fn idle(config: VsockConfig) -> Self {
        let (device, handle) = Vsock::new(config).expect("a vsock device");
        let mut driver = MockDriver::new(Box::new(device));
        let tx_free = (0..TX_SLOTS).map(|_| driver.alloc(TX_SLOT)).collect();
        let rx_idle = (0..128).map(|_| driver.alloc(RX_BUFFER.into())).collect();
        Self {
            driver,
            handle,
            tx_free,
            tx_busy: Vec::new(),
            rx_posted: Vec::new(),
            rx_idle,
            buf_alloc: 256 << 10,
            fwd_cnt: 0,
        }
    }

    fn post(&mut self, count: usize) {
        for _ in 0..count {
            let addr = self.rx_idle.pop().expect("an idle receive buffer");
            let head = self.driver.submit(RX, &[Buffer::writable(addr, RX_BUFFER)]);
            self.rx_posted.push((head, addr));
        }
        self.driver.kick(RX);
    }

    fn post_all(&mut self) {
        self.post(self.rx_idle.len());
    }

    fn header(&self, host_port: u32, guest_port: u32, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest_port,
            dst_port: host_port,
            len: 0,
            socket_type: VIRTIO_VSOCK_TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    fn reap_tx(&mut self) {
        while let Some(used) = self.driver.pop_used(TX) {
            let at = self
                .tx_busy
                .iter()
                .position(|(head, _)| *head == used.head)
                .expect("a chain that was submitted");
            self.tx_free.push(self.tx_busy.swap_remove(at).1);
        }
    }

    /// Sends a packet as one buffer, waiting for room in the queue.
    fn send(&mut self, mut header: Header, data: &[u8]) {
        header.len = data.len() as u32;
        self.send_raw(header, data);
    }

    /// As [`Self::send`], with `header.len` as it is.
    fn send_raw(&mut self, header: Header, data: &[u8]) {
        self.reap_tx();
        let deadline = Instant::now() + PATIENCE;
        while self.tx_free.is_empty() {
            assert!(Instant::now() < deadline, "the device takes no packets");
            std::thread::yield_now();
            self.reap_tx();
        }
        let addr = self.tx_free.pop().expect("a free transmit buffer");
        let bytes = [&header.to_bytes()[..], data].concat();
        self.driver.write(addr, &bytes);
        let buffer = Buffer::readable(addr, bytes.len() as u32);
        let head = self.driver.submit(TX, &[buffer]);
        self.tx_busy.push((head, addr));
        self.driver.kick(TX);
    }

    fn send_op(&mut self, host_port: u32, guest_port: u32, op: u16) {
        self.send(self.header(host_port, guest_port, op), &[]);
    }

    fn send_data(&mut self, host_port: u32, guest_port: u32, data: &[u8]) {
        self.send(self.header(host_port, guest_port, VIRTIO_VSOCK_OP_RW), data);
    }

    fn shutdown(&mut self, host_port: u32, guest_port: u32, flags: u32) {
        let mut header = self.header(host_port, guest_port, VIRTIO_VSOCK_OP_SHUTDOWN);
        header.flags = flags;
        self.send(header, &[]);
    }

    /// Waits until the device has taken all packets.
    fn settle(&mut self) {
        while !self.tx_busy.is_empty() {
            let used = self.driver.wait_used(TX);
            let at = self
                .tx_busy
                .iter()
                .position(|(head, _)| *head == used.head)
                .expect("a chain that was submitted");
            self.tx_free.push(self.tx_busy.swap_remove(at).1);
        }
    }

    fn take(&mut self, used: crate::testing::Used) -> Packet {
        let at = self
            .rx_posted
            .iter()
            .position(|(head, _)| *head == used.head)
            .expect("a receive buffer that was posted");
        let (_, addr) = self.rx_posted.remove(at);
        self.rx_idle.push(addr);
        let bytes = self.driver.read(addr, used.len as usize);
        let header: [u8; HEADER_SIZE] = bytes[..HEADER_SIZE].try_into().expect("a whole header");
        let packet = Packet {
            header: Header::from_bytes(&header),
            data: bytes[HEADER_SIZE..].to_vec(),
        };
        assert_eq!(packet.header.len as usize, packet.data.len(), "{packet:?}");
        assert_eq!(packet.header.src_cid, HOST_CID, "{packet:?}");
        assert_eq!(packet.header.dst_cid, CID, "{packet:?}");
        packet
    }

    /// The next packet that the device sends, without giving the buffer back.
    fn receive_only(&mut self) -> Packet {
        let used = self.driver.wait_used(RX);
        self.take(used)
    }

    /// The next packet; the buffer goes back to the device.
    fn receive(&mut self) -> Packet {
        let packet = self.receive_only();
        self.post(1);
        packet
    }

    /// The next packet if one comes at all in a while that is long for the device.
    fn receive_if_any(&mut self) -> Option<Packet> {
        let used = self.driver.wait_used_for(RX, Duration::from_millis(100))?;
        let packet = self.take(used);
        self.post(1);
        Some(packet)
    }

    /// The next packet, which has to have this operation.
    fn expect(&mut self, op: u16) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.op(), op, "{packet:?}");
        packet
    }

    /// Data of one connection until `len` bytes came, giving credit back all the time. Credit
    /// requests are answered and updates ignored.
    fn receive_data(&mut self, len: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < len {
            let packet = self.receive();
            match packet.op() {
                VIRTIO_VSOCK_OP_RW => {
                    self.fwd_cnt = self.fwd_cnt.wrapping_add(packet.header.len);
                    data.extend(packet.data);
                    if data.len().is_multiple_of(16) || data.len() == len {
                        self.answer(&packet.header, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
                    }
                }
                VIRTIO_VSOCK_OP_CREDIT_REQUEST => {
                    self.answer(&packet.header, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
                }
                VIRTIO_VSOCK_OP_CREDIT_UPDATE => {}
                _ => panic!("{packet:?} after {} of {len} bytes", data.len()),
            }
        }
        data
    }

    fn answer(&mut self, to: &Header, op: u16) {
        self.send_op(to.src_port, to.dst_port, op);
    }

    /// A connection from the guest to a new service: the host's end, and its two ports.
    fn connect_to_host(&mut self, host_port: u32, guest_port: u32) -> UnixStream {
        let (sender, streams) = mpsc::channel();
        self.handle
            .listen(host_port, move |stream| drop(sender.send(stream)))
            .unwrap();
        self.send_op(host_port, guest_port, VIRTIO_VSOCK_OP_REQUEST);
        let response = self.expect(VIRTIO_VSOCK_OP_RESPONSE);
        assert_eq!(response.header.src_port, host_port);
        assert_eq!(response.header.dst_port, guest_port);
        let stream = streams.recv_timeout(PATIENCE).expect("a stream");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A connection from the host to the guest that the guest accepts: the host's end, and the
    /// host's port.
    fn connect_to_guest(&mut self, guest_port: u32) -> (UnixStream, u32) {
        let stream = self.handle.connect(guest_port).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let request = self.expect(VIRTIO_VSOCK_OP_REQUEST);
        assert_eq!(request.header.dst_port, guest_port);
        self.answer(&request.header, VIRTIO_VSOCK_OP_RESPONSE);
        (stream, request.header.src_port)
    }

    /// Joins `stream` to a connection to port 80 of the guest, which accepts: the host's port.
    fn join(&mut self, prelude: &[u8], stream: impl Into<OwnedFd>) -> u32 {
        self.handle.join(80, prelude.to_vec(), stream).unwrap();
        let request = self.expect(VIRTIO_VSOCK_OP_REQUEST);
        assert_eq!(request.header.dst_port, 80);
        self.answer(&request.header, VIRTIO_VSOCK_OP_RESPONSE);
        request.header.src_port
    }

    /// Packets until one has `op`, with the data of all and the flags of the last shutdown.
    fn receive_until(&mut self, op: u16) -> (Vec<u8>, u32) {
        let (mut data, mut flags) = (Vec::new(), 0);
        loop {
            let packet = self.receive();
            match packet.op() {
                VIRTIO_VSOCK_OP_RW => data.extend(&packet.data),
                VIRTIO_VSOCK_OP_SHUTDOWN => flags = packet.header.flags,
                VIRTIO_VSOCK_OP_CREDIT_UPDATE | VIRTIO_VSOCK_OP_CREDIT_REQUEST => {}
                other => assert_eq!(other, op, "{packet:?}"),
            }
            if packet.op() == op {
                return (data, flags);
            }
        }
    }

    fn connections(&self) -> u64 {
        self.handle.counters().connections.load(Ordering::Relaxed)
    }

    /// Waits until the device has `count` connections.
    fn wait_connections(&mut self, count: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.connections() != count {
            assert!(
                Instant::now() < deadline,
                "{} connections instead of {count}",
                self.connections()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761).max(1);
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        })
        .collect()
}

/// Reads exactly `len` bytes.
fn read(mut stream: &UnixStream, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    stream.read_exact(&mut data).expect("the guest's data");
    data
}

/// Reads to the end, which has to be one.
fn read_all(mut stream: impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).expect("an orderly end");
    all
}

/// The stream has ended and nothing is left in it.
fn assert_ended(mut stream: &UnixStream) {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => assert!(rest.is_empty(), "{} bytes before the end", rest.len()),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}
