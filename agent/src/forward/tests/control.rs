//! What the host asks for on a connection that controls forwards.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};

use super::{PATIENCE, assert_reset, connect, connect_to, end_of, start_in};
use crate::forward::joining::MAX_HELD;
use crate::tests::eventually;
use crate::tree::Tree;
use agent::protocol::{self, Bind, DialError, FromForwarder, Open, Target, ToForwarder};

/// The host's end of a connection that controls forwards.
pub struct Control(pub UnixStream);

impl Control {
    pub fn open() -> Self {
        Self(connect(&Open::Forward))
    }

    pub fn say(&self, message: &ToForwarder) {
        protocol::send(&self.0, message).unwrap();
    }

    pub fn hear(&self) -> FromForwarder {
        let message = protocol::receive(&self.0).expect("the control connection broke");
        message.expect("the control connection ended")
    }

    fn dial(&self, target: Target) -> (u64, Result<(), DialError>) {
        static NEXT: AtomicU64 = AtomicU64::new(1 << 63);
        let token = NEXT.fetch_add(1, Ordering::Relaxed);
        self.say(&ToForwarder::Dial { token, target });
        match self.hear() {
            FromForwarder::Dialed { token: of, result } if of == token => (token, result),
            other => panic!("a dial was answered with {other:?}"),
        }
    }

    pub fn listen(&self, id: u32, at: Bind) -> Result<u16, String> {
        self.say(&ToForwarder::Listen { id, at });
        match self.hear() {
            FromForwarder::Bound { id: of, result } if of == id => result,
            other => panic!("listening was answered with {other:?}"),
        }
    }

    fn accepted(&self, id: u32) -> u64 {
        match self.hear() {
            FromForwarder::Accepted { id: of, token } if of == id => token,
            other => panic!("a connection was to be accepted, not {other:?}"),
        }
    }
}

fn loopback(port: u16) -> Bind {
    let address = None;
    Bind::Tcp { address, port }
}

/// Both ends carry bytes to each other.
fn assert_joined(mut a: impl Read + Write, mut b: impl Read + Write) {
    let mut bytes = [0; 4];
    a.write_all(b"ping").unwrap();
    b.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ping");
    b.write_all(b"pong").unwrap();
    a.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"pong");
}

fn guest(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[test]
fn a_connection_is_held_until_the_host_attaches_to_it() {
    let control = Control::open();
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = service.local_addr().unwrap().port();
    let (token, result) = control.dial(Target::Loopback(port));
    assert_eq!(result, Ok(()));
    let mut guest = guest(service.accept().unwrap().0);
    guest.write_all(b"greeting").unwrap();
    let mut host = connect(&Open::Attach { token });
    let mut greeting = [0; 8];
    host.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"greeting");
    assert_joined(&host, &guest);
    // The token was for one use, and the connection outlives the control.
    assert_reset(&connect(&Open::Attach { token }));
    drop(control);
    assert_joined(&host, &guest);
}

#[test]
fn what_cannot_be_dialed_is_told_with_its_reason() {
    let control = Control::open();
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    assert_eq!(
        control.dial(Target::Loopback(port)).1,
        Err(DialError::Refused)
    );
    let host = |host: &str, port| Target::Host {
        host: host.to_owned(),
        port,
    };
    let refused = control.dial(host("app.localhost", port)).1;
    assert_eq!(refused, Err(DialError::Refused));
    for nowhere in [Target::Loopback(0), host("127.0.0.1", 0)] {
        let result = control.dial(nowhere).1;
        assert!(matches!(result, Err(DialError::Other(_))), "{result:?}");
    }
    for no_name in [String::new(), "x".repeat(300), "a\\b".to_owned()] {
        let result = control.dial(host(&no_name, 1)).1;
        assert_eq!(result, Err(DialError::NoSuchHost), "{no_name:?}");
    }
    for no_socket in [
        &b"relative"[..],
        b"/does/not/exist",
        b"/dev/null",
        b"/nul\0",
    ] {
        let result = control.dial(Target::Unix(no_socket.to_vec())).1;
        assert!(result.is_err(), "{no_socket:?} gave {result:?}");
    }
}

#[test]
fn a_dropped_connection_is_reset_and_its_token_free() {
    let control = Control::open();
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = service.local_addr().unwrap().port();
    let (token, result) = control.dial(Target::Loopback(port));
    assert_eq!(result, Ok(()));
    let guest = guest(service.accept().unwrap().0);
    let twice = ToForwarder::Dial {
        token,
        target: Target::Loopback(port),
    };
    control.say(&twice);
    assert!(matches!(
        control.hear(),
        FromForwarder::Dialed {
            result: Err(DialError::Other(_)),
            ..
        }
    ));
    control.say(&ToForwarder::Drop { token });
    let error = end_of(&guest).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    control.say(&twice);
    assert!(matches!(
        control.hear(),
        FromForwarder::Dialed { result: Ok(()), .. }
    ));
}

