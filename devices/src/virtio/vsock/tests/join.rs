//! Connections that are one with a host stream: what comes first, and resets passed on both ways.

use std::net::{Shutdown, TcpListener, TcpStream};

use super::*;

/// A TCP connection on the loopback: the client, and what its listener accepted.
pub fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    (client, listener.accept().unwrap().0)
}

fn unix_pair() -> (UnixStream, UnixStream) {
    let (client, server) = UnixStream::pair().unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    (client, server)
}

/// Makes the close of `stream` a reset.
pub fn reset(stream: TcpStream) {
    let linger = Some(Duration::ZERO);
    rustix::net::sockopt::set_socket_linger(&stream, linger).unwrap();
}

pub fn assert_reset(mut stream: impl Read) {
    let mut rest = Vec::new();
    let error = stream.read_to_end(&mut rest).expect_err("a reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn the_prelude_arrives_before_what_the_stream_gives() {
    let mut guest = Guest::start();
    let (mut client, server) = tcp_pair();
    client.write_all(b"the stream's own").unwrap();
    guest.join(b"first ", server);
    let mut data = Vec::new();
    while data.len() < 22 {
        data.extend(guest.expect(VIRTIO_VSOCK_OP_RW).data);
    }
    assert_eq!(data, b"first the stream's own");
}

#[test]
fn the_prelude_keeps_to_the_guests_credit_however_small() {
    let mut guest = Guest::start();
    guest.buf_alloc = 7;
    let (mut client, server) = tcp_pair();
    let prelude = pattern(100, 21);
    let port = guest.join(&prelude, server);
    client.write_all(b"after").unwrap();
    let mut data = Vec::new();
    while data.len() < 105 {
        let packet = guest.receive();
        match packet.op() {
            VIRTIO_VSOCK_OP_RW => {
                assert!(packet.data.len() <= 7, "more than there was credit for");
                data.extend(packet.data);
                guest.fwd_cnt = data.len() as u32;
                guest.send_op(port, 80, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
            }
            op => assert_eq!(op, VIRTIO_VSOCK_OP_CREDIT_REQUEST),
        }
    }
    assert_eq!(data[..100], prelude);
    assert_eq!(&data[100..], b"after");
}

#[test]
fn the_longest_prelude_is_sent_whole_and_a_longer_one_refused() {
    let mut guest = Guest::start();
    let (_client, server) = unix_pair();
    let prelude = pattern(MAX_PRELUDE, 22);
    guest.join(&prelude, server);
    assert!(guest.receive_data(MAX_PRELUDE) == prelude);
    let (client, server) = tcp_pair();
    let error = guest
        .handle
        .join(80, vec![0; MAX_PRELUDE + 1], server)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_reset(client);
}

#[test]
fn a_guest_that_refuses_resets_the_client() {
    let mut guest = Guest::start();
    let (client, server) = tcp_pair();
    guest.handle.join(80, b"open".to_vec(), server).unwrap();
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RST);
    assert_reset(client);
    guest.wait_connections(0);
}

#[test]
fn a_guest_that_does_not_answer_and_a_full_table_reset_the_client() {
    let mut guest = Guest::start_with(VsockConfig {
        connect_timeout: Duration::from_millis(10),
        max_connections: 1,
        ..VsockConfig::new(CID)
    });
    let (first, server) = tcp_pair();
    guest.handle.join(80, Vec::new(), server).unwrap();
    let (second, server) = tcp_pair();
    guest.handle.join(80, Vec::new(), server).unwrap();
    assert_reset(second);
    assert_reset(first);
    guest.wait_connections(0);
}

#[test]
fn a_device_reset_and_a_device_that_is_gone_reset_the_client() {
    let mut guest = Guest::start();
    let (client, server) = tcp_pair();
    guest.join(b"", server);
    guest.driver.reset();
    assert_reset(client);

    let (device, handle) = Vsock::new(VsockConfig::new(CID)).unwrap();
    let (early, server) = tcp_pair();
    handle.join(80, Vec::new(), server).unwrap();
    drop(device);
    assert_reset(early);
    let (late, server) = tcp_pair();
    let error = handle.join(80, Vec::new(), server).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    assert_reset(late);
}

#[test]
fn the_answer_to_a_join_is_told() {
    let mut guest = Guest::start();
    let (_client, server) = tcp_pair();
    let (sender, answers) = mpsc::channel();
    guest
        .handle
        .join_with(80, Vec::new(), server, move |answer| {
            sender.send(answer).unwrap();
        })
        .unwrap();
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RST);
    assert_eq!(
        answers.recv_timeout(PATIENCE),
        Ok(Err(ConnectError::Refused))
    );
}

