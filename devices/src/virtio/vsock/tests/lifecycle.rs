//! How connections come and go.

use super::*;
use crate::virtio::vsock::mux::asking::MAX_UNANSWERED;

#[test]
fn the_device_says_what_it_is() {
    let guest = Guest::start();
    assert_eq!(guest.driver.config(0, 8), CID.to_le_bytes());
    assert_eq!(guest.driver.config(8, 4), [0; 4], "past the end");
    assert_eq!(guest.driver.config(4, 8), [0; 8], "the upper half");
    for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
        let error = Vsock::new(VsockConfig::new(cid)).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{cid}");
    }
}

#[test]
fn a_guest_connects_to_a_service_and_data_goes_both_ways() {
    let mut guest = Guest::start();
    let mut stream = guest.connect_to_host(1024, 5000);
    guest.send_data(1024, 5000, b"from the guest");
    assert_eq!(read(&stream, 14), b"from the guest");
    stream.write_all(b"from the host").unwrap();
    let packet = guest.expect(VIRTIO_VSOCK_OP_RW);
    assert_eq!(packet.data, b"from the host");
    assert_eq!(packet.header.fwd_cnt, 14);
    assert_eq!(packet.header.socket_type, VIRTIO_VSOCK_TYPE_STREAM);
    assert_eq!(
        (packet.header.src_port, packet.header.dst_port),
        (1024, 5000)
    );
}

#[test]
fn what_the_host_writes_before_the_guest_accepts_arrives_after_it() {
    let mut guest = Guest::start();
    let mut stream = guest.handle.connect(77).unwrap();
    stream.write_all(b"early").unwrap();
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    assert_eq!(guest.receive_if_any(), None, "data before the response");
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RESPONSE);
    assert_eq!(guest.expect(VIRTIO_VSOCK_OP_RW).data, b"early");
    guest.send_data(request.header.src_port, 77, b"answer");
    assert_eq!(read(&stream, 6), b"answer");
}

#[test]
fn a_refused_connection_is_told_and_ends_the_stream() {
    let mut guest = Guest::start();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (sender, answers) = mpsc::channel();
    guest
        .handle
        .connect_with(9, theirs, move |answer| sender.send(answer).unwrap())
        .unwrap();
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RST);
    assert_eq!(
        answers.recv_timeout(PATIENCE),
        Ok(Err(ConnectError::Refused))
    );
    assert_ended(&ours);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn an_accepted_connection_is_told_with_its_port() {
    let mut guest = Guest::start();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let (sender, answers) = mpsc::channel();
    guest
        .handle
        .connect_with(9, theirs, move |answer| sender.send(answer).unwrap())
        .unwrap();
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RESPONSE);
    let port = answers.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(port, request.header.src_port);
}

#[test]
fn a_guest_that_never_answers_a_request_costs_the_caller_a_timeout() {
    let mut guest = Guest::start_with(VsockConfig {
        connect_timeout: Duration::from_millis(10),
        ..VsockConfig::new(CID)
    });
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (sender, answers) = mpsc::channel();
    guest
        .handle
        .connect_with(9, theirs, move |answer| sender.send(answer).unwrap())
        .unwrap();
    guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    assert_eq!(
        answers.recv_timeout(PATIENCE),
        Ok(Err(ConnectError::TimedOut))
    );
    guest.expect(VIRTIO_VSOCK_OP_RST);
    assert_ended(&ours);
}

#[test]
fn of_many_connections_the_guest_is_asked_for_some_at_a_time_in_their_order() {
    let mut guest = Guest::start();
    let mut clients = Vec::new();
    for number in 0..200_u32 {
        let (client, server) = UnixStream::pair().unwrap();
        guest
            .handle
            .join(number, b"first".to_vec(), server)
            .unwrap();
        clients.push(client);
    }
    let mut asked = Vec::new();
    for _ in 0..MAX_UNANSWERED {
        asked.push(guest.expect(VIRTIO_VSOCK_OP_REQUEST).header);
    }
    assert_eq!(guest.receive_if_any(), None);
    // An answer makes room for one more, and what the connection has to say comes before all those.
    for number in 0..clients.len() {
        let header = asked[number];
        assert_eq!(header.dst_port as usize, number);
        guest.answer(&header, VIRTIO_VSOCK_OP_RESPONSE);
        let mut said = false;
        while !said || asked.len() < clients.len().min(number + 1 + MAX_UNANSWERED) {
            let packet = guest.receive();
            match packet.op() {
                VIRTIO_VSOCK_OP_REQUEST => asked.push(packet.header),
                VIRTIO_VSOCK_OP_RW => {
                    assert_eq!(packet.header.dst_port as usize, number);
                    said = true;
                }
                op => panic!("operation {op}"),
            }
        }
        assert!(asked.len() <= number + 1 + MAX_UNANSWERED);
    }
}

