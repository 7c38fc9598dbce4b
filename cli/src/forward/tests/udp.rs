//! Published UDP ports.

use super::*;
use std::net::UdpSocket;

/// A program of the guest that sends every datagram back; it counts those who sent.
fn udp_echo() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(&buffer[..len], from).unwrap();
        }
    });
    at
}

fn client(port: u16) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(("127.0.0.1", port)).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    socket
}

/// Asks until there is an answer, as UDP is asked.
fn ask_datagram(socket: &UdpSocket, question: &[u8]) -> Vec<u8> {
    let mut buffer = vec![0; 65_536];
    let deadline = Instant::now() + PATIENCE;
    loop {
        socket.send(question).unwrap();
        match socket.recv(&mut buffer) {
            Ok(len) => return buffer[..len].to_vec(),
            Err(_) => assert!(Instant::now() < deadline, "no answer"),
        }
    }
}

#[test]
fn two_hundred_sources_have_a_flow_each() {
    let port = free_port();
    let (forwarder, guest) = publishing(&[format!("{port}:53/udp")]);
    guest.datagrams_at(53, udp_echo());
    let clients: Vec<_> = (0..200).map(|_| client(port)).collect();
    for round in 0..3u32 {
        for (number, client) in (0u32..).zip(&clients) {
            let question = [number.to_le_bytes(), round.to_le_bytes()].concat();
            // An answer to a question that was asked twice may come late.
            while ask_datagram(client, &question) != question {}
        }
    }
    assert_eq!(guest.flows(), (200, 0));
    assert_eq!(forwarder.list().unwrap()[0].connections, 200);
}

#[test]
fn datagrams_of_any_length_go_through() {
    let port = free_port();
    let (_forwarder, guest) = publishing(&[format!("{port}:53/udp")]);
    guest.datagrams_at(53, udp_echo());
    let client = client(port);
    for len in [0, 1, 1472, 9000, 65_507] {
        let question = vec![len as u8; len];
        assert_eq!(ask_datagram(&client, &question), question, "{len} bytes");
    }
}

#[test]
fn ports_that_are_removed_end_their_flows() {
    let port = free_port();
    let (forwarder, guest) = publishing(&[format!("{port}:53/udp")]);
    guest.datagrams_at(53, udp_echo());
    let clients: Vec<_> = (0..10).map(|_| client(port)).collect();
    for client in &clients {
        ask_datagram(client, b"x");
    }
    forwarder.remove(&"53/udp".parse().unwrap()).unwrap();
    eventually("closed flows", || guest.flows() == (10, 10));
    assert!(
        UdpSocket::bind(("127.0.0.1", port)).is_ok(),
        "the port is free again"
    );
}

#[test]
fn flows_start_anew_with_the_next_agent() {
    let port = free_port();
    let (forwarder, guest) = publishing(&[format!("{port}:53/udp")]);
    guest.datagrams_at(53, udp_echo());
    let client = client(port);
    assert_eq!(ask_datagram(&client, b"one"), b"one");
    guest.go();
    let next = FakeGuest::new();
    next.datagrams_at(53, udp_echo());
    forwarder.attach(next.clone()).unwrap();
    while ask_datagram(&client, b"two") != b"two" {}
    assert_eq!(next.flows().0, 1);
}
