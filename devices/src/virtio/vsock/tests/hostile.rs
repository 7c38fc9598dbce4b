//! A guest that breaks the rules.

use virtio_queue::desc::split::Descriptor;

use super::*;
use crate::testing::{INDIRECT, NEXT, WRITE};

/// The device still works for an honest connection.
fn assert_alive(guest: &mut Guest) {
    let stream = guest.connect_to_host(4000, 4001);
    guest.send_data(4000, 4001, b"alive");
    assert_eq!(read(&stream, 5), b"alive");
}

fn dropped(guest: &Guest) -> u64 {
    let counters = guest.handle.counters();
    counters.dropped_packets.load(Ordering::Relaxed)
}

#[test]
fn a_guest_that_overruns_its_credit_is_reset() {
    let mut guest = Guest::start();
    let stream = guest.connect_to_host(1024, 5000);
    let data = pattern(60_000, 9);
    // The socket pair takes some; the advertised buffer 256 KiB; nobody reads.
    let sent = (0..40).map(|_| guest.send_data(1024, 5000, &data)).count();
    assert_eq!(sent, 40);
    loop {
        match guest.receive().op() {
            VIRTIO_VSOCK_OP_CREDIT_UPDATE => {}
            op => break assert_eq!(op, VIRTIO_VSOCK_OP_RST),
        }
    }
    drop(stream);
    guest.settle();
    while guest.receive_if_any().is_some() {}
    assert_alive(&mut guest);
}

#[test]
fn packets_from_another_context_or_to_another_are_dropped() {
    let mut guest = Guest::start();
    for (src_cid, dst_cid) in [(CID + 1, 2), (CID, 3), (2, CID), (CID, 2 | 1 << 32)] {
        let mut header = guest.header(1024, 5000, VIRTIO_VSOCK_OP_REQUEST);
        (header.src_cid, header.dst_cid) = (src_cid, dst_cid);
        guest.send(header, &[]);
    }
    guest.settle();
    assert_eq!(guest.receive_if_any(), None);
    assert_eq!(dropped(&guest), 4);
    assert_alive(&mut guest);
}

#[test]
fn seqpacket_and_unknown_types_are_refused_with_their_own_type() {
    let mut guest = Guest::start();
    let _stream = guest.connect_to_host(1024, 5000);
    for socket_type in [0, 2, 3, u16::MAX] {
        let mut header = guest.header(1024, 5001, VIRTIO_VSOCK_OP_REQUEST);
        header.socket_type = socket_type;
        guest.send(header, &[]);
        let packet = guest.expect(VIRTIO_VSOCK_OP_RST);
        assert_eq!(packet.header.socket_type, socket_type);
    }
}

#[test]
fn packets_for_no_connection_are_reset_but_resets_are_not() {
    let mut guest = Guest::start();
    for op in (0..=9).filter(|op| ![1, 3].contains(op)) {
        guest.send_op(1, 2, op);
        guest.expect(VIRTIO_VSOCK_OP_RST);
    }
    guest.send_op(1, 2, VIRTIO_VSOCK_OP_RST);
    guest.settle();
    assert_eq!(guest.receive_if_any(), None, "a reset was answered");
}

#[test]
fn what_is_out_of_turn_resets_the_connection() {
    let mut guest = Guest::start();
    for op in [VIRTIO_VSOCK_OP_REQUEST, VIRTIO_VSOCK_OP_RESPONSE, 0, 8, 999] {
        let stream = guest.connect_to_host(1024, 5000);
        guest.send_op(1024, 5000, op);
        guest.expect(VIRTIO_VSOCK_OP_RST);
        assert_ended(&stream);
    }
    for op in [
        VIRTIO_VSOCK_OP_RW,
        VIRTIO_VSOCK_OP_SHUTDOWN,
        VIRTIO_VSOCK_OP_REQUEST,
    ] {
        let stream = guest.handle.connect(80).unwrap();
        let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
        guest.answer(&request.header, op);
        guest.expect(VIRTIO_VSOCK_OP_RST);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_ended(&stream);
    }
    assert_alive(&mut guest);
}