#[test]
fn a_connection_to_one_port_does_not_wait_behind_those_to_another() {
    let mut guest = Guest::start();
    let mut clients = Vec::new();
    let many = std::iter::repeat_n(80, 3 * MAX_UNANSWERED);
    for port in many.chain([81, 82, 81]) {
        let (client, server) = UnixStream::pair().unwrap();
        guest.handle.join(port, Vec::new(), server).unwrap();
        clients.push(client);
    }
    let mut asked = Vec::new();
    for _ in 0..MAX_UNANSWERED {
        asked.push(guest.expect(VIRTIO_VSOCK_OP_REQUEST).header);
    }
    // Each answer makes room for one.
    let mut ports = Vec::new();
    for header in &asked[..6] {
        guest.answer(header, VIRTIO_VSOCK_OP_RESPONSE);
        ports.push(guest.expect(VIRTIO_VSOCK_OP_REQUEST).header.dst_port);
    }
    assert_eq!(ports, [80, 81, 82, 80, 81, 80]);
}

#[test]
fn connections_that_wait_for_their_turn_are_given_up_when_the_guest_answers_no_more() {
    let mut guest = Guest::start_with(VsockConfig {
        connect_timeout: Duration::from_millis(1500),
        ..VsockConfig::new(CID)
    });
    let (sender, answers) = mpsc::channel();
    let mut clients = Vec::new();
    let count = MAX_UNANSWERED + 4;
    for number in 0..count {
        let (client, server) = UnixStream::pair().unwrap();
        let sender = sender.clone();
        let done = move |answer: Result<u32, ConnectError>| {
            sender.send((number, answer.map(drop))).unwrap();
        };
        guest.handle.connect_with(9, server, done).unwrap();
        clients.push(client);
    }
    for number in 0..2 {
        let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
        guest.answer(&request.header, VIRTIO_VSOCK_OP_RESPONSE);
        assert_eq!(answers.recv_timeout(PATIENCE).unwrap(), (number, Ok(())));
    }
    // Then it stops: all that are left are given up, those that it was not asked for too.
    let mut given_up: Vec<_> = (2..count)
        .map(|_| answers.recv_timeout(PATIENCE).unwrap())
        .collect();
    given_up.sort_by_key(|(number, _)| *number);
    let expected = (2..count).map(|number| (number, Err(ConnectError::TimedOut)));
    assert_eq!(given_up, expected.collect::<Vec<_>>());
}

#[test]
fn a_stream_that_is_no_stream_socket_is_refused() {
    let guest = Guest::start();
    let (sender, answers) = mpsc::channel();
    let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    guest
        .handle
        .connect_with(9, datagram, move |answer| sender.send(answer).unwrap())
        .unwrap();
    assert_eq!(
        answers.recv_timeout(PATIENCE),
        Ok(Err(ConnectError::BadStream))
    );
}

#[test]
fn a_port_without_a_service_is_refused_and_one_taken_away_too() {
    let mut guest = Guest::start();
    guest.send_op(1, 2, VIRTIO_VSOCK_OP_REQUEST);
    let packet = guest.expect(VIRTIO_VSOCK_OP_RST);
    assert_eq!((packet.header.src_port, packet.header.dst_port), (1, 2));
    let stream = guest.connect_to_host(1, 3);
    guest.handle.unlisten(1).unwrap();
    guest.send_op(1, 4, VIRTIO_VSOCK_OP_REQUEST);
    guest.expect(VIRTIO_VSOCK_OP_RST);
    guest.send_data(1, 3, b"still here");
    assert_eq!(read(&stream, 10), b"still here");
}