#[test]
fn a_reset_by_the_guest_amid_its_data_resets_the_client() {
    let mut guest = Guest::start();
    let (client, server) = tcp_pair();
    let port = guest.join(b"", server);
    guest.send_data(port, 80, b"half a sen");
    assert_eq!(guest.receive_if_any(), None);
    guest.send_op(port, 80, VIRTIO_VSOCK_OP_RST);
    assert_reset(client);
    guest.wait_connections(0);
}

#[test]
fn a_guest_socket_closed_without_an_end_resets_the_client_and_is_confirmed() {
    let mut guest = Guest::start();
    let (client, server) = tcp_pair();
    let port = guest.join(b"", server);
    // More than the client's buffers take, so that some waits in the device: none of it lingers.
    for _ in 0..8 {
        guest.send_data(port, 80, &pattern(32 << 10, 23));
    }
    guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_BOTH);
    guest.receive_until(VIRTIO_VSOCK_OP_RST);
    assert_reset(client);
    guest.wait_connections(0);
}

#[test]
fn a_guest_that_only_stopped_reading_before_it_closed_resets_the_client() {
    let mut guest = Guest::start();
    let (client, server) = tcp_pair();
    let port = guest.join(b"", server);
    guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE);
    guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_BOTH);
    guest.expect(VIRTIO_VSOCK_OP_RST);
    assert_reset(client);
}

#[test]
fn all_that_a_guest_sent_before_its_end_reaches_a_slow_client() {
    for close in [VIRTIO_VSOCK_OP_SHUTDOWN, VIRTIO_VSOCK_OP_RST] {
        let mut guest = Guest::start();
        let (client, server) = tcp_pair();
        // So that the kernel takes little of it.
        rustix::net::sockopt::set_socket_send_buffer_size(&server, 16 << 10).unwrap();
        let port = guest.join(b"", server);
        let data = pattern(256 << 10, 24);
        for chunk in data.chunks(32 << 10) {
            guest.send_data(port, 80, chunk);
        }
        guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
        if close == VIRTIO_VSOCK_OP_SHUTDOWN {
            guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_BOTH);
            guest.receive_until(VIRTIO_VSOCK_OP_RST);
        } else {
            guest.send_op(port, 80, VIRTIO_VSOCK_OP_RST);
        }
        guest.settle();
        assert!(read_all(&client) == data);
        guest.wait_connections(0);
    }
}

#[test]
fn what_a_guest_sent_before_its_end_survives_the_device() {
    let mut guest = Guest::start();
    let (client, server) = tcp_pair();
    rustix::net::sockopt::set_socket_send_buffer_size(&server, 16 << 10).unwrap();
    let port = guest.join(b"", server);
    let data = pattern(256 << 10, 25);
    for chunk in data.chunks(32 << 10) {
        guest.send_data(port, 80, chunk);
    }
    guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
    guest.settle();
    guest.driver.reset();
    assert!(read_all(&client) == data);
}

