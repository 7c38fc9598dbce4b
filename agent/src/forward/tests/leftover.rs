//! What is left of things that ended: nothing.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;

use agent::protocol::{self, Bind, FromForwarder, Open, Target, ToForwarder};

use super::connect_to;
use crate::forward::{Handle, pair, tests};
use crate::tree::Tree;

/// The guest's side: each connection ends another way.
fn serve(service: &TcpListener, count: usize) {
    for number in 0..count {
        let mut guest = service.accept().unwrap().0;
        match number % 3 {
            0 => pair::reset(&guest),
            1 => {
                let _ = guest.read(&mut [0; 16]);
            }
            _ => {
                let _ = guest.write_all(&[0; 1000]);
            }
        }
    }
}

/// The host's side: each connection ends another way too.
fn use_connection(mut host: UnixStream, number: usize) {
    match number % 4 {
        0 => {}
        1 => {
            let _ = host.write_all(b"some");
            let _ = host.shutdown(Shutdown::Write);
            let _ = host.read(&mut [0; 16]);
        }
        2 => {
            // Both ends would wait for the other's first word.
            let _ = host.shutdown(Shutdown::Write);
            while let Ok(1..) = host.read(&mut [0; 16]) {}
        }
        _ => {
            let _ = host.write_all(&[0; 3_000_000]);
        }
    }
}

#[test]
fn nothing_is_left_of_connections_however_they_end() {
    let (door, mut reactor) = tests::reactor(Handle::new().unwrap(), Tree::own().unwrap());
    let host = thread::spawn(move || {
        let service = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = service.local_addr().unwrap().port();
        let count = 240;
        let serving = thread::spawn(move || serve(&service, count));
        for number in 0..count {
            let open = Open::Dial(Target::Loopback(port));
            use_connection(connect_to(&door, &open), number);
        }
        serving.join().unwrap();
        // Refused, said nothing, said half of it, said nonsense.
        drop(connect_to(&door, &Open::Dial(Target::Loopback(port))));
        drop(connect_to(&door, &Open::Attach { token: 1 }));
        drop(UnixStream::connect_addr(&door).unwrap());
        let mut half = UnixStream::connect_addr(&door).unwrap();
        half.write_all(&[200, 0]).unwrap();
        drop(half);
        let mut nonsense = UnixStream::connect_addr(&door).unwrap();
        nonsense.write_all(&[1, 0, 0, 0, 0xff]).unwrap();
        drop(nonsense);
    });
    while !host.is_finished() || reactor.states.len() > 1 {
        wake_soon(&reactor);
        reactor.round().unwrap();
    }
    host.join().unwrap();
    assert!(reactor.tokens.is_empty());
    assert_eq!(reactor.buffers.lent(), 0);
}

#[test]
fn nothing_is_left_of_a_control_but_the_connections_that_are_joined() {
    let (door, mut reactor) = tests::reactor(Handle::new().unwrap(), Tree::own().unwrap());
    let host = thread::spawn(move || {
        let control = connect_to(&door, &Open::Forward);
        let say = |message: &ToForwarder| protocol::send(&control, message).unwrap();
        let hear = || {
            protocol::receive::<FromForwarder>(&control)
                .unwrap()
                .unwrap()
        };
        say(&ToForwarder::Watch(true));
        assert!(matches!(hear(), FromForwarder::Listeners(_)));
        say(&ToForwarder::Watch(false));
        let address = None;
        let at = Bind::Tcp { address, port: 0 };
        say(&ToForwarder::Listen { id: 1, at });
        let port = loop {
            match hear() {
                FromForwarder::Bound { result, .. } => break result.unwrap(),
                FromForwarder::Listeners(_) => {}
                other => panic!("{other:?}"),
            }
        };
        let mut tokens = Vec::new();
        let mut guests = Vec::new();
        for _ in 0..3 {
            guests.push(TcpStream::connect(("127.0.0.1", port)).unwrap());
            match hear() {
                FromForwarder::Accepted { token, .. } => tokens.push(token),
                other => panic!("{other:?}"),
            }
        }
        let token = tokens[1];
        let joined = connect_to(&door, &Open::Attach { token });
        let datagrams = connect_to(&door, &Open::Datagrams);
        drop((control, datagrams));
        (joined, guests)
    });
    while !host.is_finished() || reactor.states.len() > 2 {
        wake_soon(&reactor);
        reactor.round().unwrap();
    }
    drop(host.join().unwrap());
    while reactor.states.len() > 1 {
        reactor.round().unwrap();
    }
    assert!(reactor.tokens.is_empty() && reactor.controls.is_empty());
    assert!(reactor.own_listeners.is_empty() && reactor.watchers.is_empty());
    assert!(reactor.watch.is_none());
}

/// The end of the other thread is no event of the reactor's, so it is given one.
fn wake_soon(reactor: &crate::forward::Reactor) {
    let (done, _) = std::sync::mpsc::sync_channel(1);
    let handle = reactor.handle.clone();
    thread::sleep(std::time::Duration::from_millis(1));
    handle.send(crate::forward::handle::Message::Look(done));
}