#[test]
fn data_after_the_guest_said_it_was_the_last_resets_the_connection() {
    let mut guest = Guest::start();
    let _stream = guest.connect_to_host(1024, 5000);
    guest.shutdown(1024, 5000, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
    guest.send_data(1024, 5000, b"but wait");
    guest.expect(VIRTIO_VSOCK_OP_RST);
}

#[test]
fn a_response_that_comes_before_the_request_was_taken_is_a_violation() {
    let mut guest = Guest::idle(VsockConfig::new(CID));
    guest.driver.start(u64::MAX);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let (sender, answers) = mpsc::channel();
    guest
        .handle
        .connect_with(9, theirs, move |answer| sender.send(answer).unwrap())
        .unwrap();
    // There is no receive buffer, so the guest guesses the host's port.
    guest.wait_connections(1);
    guest.send_op(1 << 30, 9, VIRTIO_VSOCK_OP_RESPONSE);
    assert_eq!(
        answers.recv_timeout(PATIENCE),
        Ok(Err(ConnectError::DeviceGone))
    );
    guest.post_all();
    guest.expect(VIRTIO_VSOCK_OP_RST);
}

#[test]
fn a_header_that_promises_more_data_than_there_is_is_dropped() {
    let mut guest = Guest::start();
    let stream = guest.connect_to_host(1024, 5000);
    for len in [4, 5, 65_536, u32::MAX] {
        let mut header = guest.header(1024, 5000, VIRTIO_VSOCK_OP_RW);
        header.len = len;
        guest.send_raw(header, b"abc");
    }
    guest.settle();
    assert_eq!(dropped(&guest), 4);
    // Less than there is means what it says.
    let mut header = guest.header(1024, 5000, VIRTIO_VSOCK_OP_RW);
    header.len = 2;
    guest.send_raw(header, b"abc");
    assert_eq!(read(&stream, 2), b"ab");
}

#[test]
fn packets_may_lie_in_any_number_of_pieces() {
    let mut guest = Guest::start();
    let mut stream = guest.connect_to_host(1024, 5000);
    let data = pattern(3000, 10);
    let mut header = guest.header(1024, 5000, VIRTIO_VSOCK_OP_RW);
    header.len = data.len() as u32;
    let bytes = [&header.to_bytes()[..], &data].concat();
    let addr = guest.driver.alloc_with(&bytes);
    let total = bytes.len() as u32;
    for cuts in [
        vec![44, total - 44],
        vec![1, 43, total - 44],
        vec![20, 30, 1, total - 51],
        vec![0, 43, 2, 0, total - 45],
        std::iter::once(total - 99).chain([1; 99]).collect(),
    ] {
        let mut at = addr;
        let pieces: Vec<Buffer> = cuts
            .iter()
            .map(|len| {
                at += u64::from(*len);
                Buffer::readable(at - u64::from(*len), *len)
            })
            .collect();
        guest.driver.submit(TX, &pieces);
        guest.driver.kick(TX);
        assert!(read(&stream, data.len()) == data, "{cuts:?}");
        guest.driver.wait_used(TX);
        guest.driver.submit_indirect(TX, &pieces);
        guest.driver.kick(TX);
        assert!(read(&stream, data.len()) == data, "indirect {cuts:?}");
        guest.driver.wait_used(TX);
    }
    // The same for what the guest receives.
    for _ in 0..guest.rx_posted.len() {
        stream.write_all(b"x").unwrap();
        guest.receive_only();
    }
    let addr = guest.driver.alloc(4096);
    for cuts in [vec![44, 100], vec![7, 30, 8, 99], vec![1; 144]] {
        let mut at = addr;
        let pieces: Vec<Buffer> = cuts
            .iter()
            .map(|len| {
                at += u64::from(*len);
                Buffer::writable(at - u64::from(*len), *len)
            })
            .collect();
        guest.driver.submit(RX, &pieces);
        guest.driver.kick(RX);
        stream.write_all(&data[..100]).unwrap();
        let used = guest.driver.wait_used(RX);
        assert_eq!(used.len, 144, "{cuts:?}");
        let bytes = guest.driver.read(addr, 144);
        assert_eq!(bytes[44..], data[..100], "{cuts:?}");
        assert_eq!(bytes[24..28], 100u32.to_le_bytes(), "{cuts:?}");
    }
}

#[test]
fn chains_that_are_no_packets_come_back_and_harm_nobody() {
    let mut guest = Guest::start();
    let addr = guest.driver.alloc(8192);
    let size = guest.driver.queue(TX).size;
    let chains: Vec<Vec<Descriptor>> = vec![
        // Too short, empty, writable, outside of memory, at the end of the address space.
        vec![Descriptor::new(addr, 43, 0, 0)],
        vec![Descriptor::new(addr, 0, 0, 0)],
        vec![Descriptor::new(addr, 44, WRITE, 0)],
        vec![Descriptor::new(1 << 40, 44, 0, 0)],
        vec![Descriptor::new(u64::MAX - 10, 44, 0, 0)],
        vec![Descriptor::new(addr, u32::MAX, 0, 0)],
        // Loops: onto itself, and of two; a next that is outside of the table.
        vec![Descriptor::new(addr, 44, NEXT, 0)],
        vec![
            Descriptor::new(addr, 44, NEXT, 1),
            Descriptor::new(addr, 44, NEXT, 0),
        ],
        vec![Descriptor::new(addr, 4, NEXT, size)],
        // Indirect tables: odd length, outside of memory, within itself.
        vec![Descriptor::new(addr, 15, INDIRECT, 0)],
        vec![Descriptor::new(1 << 40, 16, INDIRECT, 0)],
        vec![Descriptor::new(addr, 65_536 * 16, INDIRECT, 0)],
    ];
    for (number, chain) in chains.iter().enumerate() {
        guest.driver.submit_raw(TX, chain, 0);
        guest.driver.notify(TX);
        let used = guest.driver.wait_used(TX);
        assert_eq!((used.head, used.len), (0, 0), "chain {number}");
    }
    assert_eq!(dropped(&guest), chains.len() as u64);
}

#[test]
fn receive_buffers_that_hold_no_packet_come_back_and_the_next_one_is_used() {
    let mut guest = Guest::idle(VsockConfig::new(CID));
    guest.driver.start(u64::MAX);
    let addr = guest.driver.alloc(8192);
    for bad in [
        Buffer::writable(addr, 43),
        Buffer::readable(addr, 4096),
        Buffer::writable(1 << 40, 4096),
    ] {
        guest.driver.submit(RX, &[bad]);
    }
    guest.post(1);
    guest.send_op(1, 2, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
    for _ in 0..3 {
        assert_eq!(guest.driver.wait_used(RX).len, 0);
    }
    assert_eq!(guest.receive_only().op(), VIRTIO_VSOCK_OP_RST);
}

#[test]
fn receive_buffers_with_room_for_headers_only_stall_the_data_but_not_the_device() {
    let mut guest = Guest::idle(VsockConfig::new(CID));
    guest.driver.start(u64::MAX);
    let addr = guest.driver.alloc(64 * 44);
    let mut stream = guest.handle.connect(80).unwrap();
    stream.write_all(b"data").unwrap();
    for i in 0..64 {
        guest
            .driver
            .submit(RX, &[Buffer::writable(addr + i * 44, 44)]);
    }
    guest.driver.kick(RX);
    guest.driver.wait_used(RX);
    guest.send_op(1 << 30, 80, VIRTIO_VSOCK_OP_RESPONSE);
    for _ in 1..64 {
        assert_eq!(guest.driver.wait_used(RX).len, 44);
    }
    guest.post(1);
    assert_eq!(guest.expect_data(), b"data");
}

impl Guest {
    fn expect_data(&mut self) -> Vec<u8> {
        let packet = self.receive_only();
        assert_eq!(packet.op(), VIRTIO_VSOCK_OP_RW, "{packet:?}");
        packet.data
    }
}

#[test]
fn a_ring_index_that_runs_away_asks_for_a_reset_after_which_all_is_well() {
    for queue in [RX, TX] {
        let mut guest = Guest::start();
        let _stream = guest.connect_to_host(1024, 5000);
        guest.driver.set_avail_idx(queue, 5000);
        guest.driver.notify(queue);
        if queue == RX {
            // It is looked at when there is something to send.
            guest.send_op(1, 2, VIRTIO_VSOCK_OP_RW);
        }
        assert!(guest.driver.wait_needs_reset(PATIENCE), "queue {queue}");
        guest.driver.reset();
        guest.rx_idle.extend(guest.rx_posted.drain(..).map(|r| r.1));
        guest.tx_free.extend(guest.tx_busy.drain(..).map(|t| t.1));
        guest.driver.start(u64::MAX);
        guest.post_all();
        assert_alive(&mut guest);
    }
}

#[test]
fn a_storm_of_bogus_packets_without_receive_buffers_fills_nothing_but_the_guests_own_ring() {
    let mut guest = Guest::idle(VsockConfig::new(CID));
    guest.driver.start(u64::MAX);
    // The device stops taking packets when its resets find no buffers.
    let mut sent = 0u32;
    let mut stalled = Instant::now();
    while stalled.elapsed() < Duration::from_millis(200) {
        guest.reap_tx();
        if guest.tx_free.is_empty() {
            std::thread::yield_now();
            continue;
        }
        assert!(sent < 2000, "the device takes packets without an end");
        guest.send_op(sent, 1, VIRTIO_VSOCK_OP_CREDIT_REQUEST);
        sent += 1;
        stalled = Instant::now();
    }
    // With buffers it goes on, and not one reset was lost.
    guest.post_all();
    for port in 0..sent {
        let packet = guest.expect(VIRTIO_VSOCK_OP_RST);
        assert_eq!(packet.header.src_port, port);
    }
    assert_alive(&mut guest);
}

#[test]
fn a_hundred_thousand_bogus_packets_leave_no_memory_behind() {
    let mut guest = Guest::start();
    let before = resident_kib();
    for i in 0..100_000u32 {
        let op = (i % 10) as u16;
        let mut header = guest.header(i % 7, i, op);
        header.flags = i;
        header.buf_alloc = i.wrapping_mul(77_777);
        header.socket_type = 1 + u16::from(i.is_multiple_of(5));
        guest.send(header, &[0; 16][..(i % 16) as usize]);
        while let Some(used) = guest.driver.pop_used(RX) {
            guest.take(used);
            guest.post(1);
        }
    }
    guest.settle();
    while guest.receive_if_any().is_some() {}
    assert_eq!(guest.connections(), 0);
    let grown = resident_kib().saturating_sub(before);
    // Other tests of the process run at the same time, so this is no exact measure.
    assert!(grown < 200 << 10, "the process grew by {grown} KiB");
    assert_alive(&mut guest);
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let value = line.and_then(|line| line.split_whitespace().nth(1));
    value.and_then(|kib| kib.parse().ok()).expect("VmRSS")
}

#[test]
fn connections_opened_and_reset_without_receive_buffers_leave_nothing_behind() {
    let mut guest = Guest::idle(VsockConfig::new(CID));
    guest.driver.start(u64::MAX);
    guest.handle.listen(7, drop).unwrap();
    for port in 0..5_000 {
        guest.send_op(7, port, VIRTIO_VSOCK_OP_REQUEST);
        guest.send_op(7, port, VIRTIO_VSOCK_OP_RST);
    }
    guest.settle();
    guest.wait_connections(0);
    guest.post_all();
    assert_alive(&mut guest);
}

#[test]
fn the_same_ports_can_be_used_again_at_once() {
    let mut guest = Guest::start();
    for _ in 0..100 {
        let stream = guest.connect_to_host(1024, 5000);
        guest.send_data(1024, 5000, b"x");
        assert_eq!(read(&stream, 1), b"x");
        guest.shutdown(1024, 5000, VIRTIO_VSOCK_SHUTDOWN_BOTH);
        guest.expect(VIRTIO_VSOCK_OP_RST);
        assert_ended(&stream);
    }
    guest.wait_connections(0);
}
