//! Thousands of connections at once, and what they cost while nothing happens.

use std::collections::HashMap;
use std::thread;

use super::*;
use crate::virtio::vsock::connection::Connection;

/// Descriptors that the tests that run beside this one may need.
const SPARED: u64 = 4_000;

/// Ten thousand, or what this process may have at two descriptors each.
fn most_connections() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    )
    .expect("raising the soft limit of open files to the hard one");
    let spare = limit.maximum.unwrap_or(u64::MAX).saturating_sub(SPARED) / 2;
    let count = spare.min(10_000) as usize;
    assert!(count >= 100, "this host lets a process open too few files");
    count
}

/// A guest that accepts everything, and the connections that it has: host port by guest port.
struct Crowd {
    guest: Guest,
    clients: Vec<UnixStream>,
    ports: HashMap<u32, u32>,
}

impl Crowd {
    /// Opens `count` connections in bursts; the guest gets each one's number first.
    fn gather(count: usize) -> Self {
        const BURST: usize = 100;
        let mut crowd = Self {
            guest: Guest::start(),
            clients: Vec::new(),
            ports: HashMap::new(),
        };
        while crowd.clients.len() < count {
            let burst = BURST.min(count - crowd.clients.len());
            for _ in 0..burst {
                crowd.join();
            }
            let mut told = 0;
            while told < burst {
                let packet = crowd.guest.receive();
                match packet.op() {
                    VIRTIO_VSOCK_OP_REQUEST => {
                        let header = &packet.header;
                        crowd.ports.insert(header.dst_port, header.src_port);
                        crowd.guest.answer(header, VIRTIO_VSOCK_OP_RESPONSE);
                    }
                    op => {
                        assert_eq!(op, VIRTIO_VSOCK_OP_RW);
                        assert_eq!(packet.data, packet.header.dst_port.to_le_bytes());
                        told += 1;
                    }
                }
            }
        }
        crowd
    }

    /// Asks for one more connection, to the guest port that is its number.
    fn join(&mut self) {
        let (client, server) = UnixStream::pair().unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let number = self.clients.len() as u32;
        let prelude = number.to_le_bytes().to_vec();
        self.guest.handle.join(number, prelude, server).unwrap();
        self.clients.push(client);
    }

    fn host_port(&self, number: usize) -> u32 {
        self.ports[&(number as u32)]
    }
}

#[test]
fn ten_thousand_connections_are_open_at_once_and_all_move() {
    let count = most_connections();
    let mut crowd = Crowd::gather(count);
    assert_eq!(crowd.guest.connections(), count as u64);
    for number in 0..count {
        let host_port = crowd.host_port(number);
        let data = (number as u32).to_be_bytes();
        crowd.guest.send_data(host_port, number as u32, &data);
        assert_eq!(read(&crowd.clients[number], 4), data);
    }
    for client in &mut crowd.clients {
        client.write_all(b"to the guest").unwrap();
        // The guest's buffers are few.
        let packet = crowd.guest.expect(VIRTIO_VSOCK_OP_RW);
        assert_eq!(packet.data, b"to the guest");
    }
    crowd.clients.clear();
    let mut resets = 0;
    while resets < count {
        match crowd.guest.receive().op() {
            VIRTIO_VSOCK_OP_RST => resets += 1,
            op => assert_eq!(op, VIRTIO_VSOCK_OP_SHUTDOWN),
        }
    }
    crowd.guest.wait_connections(0);
}

#[test]
fn a_connection_that_comes_late_has_little_credit_until_it_is_busy() {
    let mut crowd = Crowd::gather(1000);
    crowd.join();
    let guest = &mut crowd.guest;
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RESPONSE);
    guest.expect(VIRTIO_VSOCK_OP_RW);
    let (host_port, guest_port) = (request.header.src_port, request.header.dst_port);
    let first = request.header.buf_alloc;
    assert!((16 << 10..32 << 10).contains(&first), "{first} bytes");
    let data = pattern(16 << 10, 31);
    guest.send_data(host_port, guest_port, &data);
    let update = guest.expect(VIRTIO_VSOCK_OP_CREDIT_UPDATE);
    assert_eq!(update.header.buf_alloc, 1 << 20);
    assert!(read(&crowd.clients[1000], data.len()) == data);
}

#[test]
fn a_connection_is_small() {
    let size = size_of::<Connection>();
    assert!(size <= 256, "{size} bytes");
}

#[test]
fn idle_connections_wake_nobody_up() {
    let crowd = Crowd::gather(100);
    let turns = || crowd.guest.handle.counters().turns.load(Ordering::Relaxed);
    let deadline = Instant::now() + PATIENCE;
    // The timer that watched over the requests finds nothing to watch any more, and stops.
    loop {
        let before = turns();
        thread::sleep(Duration::from_millis(2500));
        if turns() == before {
            break;
        }
        assert!(Instant::now() < deadline, "the device never rests");
    }
    assert_eq!(crowd.guest.connections(), 100);
}