#[test]
fn the_fallback_serves_ports_without_a_service() {
    let mut guest = Guest::start();
    let (sender, streams) = mpsc::channel();
    let fallback = move |asked: Asked| {
        if asked.port() == 40 {
            let (ours, theirs) = UnixStream::pair().unwrap();
            sender.send(theirs).unwrap();
            asked.accept(ours);
        }
    };
    guest.handle.set_fallback(Some(Box::new(fallback))).unwrap();
    guest.send_op(41, 2, VIRTIO_VSOCK_OP_REQUEST);
    guest.expect(VIRTIO_VSOCK_OP_RST);
    guest.send_op(40, 2, VIRTIO_VSOCK_OP_REQUEST);
    guest.expect(VIRTIO_VSOCK_OP_RESPONSE);
    guest.send_data(40, 2, b"x");
    assert_eq!(read(&streams.recv_timeout(PATIENCE).unwrap(), 1), b"x");
}

#[test]
fn the_fallback_may_answer_at_any_time_and_in_any_order() {
    let mut guest = Guest::start();
    let (sender, asked) = mpsc::channel();
    let fallback = move |asked| drop(sender.send(asked));
    guest.handle.set_fallback(Some(Box::new(fallback))).unwrap();
    for guest_port in [2, 3, 4] {
        guest.send_op(40, guest_port, VIRTIO_VSOCK_OP_REQUEST);
    }
    let asked = || asked.recv_timeout(PATIENCE).unwrap();
    let [first, second, third] = [asked(), asked(), asked()];
    assert_eq!(guest.receive_if_any(), None);
    drop(second);
    assert_eq!(guest.expect(VIRTIO_VSOCK_OP_RST).header.dst_port, 3);
    let (mut stream, theirs) = UnixStream::pair().unwrap();
    third.accept(theirs);
    let response = guest.expect(VIRTIO_VSOCK_OP_RESPONSE);
    assert_eq!(response.header.dst_port, 4);
    stream.write_all(b"late").unwrap();
    assert_eq!(guest.expect(VIRTIO_VSOCK_OP_RW).data, b"late");
    // This one waits no more: its guest has started anew.
    guest.driver.reset();
    first.accept(UnixStream::pair().unwrap().0);
    assert_eq!(read_all(&stream), b"");
}

#[test]
fn the_guests_half_close_is_the_end_of_file_and_the_other_direction_goes_on() {
    let mut guest = Guest::start();
    let mut stream = guest.connect_to_host(1024, 5000);
    guest.send_data(1024, 5000, b"last");
    guest.shutdown(1024, 5000, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last");
    stream.write_all(b"go on").unwrap();
    assert_eq!(guest.expect(VIRTIO_VSOCK_OP_RW).data, b"go on");
    drop(stream);
    let packet = guest.expect(VIRTIO_VSOCK_OP_SHUTDOWN);
    if packet.header.flags != VIRTIO_VSOCK_SHUTDOWN_BOTH {
        let packet = guest.expect(VIRTIO_VSOCK_OP_SHUTDOWN);
        assert_eq!(packet.header.flags, VIRTIO_VSOCK_SHUTDOWN_BOTH);
    }
    guest.send_op(1024, 5000, VIRTIO_VSOCK_OP_RST);
    guest.wait_connections(0);
}

#[test]
fn the_hosts_half_close_is_told_and_the_other_direction_goes_on() {
    let mut guest = Guest::start();
    let (mut stream, port) = guest.connect_to_guest(80);
    stream.write_all(b"request").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(VIRTIO_VSOCK_OP_RW).data, b"request");
    let packet = guest.expect(VIRTIO_VSOCK_OP_SHUTDOWN);
    assert_eq!(packet.header.flags, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
    guest.send_data(port, 80, b"answer");
    guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"answer");
    let packet = guest.expect(VIRTIO_VSOCK_OP_SHUTDOWN);
    assert_eq!(packet.header.flags, VIRTIO_VSOCK_SHUTDOWN_BOTH);
    guest.send_op(port, 80, VIRTIO_VSOCK_OP_RST);
    guest.wait_connections(0);
}

