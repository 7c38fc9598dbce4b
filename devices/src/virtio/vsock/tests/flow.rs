//! Credit, backpressure, fairness and the integrity of what is carried.

use std::thread;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::*;

#[test]
fn a_stream_to_the_guest_keeps_to_the_guests_credit_and_asks_for_more() {
    let mut guest = Guest::start();
    guest.buf_alloc = 10_000;
    let (mut stream, port) = guest.connect_to_guest(80);
    let data = pattern(25_000, 3);
    stream.write_all(&data).unwrap();
    let mut received = Vec::new();
    while received.len() < 10_000 {
        received.extend(guest.expect(VIRTIO_VSOCK_OP_RW).data);
    }
    assert_eq!(received.len(), 10_000, "more than there was credit for");
    guest.expect(VIRTIO_VSOCK_OP_CREDIT_REQUEST);
    assert_eq!(guest.receive_if_any(), None, "data without credit");
    // An answer without news must not make the device ask again and again.
    guest.send_op(port, 80, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
    guest.settle();
    assert_eq!(guest.receive_if_any(), None, "another request");
    guest.fwd_cnt = 10_000;
    guest.send_op(port, 80, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
    received.extend(guest.receive_data(10_000));
    received.extend(guest.receive_data(5_000));
    assert!(received == data);
}

#[test]
fn the_guests_credit_counters_may_wrap_around() {
    let mut guest = Guest::start();
    // What the guest forwarded is ahead of what it got by its own account: no window, no panic.
    guest.fwd_cnt = u32::MAX - 5;
    let (mut stream, port) = guest.connect_to_guest(80);
    stream.write_all(b"0123456789").unwrap();
    let early = guest.expect(VIRTIO_VSOCK_OP_RW);
    assert_eq!(early.data, b"0123456789", "6 bytes are in flight at most");
    guest.fwd_cnt = 10;
    guest.send_op(port, 80, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
    stream.write_all(b"more").unwrap();
    assert_eq!(guest.expect(VIRTIO_VSOCK_OP_RW).data, b"more");
}

#[test]
fn a_guest_hears_of_free_buffer_space_before_it_runs_dry() {
    let mut guest = Guest::start();
    let stream = guest.connect_to_host(1024, 5000);
    let reader = thread::spawn(move || {
        let data = read(&stream, 10 << 20);
        (data, stream)
    });
    let data = pattern(10 << 20, 4);
    // What the response said.
    let (mut buf_alloc, mut told) = (256 << 10, 0u32);
    let (mut sent, mut window) = (0usize, buf_alloc);
    while sent < data.len() {
        if window < 32 << 10 {
            let packet = guest.expect(VIRTIO_VSOCK_OP_CREDIT_UPDATE);
            told = packet.header.fwd_cnt;
            buf_alloc = packet.header.buf_alloc;
        } else {
            let len = (32 << 10).min(data.len() - sent);
            guest.send_data(1024, 5000, &data[sent..sent + len]);
            sent += len;
        }
        window = buf_alloc - (sent as u32 - told);
    }
    let (received, _stream) = reader.join().unwrap();
    assert!(received == data);
}

#[test]
fn a_credit_request_is_answered() {
    let mut guest = Guest::start();
    let stream = guest.connect_to_host(1024, 5000);
    guest.send_data(1024, 5000, b"abc");
    assert_eq!(read(&stream, 3), b"abc");
    guest.send_op(1024, 5000, VIRTIO_VSOCK_OP_CREDIT_REQUEST);
    let update = guest.expect(VIRTIO_VSOCK_OP_CREDIT_UPDATE);
    assert_eq!(update.header.fwd_cnt, 3);
    assert_eq!(update.header.buf_alloc, 256 << 10);
}

#[test]
fn a_host_that_does_not_read_stalls_its_own_connection_only() {
    let mut guest = Guest::start();
    let lazy = guest.connect_to_host(1024, 5000);
    let busy = guest.connect_to_host(1025, 5000);
    let data = pattern(256 << 10, 5);
    for chunk in data.chunks(16 << 10) {
        guest.send_data(1024, 5000, chunk);
    }
    guest.send_data(1025, 5000, b"not behind the other");
    assert_eq!(read(&busy, 20), b"not behind the other");
    assert!(read(&lazy, data.len()) == data);
}

#[test]
fn a_guest_without_receive_buffers_loses_nothing_and_is_served_in_turn() {
    let mut guest = Guest::start();
    guest.buf_alloc = 16 << 20;
    let mut streams = Vec::new();
    for port in 0..8 {
        streams.push(guest.connect_to_guest(100 + port).0);
    }
    // Take all receive buffers away.
    while guest.receive_if_any().is_some() {}
    let posted = guest.rx_posted.len();
    let mut hog = guest.connect_to_guest(99).0;
    let bulk = pattern(posted * RX_BUFFER as usize + 10_000, 6);
    let writer = thread::spawn(move || {
        hog.write_all(&bulk).unwrap();
        hog
    });
    for _ in 0..posted {
        guest.receive_only();
    }
    for stream in &mut streams {
        stream.write_all(b"small").unwrap();
    }
    // Give buffers back one by one: each of the small ones is served within a few of the hog's.
    let mut waiting = 8;
    for turn in 0.. {
        assert!(turn < 64, "{waiting} connections starve");
        guest.post(1);
        let packet = guest.receive_only();
        guest.fwd_cnt += packet.header.len;
        if packet.op() == VIRTIO_VSOCK_OP_RW && packet.header.dst_port != 99 {
            assert_eq!(packet.data, b"small");
            waiting -= 1;
            if waiting == 0 {
                break;
            }
        }
    }
    guest.driver.reset();
    drop(writer.join());
}

#[test]
fn data_arrives_whole_whatever_the_sizes_of_packets_writes_and_reads() {
    let mut guest = Guest::start();
    let stream = guest.connect_to_host(1024, 5000);
    let down = pattern(2 << 20, 7);
    let up = pattern(2 << 20, 8);
    let mut writer = stream.try_clone().unwrap();
    let to_write = down.clone();
    let writing = thread::spawn(move || {
        let (mut at, mut size) = (0, 1);
        while at < to_write.len() {
            let end = (at + size).min(to_write.len());
            writer.write_all(&to_write[at..end]).unwrap();
            at = end;
            size = size * 7 % 20_011 + 1;
        }
    });
    let len = up.len();
    let reading = thread::spawn(move || read(&stream, len));
    let (mut received, mut sent, mut size) = (Vec::new(), 0, 1);
    let mut window = 256 << 10;
    while received.len() < down.len() || sent < up.len() {
        if sent < up.len() && window >= 65_000 {
            let end = (sent + size).min(up.len());
            guest.send_data(1024, 5000, &up[sent..end]);
            window -= end - sent;
            sent = end;
            size = size * 13 % 60_013 + 1;
        } else {
            let packet = guest.receive();
            guest.fwd_cnt = guest.fwd_cnt.wrapping_add(packet.header.len);
            received.extend(packet.data);
            let held = (sent as u32).wrapping_sub(packet.header.fwd_cnt);
            window = (packet.header.buf_alloc - held) as usize;
            if received.len().is_multiple_of(5) || window < 65_000 {
                guest.send_op(1024, 5000, VIRTIO_VSOCK_OP_CREDIT_REQUEST);
            }
        }
    }
    writing.join().unwrap();
    assert!(received == down, "to the guest");
    assert!(reading.join().unwrap() == up, "to the host");
}

#[test]
fn what_nobody_answers_is_told_as_taken_in_a_while() {
    let mut guest = Guest::idle(VsockConfig::new(CID));
    // With it, the driver would say for each queue from when on it wants to know.
    guest.driver.start(!(1 << VIRTIO_RING_F_EVENT_IDX));
    guest.post_all();
    let stream = guest.connect_to_host(1024, 50_000);
    guest.settle();
    let line = guest.driver.interrupt().clone();
    for _ in 0..3 {
        guest.send_data(1024, 50_000, b"ping");
        assert_eq!(read(&stream, 4), b"ping");
        let deadline = Instant::now() + PATIENCE;
        while line.line().read().is_err() {
            assert!(Instant::now() < deadline, "no interrupt");
            thread::yield_now();
        }
    }
}