#[test]
fn the_end_of_the_control_resets_what_it_held() {
    let control = Control::open();
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = service.local_addr().unwrap().port();
    control.dial(Target::Loopback(port)).1.unwrap();
    let guest = guest(service.accept().unwrap().0);
    drop(control);
    let error = end_of(&guest).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn a_connection_that_begins_in_the_guest_is_offered_and_attached_to() {
    let control = Control::open();
    let port = control.listen(7, loopback(0)).unwrap();
    assert_ne!(port, 0);
    let guest = guest(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap());
    let token = control.accepted(7);
    let host = connect(&Open::Attach { token });
    assert_joined(&guest, &host);

    let dropped = self::guest(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap());
    let token = control.accepted(7);
    control.say(&ToForwarder::Drop { token });
    let error = end_of(&dropped).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);

    control.say(&ToForwarder::Unlisten { id: 7 });
    eventually("nobody listens any more", || {
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err()
    });
    assert_joined(&guest, &host);
}

#[test]
fn a_port_that_is_taken_is_refused_with_a_sentence() {
    let control = Control::open();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    for address in [None, Some(IpAddr::V4(Ipv4Addr::LOCALHOST))] {
        let at = Bind::Tcp { address, port };
        let reason = control.listen(1, at).unwrap_err();
        assert!(reason.contains(&port.to_string()), "{reason}");
    }
    let elsewhere = Bind::Tcp {
        address: Some("203.0.113.1".parse().unwrap()),
        port: 0,
    };
    let reason = control.listen(1, elsewhere).unwrap_err();
    assert!(reason.contains("203.0.113.1"), "{reason}");
}

#[test]
fn a_connection_more_than_may_be_held_is_reset() {
    let door = start_in(Tree::own().unwrap());
    let control = Control(connect_to(&door, &Open::Forward));
    let port = control.listen(1, loopback(0)).unwrap();
    let connect = || guest(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap());
    let held: Vec<_> = (0..MAX_HELD)
        .map(|_| (connect(), control.accepted(1)))
        .collect();
    let error = end_of(connect()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    // One less is held, so there is room for one.
    let (guest, token) = &held[0];
    assert_joined(guest, connect_to(&door, &Open::Attach { token: *token }));
    let another = connect();
    let token = control.accepted(1);
    assert_joined(another, connect_to(&door, &Open::Attach { token }));
}

#[test]
fn a_unix_socket_of_the_guest_is_reached_inside_its_root() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let inside = root.join("run");
    fs::create_dir(&inside).unwrap();
    let service = UnixListener::bind(inside.join("service.sock")).unwrap();
    // A link of the guest that would lead elsewhere outside of its root.
    symlink("/run/service.sock", root.join("link")).unwrap();
    let door = start_in(Tree::below(root.to_str().unwrap()).unwrap());
    for path in [
        &b"/run/service.sock"[..],
        b"/link",
        b"/../run/../run/service.sock",
    ] {
        let host = connect_to(&door, &Open::Dial(Target::Unix(path.to_vec())));
        let guest = service.accept().unwrap().0;
        assert_joined(&host, &guest);
        // Unix sockets have no reset of their own: a close is an end.
        drop(guest);
        assert_eq!(end_of(&host).unwrap(), 0);
    }
    drop(service);
    assert_reset(&connect_to(
        &door,
        &Open::Dial(Target::Unix(b"/link".to_vec())),
    ));
}

#[test]
fn a_unix_socket_for_the_host_is_made_in_the_guests_root() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let door = start_in(Tree::below(root.to_str().unwrap()).unwrap());
    let control = Control(connect_to(&door, &Open::Forward));
    // Longer than an address of a Unix socket has room for, in directories that are missing.
    let name = format!("{}.sock", "long".repeat(50));
    let path = root.join("some/where").join(&name);
    let in_guest = format!("/some/where/{name}").into_bytes();
    let at = Bind::Unix(in_guest.clone());
    assert_eq!(control.listen(3, at.clone()), Ok(0));
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o666
    );
    let link = directory.path().join("short");
    symlink(&path, &link).unwrap();
    let guest = UnixStream::connect(&link).unwrap();
    let token = control.accepted(3);
    assert_joined(&guest, &connect_to(&door, &Open::Attach { token }));

    // Somebody listens there, so it is not replaced.
    let other = Control(connect_to(&door, &Open::Forward));
    let reason = other.listen(4, at.clone()).unwrap_err();
    assert!(reason.contains("listens there already"), "{reason}");
    control.say(&ToForwarder::Unlisten { id: 3 });
    eventually("the socket is removed", || !path.exists());

    // A socket that nobody listens at is replaced, a file is not.
    drop(UnixListener::bind(root.join("stale")).unwrap());
    assert_eq!(other.listen(5, Bind::Unix(b"/stale".to_vec())), Ok(0));
    let stale = UnixStream::connect(root.join("stale")).unwrap();
    other.accepted(5);
    drop(stale);
    fs::write(root.join("file"), "precious").unwrap();
    let reason = other.listen(6, Bind::Unix(b"/file".to_vec())).unwrap_err();
    assert!(reason.contains("no socket"), "{reason}");
    assert_eq!(fs::read(root.join("file")).unwrap(), b"precious");
    drop(other);
    eventually("the end of the control removes its socket", || {
        !root.join("stale").exists()
    });
    let left: Vec<_> = fs::read_dir(root.join("some/where")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn garbage_ends_a_control_and_nothing_else() {
    let control = Control::open();
    let port = control.listen(1, loopback(0)).unwrap();
    let mut broken = connect(&Open::Forward);
    broken.write_all(&[0xff; 64]).unwrap();
    let end = end_of(&broken);
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    let _guest = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    control.accepted(1);
}
