//! Joined connections: bytes, ends and resets both ways.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::thread::{self, JoinHandle};

use agent::protocol::{Open, Target};

use super::{assert_reset, connect, end_of, joined};
use crate::forward::pair;

fn read_all(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Bytes that are the same nowhere within a few megabytes.
fn pattern(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(|_| next()).collect()
}

#[test]
fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let (mut host, mut guest) = joined();
    host.write_all(b"request").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let mut request = String::new();
    guest.read_to_string(&mut request).unwrap();
    assert_eq!(request, "request");
    guest
        .write_all(b"response after the end of the request")
        .unwrap();
    drop(guest);
    let mut response = String::new();
    host.read_to_string(&mut response).unwrap();
    assert_eq!(response, "response after the end of the request");
}

#[test]
fn megabytes_arrive_unchanged_both_ways_at_once() {
    let (host, guest) = joined();
    let (up, down) = (pattern(24 << 20, 1), pattern(24 << 20, 2));
    let at_guest = read_all(guest.try_clone().unwrap());
    let at_host = read_all(host.try_clone().unwrap());
    let (sent_up, sent_down) = (up.clone(), down.clone());
    let writer = thread::spawn(move || {
        (&host).write_all(&sent_up).unwrap();
        host.shutdown(Shutdown::Write).unwrap();
    });
    (&guest).write_all(&sent_down).unwrap();
    guest.shutdown(Shutdown::Write).unwrap();
    writer.join().unwrap();
    assert!(at_guest.join().unwrap() == up, "the guest got other bytes");
    assert!(at_host.join().unwrap() == down, "the host got other bytes");
}

#[test]
fn a_service_that_resets_is_a_host_connection_closed_without_an_end() {
    let (mut host, guest) = joined();
    host.write_all(b"unread").unwrap();
    pair::reset(&guest);
    drop(guest);
    assert_reset(&host);
}

#[test]
fn a_host_that_closes_without_an_end_is_a_reset_for_the_service() {
    let (mut host, mut guest) = joined();
    host.write_all(b"last words").unwrap();
    drop(host);
    let mut words = [0; 10];
    guest.read_exact(&mut words).unwrap();
    assert_eq!(&words, b"last words");
    let error = end_of(&guest).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn a_port_that_nobody_listens_at_closes_the_hosts_connection() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let host = connect(&Open::Dial(Target::Loopback(port)));
    assert_reset(&host);
}

#[test]
fn a_service_on_the_ipv6_loopback_only_is_reached() {
    let Ok(service) = TcpListener::bind("[::1]:0") else {
        eprintln!("this machine has no IPv6 loopback: nothing to test");
        return;
    };
    let port = service.local_addr().unwrap().port();
    let mut host = connect(&Open::Dial(Target::Loopback(port)));
    let mut guest = service.accept().unwrap().0;
    guest.write_all(b"hello").unwrap();
    let mut hello = [0; 5];
    host.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
}
