//! Connections that are made before there is anybody to use them.

use super::join::{assert_reset, reset, tcp_pair};
use super::*;

/// A connection that the guest has accepted, and was sent `prelude` on: the host's port, too.
fn reserve(guest: &mut Guest, prelude: &[u8]) -> (Reserved, u32) {
    let (sender, answers) = mpsc::channel();
    let answer = move |answer| sender.send(answer).unwrap();
    guest.handle.reserve(80, prelude.to_vec(), answer).unwrap();
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    assert_eq!(request.header.dst_port, 80);
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RESPONSE);
    if !prelude.is_empty() {
        assert_eq!(guest.expect(VIRTIO_VSOCK_OP_RW).data, prelude);
    }
    let reserved = answers.recv_timeout(PATIENCE).unwrap().unwrap();
    assert!(reserved.is_open());
    (reserved, request.header.src_port)
}

/// What the guest gets on the connection from this port of the host.
fn receive_from(guest: &mut Guest, port: u32, len: usize) -> Vec<u8> {
    let mut data = Vec::new();
    while data.len() < len {
        let packet = guest.expect(VIRTIO_VSOCK_OP_RW);
        assert_eq!(packet.header.src_port, port);
        data.extend(packet.data);
    }
    data
}

#[test]
fn a_stream_is_joined_without_asking_the_guest_again() {
    let mut guest = Guest::start();
    let (reserved, port) = reserve(&mut guest, b"later");
    let (mut client, server) = tcp_pair();
    client.write_all(b" own").unwrap();
    guest
        .handle
        .join_reserved(reserved, b"first".to_vec(), server)
        .unwrap();
    assert_eq!(receive_from(&mut guest, port, 9), b"first own");
    guest.send_data(port, 80, b"answer");
    guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
    assert_eq!(read_all(&client), b"answer");
    assert_eq!(guest.connections(), 1);
    reset(client);
    guest.receive_until(VIRTIO_VSOCK_OP_RST);
    guest.wait_connections(0);
}

#[test]
fn the_client_of_a_reserved_connection_sees_a_reset_of_the_guest() {
    let mut guest = Guest::start();
    let (reserved, port) = reserve(&mut guest, b"");
    let (client, server) = tcp_pair();
    guest
        .handle
        .join_reserved(reserved, b"first".to_vec(), server)
        .unwrap();
    assert_eq!(receive_from(&mut guest, port, 5), b"first");
    guest.send_op(port, 80, VIRTIO_VSOCK_OP_RST);
    assert_reset(client);
    guest.wait_connections(0);
}

#[test]
fn what_the_guest_had_no_room_for_yet_still_comes_first() {
    let mut guest = Guest::start();
    guest.buf_alloc = 3;
    let (sender, answers) = mpsc::channel();
    let answer = move |answer| sender.send(answer).unwrap();
    guest.handle.reserve(80, b"later".to_vec(), answer).unwrap();
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RESPONSE);
    let reserved = answers.recv_timeout(PATIENCE).unwrap().unwrap();
    let port = request.header.src_port;
    assert_eq!(guest.expect(VIRTIO_VSOCK_OP_RW).data, b"lat");
    guest.expect(VIRTIO_VSOCK_OP_CREDIT_REQUEST);
    let (_client, server) = tcp_pair();
    guest
        .handle
        .join_reserved(reserved, b"first".to_vec(), server)
        .unwrap();
    guest.buf_alloc = 100;
    guest.send_op(port, 80, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
    assert_eq!(receive_from(&mut guest, port, 7), b"erfirst");
}

#[test]
fn a_connection_that_the_guest_closed_is_replaced_by_a_new_one() {
    let mut guest = Guest::start();
    let (reserved, port) = reserve(&mut guest, b"later");
    guest.send_op(port, 80, VIRTIO_VSOCK_OP_RST);
    guest.wait_connections(0);
    assert!(!reserved.is_open());
    let (_client, server) = tcp_pair();
    guest
        .handle
        .join_reserved(reserved, b"first".to_vec(), server)
        .unwrap();
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RESPONSE);
    let data = receive_from(&mut guest, request.header.src_port, 10);
    assert_eq!(data, b"laterfirst");
}

#[test]
fn a_guest_that_speaks_or_ends_first_does_not_reach_the_client() {
    for speaks in [true, false] {
        let mut guest = Guest::start();
        let (reserved, port) = reserve(&mut guest, b"");
        match speaks {
            true => guest.send_data(port, 80, b"surprise"),
            false => guest.shutdown(port, 80, VIRTIO_VSOCK_SHUTDOWN_F_SEND),
        }
        guest.settle();
        let (client, server) = tcp_pair();
        guest
            .handle
            .join_reserved(reserved, b"first".to_vec(), server)
            .unwrap();
        let mut ours = None;
        // The new request and the end of the old connection come in either order.
        while ours.is_none() || guest.connections() > 1 {
            let Some(packet) = guest.receive_if_any() else {
                continue;
            };
            match packet.op() {
                VIRTIO_VSOCK_OP_REQUEST => {
                    guest.answer(&packet.header, VIRTIO_VSOCK_OP_RESPONSE);
                    ours = Some(packet.header.src_port);
                }
                VIRTIO_VSOCK_OP_RST | VIRTIO_VSOCK_OP_SHUTDOWN => {
                    assert_eq!(packet.header.src_port, port);
                    guest.answer(&packet.header, VIRTIO_VSOCK_OP_RST);
                }
                op => assert_eq!(op, VIRTIO_VSOCK_OP_RW),
            }
        }
        let ours = ours.unwrap();
        guest.send_data(ours, 80, b"answer");
        guest.shutdown(ours, 80, VIRTIO_VSOCK_SHUTDOWN_F_SEND);
        assert_eq!(read_all(&client), b"answer");
    }
}

#[test]
fn a_reserved_connection_that_nobody_wants_is_reset() {
    let mut guest = Guest::start();
    let (reserved, _) = reserve(&mut guest, b"later");
    drop(reserved);
    assert_eq!(guest.receive_until(VIRTIO_VSOCK_OP_RST).0, b"");
    guest.wait_connections(0);
}

#[test]
fn a_refusal_is_told_and_a_device_reset_closes_what_was_reserved() {
    let mut guest = Guest::start();
    let (sender, answers) = mpsc::channel();
    let answer = move |answer: Result<Reserved, _>| sender.send(answer.map(drop)).unwrap();
    guest.handle.reserve(80, Vec::new(), answer).unwrap();
    let request = guest.expect(VIRTIO_VSOCK_OP_REQUEST);
    guest.answer(&request.header, VIRTIO_VSOCK_OP_RST);
    let told = answers.recv_timeout(PATIENCE).unwrap();
    assert_eq!(told, Err(ConnectError::Refused));

    let (reserved, _) = reserve(&mut guest, b"");
    guest.driver.reset();
    guest.wait_connections(0);
    assert!(!reserved.is_open());
    let (client, server) = tcp_pair();
    let too_long = vec![0; MAX_PRELUDE + 1];
    let refused = guest.handle.join_reserved(reserved, too_long, server);
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_reset(client);
}
