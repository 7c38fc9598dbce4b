//! Datagrams and their flows.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::thread;

use agent::protocol::{self, Datagram, Open, Target};

use super::{PATIENCE, connect, connect_to, start_in};
use crate::forward::datagram::Message;
use crate::tree::Tree;

/// A service that sends back what it gets, until it gets nothing for long; and its port.
fn echo(address: &str) -> Option<u16> {
    let service = UdpSocket::bind(address).ok()?;
    service.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = service.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, from)) = service.recv_from(&mut buffer) {
            service.send_to(&buffer[..length], from).unwrap();
        }
    });
    Some(port)
}

fn send(host: &UnixStream, flow: u32, to: Target, payload: &[u8]) {
    let payload = payload.to_vec();
    protocol::send(host, &Datagram::Send { flow, to, payload }).unwrap();
}

fn receive(host: &UnixStream) -> Datagram {
    let message = protocol::receive(host).expect("the connection broke");
    message.expect("the connection ended")
}

fn received(host: &UnixStream) -> (u32, SocketAddr, Vec<u8>) {
    match receive(host) {
        Datagram::Received {
            flow,
            from,
            payload,
        } => (flow, from, payload),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_message_is_on_the_wire_what_the_protocol_says() {
    let from: SocketAddr = "[::1]:53".parse().unwrap();
    let payload = vec![0, 255, 3];
    let to = Target::Loopback(9);
    let pairs = [
        (
            Datagram::Send {
                flow: 300,
                to: to.clone(),
                payload: payload.clone(),
            },
            Message::Send {
                flow: 300,
                to,
                payload: &payload,
            },
        ),
        (
            Datagram::Received {
                flow: 1,
                from,
                payload: payload.clone(),
            },
            Message::Received {
                flow: 1,
                from,
                payload: &payload,
            },
        ),
        (Datagram::Closed { flow: 7 }, Message::Closed { flow: 7 }),
    ];
    for (owned, borrowed) in pairs {
        let wire = postcard::to_stdvec(&owned).unwrap();
        assert_eq!(postcard::to_stdvec(&borrowed).unwrap(), wire);
        assert_eq!(
            postcard::from_bytes::<Message<'_>>(&wire).unwrap(),
            borrowed
        );
    }
}

#[test]
fn datagrams_of_every_length_come_back_from_a_service() {
    let port = echo("127.0.0.1:0").unwrap();
    let host = connect(&Open::Datagrams);
    for length in [0, 1, 1400, 65_507] {
        let payload = vec![7; length];
        send(&host, 5, Target::Loopback(port), &payload);
        let (flow, from, back) = received(&host);
        assert_eq!((flow, from), (5, (Ipv4Addr::LOCALHOST, port).into()));
        assert!(
            back == payload,
            "{length} bytes came back as {}",
            back.len()
        );
    }
}

#[test]
fn a_service_on_the_ipv6_loopback_only_is_reached_with_the_first_datagram() {
    let Some(port) = echo("[::1]:0") else {
        eprintln!("this machine has no IPv6 loopback: nothing to test");
        return;
    };
    let host = connect(&Open::Datagrams);
    for _ in 0..2 {
        send(&host, 1, Target::Loopback(port), b"anybody");
        let (_, from, back) = received(&host);
        assert_eq!(from, SocketAddr::new("::1".parse().unwrap(), port));
        assert_eq!(back, b"anybody");
    }
}

#[test]
fn a_service_that_comes_later_is_reached() {
    let place = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = place.local_addr().unwrap().port();
    drop(place);
    let host = connect(&Open::Datagrams);
    for _ in 0..3 {
        send(&host, 1, Target::Loopback(port), b"too early");
    }
    // What another flow gets tells that those were sent.
    let other = echo("127.0.0.1:0").unwrap();
    send(&host, 2, Target::Loopback(other), b"mark");
    assert_eq!(received(&host).0, 2);
    let late = echo(&format!("127.0.0.1:{port}")).unwrap();
    // Which of both addresses is asked next depends on who refused last.
    for _ in 0..2 {
        send(&host, 1, Target::Loopback(late), b"in time");
    }
    assert_eq!(received(&host).2, b"in time");
}

#[test]
fn one_flow_speaks_with_several_peers_and_no_stranger_gets_in() {
    let ports: Vec<u16> = (0..3).map(|_| echo("127.0.0.1:0").unwrap()).collect();
    let host = connect(&Open::Datagrams);
    let address = |port| Target::Host {
        host: "127.0.0.1".to_owned(),
        port,
    };
    for port in &ports {
        send(&host, 1, address(*port), b"hello");
        assert_eq!(received(&host).1.port(), *port);
    }
    // A peer that tells from where the flow sends, and lets a stranger answer in its place.
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    send(&host, 1, address(peer.local_addr().unwrap().port()), b"?");
    let (_, flow) = peer.recv_from(&mut [0; 8]).unwrap();
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..100 {
        stranger.send_to(b"intruder", flow).unwrap();
    }
    peer.send_to(b"answer", flow).unwrap();
    assert_eq!(received(&host).2, b"answer");
}

#[test]
fn a_thousand_flows_are_told_apart() {
    let port = echo("127.0.0.1:0").unwrap();
    let host = connect(&Open::Datagrams);
    // Few enough at a time for the service's socket.
    for batch in (0..1000).collect::<Vec<u32>>().chunks(50) {
        for flow in batch {
            send(&host, *flow, Target::Loopback(port), &flow.to_le_bytes());
        }
        let answers: HashSet<u32> = batch
            .iter()
            .map(|_| {
                let (flow, _, payload) = received(&host);
                assert_eq!(payload, flow.to_le_bytes());
                flow
            })
            .collect();
        assert_eq!(answers.len(), batch.len());
    }
}

#[test]
fn the_flow_that_was_idle_longest_makes_room() {
    let door = start_in(Tree::own().unwrap());
    let host = connect_to(&door, &Open::Datagrams);
    let port = echo("127.0.0.1:0").unwrap();
    send(&host, 0, Target::Loopback(port), b"first");
    received(&host);
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let nowhere = silent.local_addr().unwrap().port();
    for flow in 1..=4096 {
        send(&host, flow, Target::Loopback(nowhere), b"");
    }
    assert_eq!(receive(&host), Datagram::Closed { flow: 0 });
    // Its number is free for a new one, for which another goes.
    send(&host, 0, Target::Loopback(port), b"again");
    let mut seen = [receive(&host), receive(&host)];
    seen.sort_by_key(|message| matches!(message, Datagram::Closed { .. }));
    assert!(matches!(&seen[0], Datagram::Received { flow: 0, .. }));
    // Which of the others it is depends on which were sent in one turn.
    assert!(matches!(&seen[1], Datagram::Closed { flow: 1.. }));
}

#[test]
fn a_host_that_does_not_read_loses_datagrams_and_gets_whole_messages_later() {
    let host = connect(&Open::Datagrams);
    let guest = UdpSocket::bind("127.0.0.1:0").unwrap();
    send(
        &host,
        1,
        Target::Loopback(guest.local_addr().unwrap().port()),
        b"?",
    );
    let (_, flow) = guest.recv_from(&mut [0; 8]).unwrap();
    // Many times what all buffers on the way hold.
    let sent = 2000;
    for number in 0..sent {
        let mut payload = vec![number as u8; 16 << 10];
        payload[..4].copy_from_slice(&(number as u32).to_le_bytes());
        guest.send_to(&payload, flow).unwrap();
    }
    let mut last = None;
    let mut count = 0;
    // Those behind the flood are lost as well, until there is room again.
    host.set_nonblocking(false).unwrap();
    loop {
        guest.send_to(b"end", flow).unwrap();
        let (_, _, payload) = received(&host);
        if payload == b"end" {
            break;
        }
        let number = u32::from_le_bytes(payload[..4].try_into().unwrap());
        assert!(payload[4..].iter().all(|byte| *byte == number as u8));
        assert!(last < Some(number), "{number} after {last:?}");
        last = Some(number);
        count += 1;
    }
    assert!(count < sent, "nothing was lost, so nothing was shown");
}

#[test]
fn what_cannot_be_sent_harms_nothing() {
    let port = echo("127.0.0.1:0").unwrap();
    let host = connect(&Open::Datagrams);
    let name = |host: &str, port| Target::Host {
        host: host.to_owned(),
        port,
    };
    for to in [
        Target::Loopback(0),
        Target::Unix(b"/dev/log".to_vec()),
        name("", 1),
        name("a b", 1),
        name("255.255.255.255", 1),
    ] {
        send(&host, 1, to, b"lost");
    }
    // Longer than any datagram, and a flow that does not exist.
    send(&host, 1, Target::Loopback(port), &vec![0; 65_600]);
    protocol::send(&host, &Datagram::Closed { flow: 99 }).unwrap();
    send(&host, 1, Target::Loopback(port), b"arrives");
    assert_eq!(received(&host).2, b"arrives");
}