#[test]
fn either_direction_ends_alone_and_the_other_goes_on() {
    let mut guest = Guest::start();
    // The guest ends first.
    let (mut client, server) = tcp_pair();
    let port = guest.join(b"", server);
    guest.send_data(port, 80, b"answer");
    guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
    assert_eq!(read_all(&client), b"answer");
    client.write_all(b"more").unwrap();
    assert_eq!(guest.expect(VIRTIO_VSOCK_OP_RW).data, b"more");
    client.shutdown(Shutdown::Write).unwrap();
    let (data, flags) = guest.receive_until(VIRTIO_VSOCK_OP_SHUTDOWN);
    assert_eq!((data.len(), flags), (0, VIRTIO_VSOCK_SHUTDOWN_BOTH));
    guest.send_op(port, 80, VIRTIO_VSOCK_OP_RST);
    guest.wait_connections(0);

    // The client ends first.
    let (mut client, server) = tcp_pair();
    let port = guest.join(b"", server);
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let (data, flags) = guest.receive_until(VIRTIO_VSOCK_OP_SHUTDOWN);
    assert_eq!(data, b"question");
    assert_eq!(flags, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
    guest.send_data(port, 80, b"answer");
    guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
    assert_eq!(read_all(&client), b"answer");
    let (_, flags) = guest.receive_until(VIRTIO_VSOCK_OP_SHUTDOWN);
    assert_eq!(flags, VIRTIO_VSOCK_SHUTDOWN_BOTH);
    guest.send_op(port, 80, VIRTIO_VSOCK_OP_RST);
    guest.wait_connections(0);
}

#[test]
fn a_client_that_resets_resets_the_guests_end_after_its_data() {
    let mut guest = Guest::start();
    let (mut client, server) = tcp_pair();
    guest.join(b"open ", server);
    client.write_all(b"and gone").unwrap();
    reset(client);
    let (data, flags) = guest.receive_until(VIRTIO_VSOCK_OP_RST);
    assert!(b"open and gone".starts_with(&data), "{data:?}");
    assert_eq!(
        flags & VIRTIO_VSOCK_SHUTDOWN_F_SEND,
        0,
        "no end was announced"
    );
    guest.wait_connections(0);
}

#[test]
fn a_client_that_resets_after_its_end_resets_the_guests_end() {
    let mut guest = Guest::start();
    let (client, server) = tcp_pair();
    let port = guest.join(b"", server);
    client.shutdown(Shutdown::Write).unwrap();
    let (_, flags) = guest.receive_until(VIRTIO_VSOCK_OP_SHUTDOWN);
    assert_eq!(flags, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
    guest.send_data(port, 80, b"nobody reads this");
    guest.settle();
    // A close with unread data is a reset, too.
    drop(client);
    guest.receive_until(VIRTIO_VSOCK_OP_RST);
    guest.wait_connections(0);
}

#[test]
fn a_unix_stream_closed_before_the_guests_end_resets_the_guests_end_after_its_data() {
    let mut guest = Guest::start();
    for half_closed in [false, true] {
        let (mut client, server) = unix_pair();
        guest.join(b"", server);
        client.write_all(b"written, then closed").unwrap();
        if half_closed {
            client.shutdown(Shutdown::Write).unwrap();
            let (data, _) = guest.receive_until(VIRTIO_VSOCK_OP_SHUTDOWN);
            assert_eq!(data, b"written, then closed");
            drop(client);
            guest.receive_until(VIRTIO_VSOCK_OP_RST);
        } else {
            drop(client);
            let (data, _) = guest.receive_until(VIRTIO_VSOCK_OP_RST);
            assert_eq!(data, b"written, then closed");
        }
        guest.wait_connections(0);
    }
}

#[test]
fn a_unix_stream_closed_after_both_ends_is_an_orderly_close() {
    let mut guest = Guest::start();
    let (mut client, server) = unix_pair();
    let port = guest.join(b"", server);
    guest.send_data(port, 80, b"all");
    guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
    assert_eq!(read_all(&client), b"all");
    client.write_all(b"last").unwrap();
    drop(client);
    let (data, flags) = guest.receive_until(VIRTIO_VSOCK_OP_SHUTDOWN);
    assert_eq!(data, b"last");
    assert_eq!(flags, VIRTIO_VSOCK_SHUTDOWN_BOTH);
    guest.send_op(port, 80, VIRTIO_VSOCK_OP_RST);
    guest.wait_connections(0);
}

#[test]
fn a_unix_stream_is_closed_without_an_end_where_the_guest_resets() {
    let mut guest = Guest::start();
    let (client, server) = unix_pair();
    let port = guest.join(b"", server);
    guest.send_data(port, 80, b"cut");
    assert_eq!(read(&client, 3), b"cut");
    guest.send_op(port, 80, VIRTIO_VSOCK_OP_RST);
    assert_ended(&client);
    let mut client = client;
    let error = client.write_all(b"x").expect_err("closed both ways");
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
}

#[test]
fn urgent_data_and_descriptors_among_the_data_hold_nothing_up() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    let mut guest = Guest::start();
    let expect = |guest: &mut Guest, wanted: &[u8]| {
        let mut data = Vec::new();
        while data.len() < wanted.len() {
            data.extend(guest.expect(VIRTIO_VSOCK_OP_RW).data);
        }
        assert_eq!(data, wanted);
    };
    let (mut client, server) = tcp_pair();
    guest.join(b"", server);
    for _ in 0..3 {
        client.write_all(b"before ").unwrap();
        rustix::net::send(&client, b"!", SendFlags::OOB).unwrap();
        client.write_all(b"after").unwrap();
        expect(&mut guest, b"before after");
    }

    let (mut client, server) = unix_pair();
    guest.join(b"", server);
    let file = tempfile::tempfile().unwrap();
    let passed = [std::os::fd::AsFd::as_fd(&file)];
    for _ in 0..3 {
        client.write_all(b"before ").unwrap();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&passed)));
        let bytes = [std::io::IoSlice::new(b"with ")];
        rustix::net::sendmsg(&client, &bytes, &mut control, SendFlags::empty()).unwrap();
        client.write_all(b"after").unwrap();
        expect(&mut guest, b"before with after");
    }
}