#[test]
fn a_guest_that_stops_reading_breaks_the_hosts_writes_and_goes_on_sending() {
    let mut guest = Guest::start();
    let mut stream = guest.connect_to_host(1024, 5000);
    guest.shutdown(1024, 5000, VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE);
    guest.send_data(1024, 5000, b"x");
    assert_eq!(read(&stream, 1), b"x");
    assert_eq!(
        stream.write_all(b"nobody reads this").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
}

#[test]
fn a_close_by_the_guest_is_confirmed_and_loses_no_data() {
    let mut guest = Guest::start();
    let stream = guest.connect_to_host(1024, 5000);
    // More than the socket pair takes: some of it waits in the device.
    let data = pattern(256 << 10, 1);
    let mut stalled = Vec::new();
    for chunk in data.chunks(32 << 10) {
        guest.send_data(1024, 5000, chunk);
        stalled.extend_from_slice(chunk);
    }
    guest.shutdown(1024, 5000, VIRTIO_VSOCK_SHUTDOWN_BOTH);
    loop {
        match guest.receive().op() {
            VIRTIO_VSOCK_OP_CREDIT_UPDATE => {}
            op => break assert_eq!(op, VIRTIO_VSOCK_OP_RST),
        }
    }
    // The ports are free again before the last byte was read.
    guest.send_op(1024, 5000, VIRTIO_VSOCK_OP_REQUEST);
    guest.expect(VIRTIO_VSOCK_OP_RESPONSE);
    assert_eq!(read(&stream, data.len()), stalled);
    assert_ended(&stream);
    guest.wait_connections(1);
}

#[test]
fn a_close_by_the_host_is_told_after_its_last_byte() {
    let mut guest = Guest::start();
    let (mut stream, port) = guest.connect_to_guest(80);
    let data = pattern(100_000, 2);
    stream.write_all(&data).unwrap();
    drop(stream);
    let mut received = Vec::new();
    let mut flags = 0;
    while flags != VIRTIO_VSOCK_SHUTDOWN_BOTH {
        let packet = guest.receive();
        match packet.op() {
            VIRTIO_VSOCK_OP_RW => received.extend(packet.data),
            VIRTIO_VSOCK_OP_SHUTDOWN => flags = packet.header.flags,
            _ => panic!("{packet:?}"),
        }
    }
    assert!(received == data, "{} bytes", received.len());
    guest.send_op(port, 80, VIRTIO_VSOCK_OP_RST);
    guest.wait_connections(0);
}

#[test]
fn a_host_that_leaves_before_the_guest_accepts_has_its_bytes_delivered_and_is_closed() {
    let mut guest = Guest::start();
    let mut stream = guest.handle.connect(80).unwrap();
    stream.write_all(b"and gone").unwrap();
    drop(stream);
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RESPONSE);
    let (mut received, mut flags) = (Vec::new(), 0);
    while flags != VIRTIO_VSOCK_SHUTDOWN_BOTH {
        let packet = guest.receive();
        match packet.op() {
            VIRTIO_VSOCK_OP_RW => received.extend(packet.data),
            VIRTIO_VSOCK_OP_SHUTDOWN => flags = packet.header.flags,
            _ => panic!("{packet:?}"),
        }
    }
    assert_eq!(received, b"and gone");
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RST);
    guest.wait_connections(0);
}

#[test]
fn a_guest_that_does_not_confirm_a_close_is_reset() {
    let mut guest = Guest::start_with(VsockConfig {
        close_timeout: Duration::from_millis(10),
        ..VsockConfig::new(CID)
    });
    let (stream, _) = guest.connect_to_guest(80);
    guest.settle();
    drop(stream);
    loop {
        match guest.receive().op() {
            VIRTIO_VSOCK_OP_SHUTDOWN => {}
            op => break assert_eq!(op, VIRTIO_VSOCK_OP_RST),
        }
    }
    guest.wait_connections(0);
}

