//! Joined connections: bytes, ends and resets both ways.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use agent::protocol::{self, Open, Target};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit, setrlimit};

use super::{self as tests, PATIENCE, assert_reset, connect, connect_to, end_of, joined, start_in};
use crate::forward::reactor::State;
use crate::forward::{Handle, pair};
use crate::tree::Tree;

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
fn a_connection_that_was_made_in_advance_waits_as_long_as_it_has_to() {
    let (door, mut reactor) = tests::reactor(Handle::new().unwrap(), Tree::own().unwrap());
    let host = UnixStream::connect_addr(&door).unwrap();
    let waits = |state: &State| matches!(state, State::Greeting(said) if said.deadline.is_none());
    while reactor.states.count(waits) == 0 {
        reactor.round().unwrap();
    }
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = service.local_addr().unwrap().port();
    let serving = thread::spawn(move || {
        let mut guest = service.accept().unwrap().0;
        guest.read_exact(&mut [0; 4]).unwrap();
        guest.write_all(b"response").unwrap();
    });
    protocol::send(&host, &Open::Dial(Target::Loopback(port))).unwrap();
    (&host).write_all(b"some").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    while reactor.states.len() > 1 {
        reactor.round().unwrap();
    }
    serving.join().unwrap();
    assert_eq!(io::read_to_string(&host).unwrap(), "response");
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

#[test]
fn a_service_that_ends_first_still_gets_all_that_the_host_sends() {
    let (host, guest) = joined();
    guest.shutdown(Shutdown::Write).unwrap();
    assert_eq!(end_of(&host).unwrap(), 0);
    let sent = pattern(3 << 20, 3);
    let at_guest = read_all(guest);
    (&host).write_all(&sent).unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert!(at_guest.join().unwrap() == sent);
}

/// Writes until nothing more is taken, and tells how much was.
fn fill(stream: impl AsFd) -> usize {
    rustix::io::ioctl_fionbio(&stream, true).unwrap();
    let bytes = vec![1; 1 << 20];
    let mut taken = 0;
    let mut refusals = 0;
    // What is on its way makes room once more, so one refusal is not the last word.
    while refusals < 50 {
        match rustix::io::write(&stream, &bytes) {
            Ok(length) => {
                taken += length;
                refusals = 0;
            }
            Err(Errno::AGAIN) => {
                refusals += 1;
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) => panic!("{error}"),
        }
    }
    rustix::io::ioctl_fionbio(&stream, false).unwrap();
    taken
}

#[test]
fn a_reader_that_stops_stops_its_writer_and_nobody_else() {
    let (stalled_host, stalled_guest) = joined();
    let (host, guest) = joined();
    // The kernel's own buffers take some megabytes; without back-pressure it would never end.
    let (down, up) = (fill(&stalled_guest), fill(&stalled_host));
    assert!(down < 64 << 20 && up < 64 << 20, "{down} and {up} bytes");
    let at_host = read_all(host);
    let sent = pattern(8 << 20, 4);
    (&guest).write_all(&sent).unwrap();
    drop(guest);
    assert!(at_host.join().unwrap() == sent);
    // What was held back is all there.
    for (reader, taken) in [(stalled_host.as_fd(), down), (stalled_guest.as_fd(), up)] {
        let mut left = taken;
        let mut buffer = vec![0; 1 << 16];
        while left > 0 {
            left -= rustix::io::read(reader, &mut buffer).unwrap();
        }
    }
}

#[test]
fn a_reset_overtakes_what_a_stalled_reader_has_no_room_for() {
    // The service does not read, and the host gives up.
    let (host, guest) = joined();
    fill(&host);
    drop(host);
    let error = drain(&guest);
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    // The host does not read, and the service gives up.
    let (host, guest) = joined();
    fill(&guest);
    pair::reset(&guest);
    drop(guest);
    let mut buffer = vec![0; 1 << 16];
    while let Ok(1..) = (&host).read(&mut buffer) {}
    assert_reset(&host);
}

/// Reads to the error.
fn drain(mut from: impl Read) -> io::Error {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => panic!("an end where a reset was expected"),
            Ok(_) => {}
            Err(error) => return error,
        }
    }
}

#[test]
fn what_a_service_said_before_it_reset_the_connection_arrives() {
    let (mut host, mut guest) = joined();
    guest.write_all(b"413 too large").unwrap();
    host.write_all(&pattern(64 << 10, 5)).unwrap();
    // Closed with bytes unread, which are there from here on: the kernel resets the connection.
    guest.peek(&mut [0]).unwrap();
    drop(guest);
    let mut response = [0; 13];
    host.read_exact(&mut response).unwrap();
    assert_eq!(&response, b"413 too large");
    while let Ok(1..) = host.read(&mut [0; 64]) {}
    assert_reset(&host);
}

#[test]
fn a_first_message_that_comes_in_pieces_is_understood() {
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = service.local_addr().unwrap().port();
    let door = start_in(Tree::own().unwrap());
    let mut host = UnixStream::connect_addr(&door).unwrap();
    let mut message = Vec::new();
    protocol::send(&mut message, &Open::Dial(Target::Loopback(port))).unwrap();
    for byte in message {
        host.write_all(&[byte]).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
    host.write_all(b"and on").unwrap();
    let mut guest = service.accept().unwrap().0;
    let mut bytes = [0; 6];
    guest.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"and on");
}

#[test]
fn what_follows_the_first_message_at_once_is_not_lost() {
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = service.local_addr().unwrap().port();
    let door = start_in(Tree::own().unwrap());
    let mut message = Vec::new();
    protocol::send(&mut message, &Open::Dial(Target::Loopback(port))).unwrap();
    message.extend_from_slice(b"everything in one piece");
    let mut host = UnixStream::connect_addr(&door).unwrap();
    host.write_all(&message).unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let mut request = String::new();
    let mut guest = service.accept().unwrap().0;
    guest.read_to_string(&mut request).unwrap();
    assert_eq!(request, "everything in one piece");
}

#[test]
fn thousands_of_connections_at_once_all_carry_bytes() {
    let limit = getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    // Each has four descriptors here, and other tests run beside this one.
    let room = limit.maximum.map_or(usize::MAX, |limit| limit as usize);
    let count = (room.saturating_sub(4096) / 4).min(2000);
    let door = start_in(Tree::own().unwrap());
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::listen(&service, 4096).unwrap();
    let port = service.local_addr().unwrap().port();
    let accepting = thread::spawn(move || {
        let accept = |_| service.accept().unwrap().0;
        (0..count).map(accept).collect::<Vec<TcpStream>>()
    });
    let open = Open::Dial(Target::Loopback(port));
    let hosts: Vec<UnixStream> = (0..count)
        .map(|number| {
            let mut host = connect_to(&door, &open);
            host.write_all(&(number as u32).to_le_bytes()).unwrap();
            host
        })
        .collect();
    let guests = accepting.join().unwrap();
    // Each service sends back the number that its host sent, and a byte more.
    for mut guest in &guests {
        guest.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut number = [0; 4];
        guest.read_exact(&mut number).unwrap();
        guest.write_all(&[&number[..], b"!"].concat()).unwrap();
    }
    for (number, mut host) in hosts.iter().enumerate() {
        let mut back = [0; 5];
        host.read_exact(&mut back).unwrap();
        assert_eq!(back, *[&(number as u32).to_le_bytes()[..], b"!"].concat());
    }
}