#[test]
fn a_reset_by_the_guest_ends_the_stream() {
    let mut guest = Guest::start();
    let stream = guest.connect_to_host(1024, 5000);
    guest.send_op(1024, 5000, VIRTIO_VSOCK_OP_RST);
    assert_ended(&stream);
    guest.wait_connections(0);
    guest.send_data(1024, 5000, b"late");
    guest.expect(VIRTIO_VSOCK_OP_RST);
}

#[test]
fn a_connection_asked_for_before_the_driver_starts_is_made_when_it_does() {
    let mut guest = Guest::idle(VsockConfig::new(CID));
    let mut stream = guest.handle.connect(22).unwrap();
    stream.write_all(b"patient").unwrap();
    guest.driver.start(u64::MAX);
    guest.post_all();
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RESPONSE);
    assert_eq!(guest.expect(VIRTIO_VSOCK_OP_RW).data, b"patient");
}

#[test]
fn a_device_reset_closes_connections_and_keeps_services() {
    let mut guest = Guest::start();
    let stream = guest.connect_to_host(1024, 5000);
    let (sender, answers) = mpsc::channel();
    let (pending, theirs) = UnixStream::pair().unwrap();
    guest
        .handle
        .connect_with(9, theirs, move |answer| sender.send(answer).unwrap())
        .unwrap();
    guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    guest.driver.reset();
    assert_ended(&stream);
    assert_ended(&pending);
    assert_eq!(
        answers.recv_timeout(PATIENCE),
        Ok(Err(ConnectError::DeviceGone))
    );
    guest.rx_idle.extend(guest.rx_posted.drain(..).map(|r| r.1));
    guest.tx_free.extend(guest.tx_busy.drain(..).map(|t| t.1));
    guest.driver.start(u64::MAX);
    guest.post_all();
    guest.send_op(1024, 5000, VIRTIO_VSOCK_OP_REQUEST);
    guest.expect(VIRTIO_VSOCK_OP_RESPONSE);
}

#[test]
fn a_handle_whose_device_is_gone_says_so() {
    let (device, handle) = Vsock::new(VsockConfig::new(CID)).unwrap();
    let stream = handle.connect(1).unwrap();
    drop(device);
    assert_ended(&stream);
    assert_eq!(handle.connect(1).unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn the_limit_of_connections_holds_for_both_sides() {
    let mut guest = Guest::start_with(VsockConfig {
        max_connections: 2,
        ..VsockConfig::new(CID)
    });
    let first = guest.connect_to_host(1024, 5000);
    let (_second, _) = guest.connect_to_guest(80);
    guest.send_op(1024, 5001, VIRTIO_VSOCK_OP_REQUEST);
    guest.expect(VIRTIO_VSOCK_OP_RST);
    let (sender, answers) = mpsc::channel();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    guest
        .handle
        .connect_with(9, theirs, move |answer| sender.send(answer).unwrap())
        .unwrap();
    assert_eq!(
        answers.recv_timeout(PATIENCE),
        Ok(Err(ConnectError::TooMany))
    );
    guest.send_op(1024, 5000, VIRTIO_VSOCK_OP_RST);
    assert_ended(&first);
    guest.send_op(1024, 5001, VIRTIO_VSOCK_OP_REQUEST);
    guest.expect(VIRTIO_VSOCK_OP_RESPONSE);
}

#[test]
fn a_tcp_stream_can_be_joined_to_a_connection() {
    let mut guest = Guest::start();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    guest.handle.connect_with(80, server, |_| ()).unwrap();
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RESPONSE);
    client.write_all(b"over tcp").unwrap();
    assert_eq!(guest.expect(VIRTIO_VSOCK_OP_RW).data, b"over tcp");
    guest.send_data(request.header.src_port, 80, b"back");
    guest.shutdown(request.header.src_port, 80, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"back");
}

#[test]
fn what_a_guest_sent_before_it_was_reset_reaches_a_slow_reader() {
    let mut guest = Guest::start();
    let stream = guest.connect_to_host(1024, 5000);
    let data = pattern(256 << 10, 11);
    for chunk in data.chunks(8 << 10) {
        guest.send_data(1024, 5000, chunk);
    }
    // At once: some of it is still in the ring, some in the device, some in the socket.
    guest.driver.reset();
    assert!(read(&stream, data.len()) == data);
    assert_ended(&stream);
}
