//! Published ports.

use super::*;
use agent::protocol::{DialError, Target};
use std::os::unix::net::UnixStream;

#[test]
fn a_port_answers_on_both_families_while_the_guest_listens_and_refuses_otherwise() {
    let port = free_port();
    let (forwarder, _announced) = forwarder(Declarations {
        publish: vec![format!("{port}:8000").parse().unwrap()],
        ..Declarations::default()
    });
    assert!(refuses(port), "before there is an agent");
    let guest = FakeGuest::new();
    forwarder.attach(guest.clone()).unwrap();
    guest.watched();
    assert!(refuses(port), "before the guest listens");

    for round in 0..3 {
        guest.serve(8000, echo_at_end);
        eventually("listening", || !refuses(port));
        assert_eq!(
            ask(connect(port).unwrap(), b"over v4").unwrap(),
            b"over v4",
            "{round}"
        );
        if has_ipv6() {
            let stream = TcpStream::connect(("::1", port)).unwrap();
            assert_eq!(ask(stream, b"over v6").unwrap(), b"over v6", "{round}");
        }
        guest.stop(&[8000]);
        eventually("refusing", || refuses(port));
    }
    assert_eq!(forwarder.list().unwrap()[0].answers, Some(false));
}

#[test]
fn a_port_that_refuses_is_taken_all_the_same_and_given_back_at_the_end() {
    let port = free_port();
    let (forwarder, guest) = publishing(&[format!("{port}:8000")]);
    let taken = || {
        let other = rustix::net::socket(
            rustix::net::AddressFamily::INET,
            rustix::net::SocketType::STREAM,
            None,
        )
        .unwrap();
        rustix::net::sockopt::set_socket_reuseaddr(&other, true).unwrap();
        let at: SocketAddr = format!("0.0.0.0:{port}").parse().unwrap();
        rustix::net::bind(&other, &at).is_err()
    };
    assert!(taken(), "bound and never listening");
    guest.serve(8000, |mut stream| {
        // A probe that has gone does not read it.
        let _ = stream.write_all(b"!");
        echo_at_end(stream);
    });
    eventually("listening", || !refuses(port));
    assert!(taken(), "listening");
    let mut client = connect(port).unwrap();
    // One that is not accepted yet is reset, as by any service that goes.
    client.read_exact(&mut [0; 1]).unwrap();
    guest.stop(&[8000]);
    eventually("refusing", || refuses(port));
    assert!(taken(), "listening no more, with a connection");
    assert_eq!(ask(client, b"goes on").unwrap(), b"goes on");
    forwarder.end();
    assert!(!taken(), "given back");
}

#[test]
fn a_port_can_be_taken_again_while_old_connections_are_winding_down() {
    let port = free_port();
    for round in 0..2 {
        let (forwarder, guest) = publishing(&[format!("{port}:8000")]);
        // The host's end is closed first, and so it is the one in TIME_WAIT.
        guest.serve(8000, |mut stream| drop(stream.write_all(b"bye")));
        eventually("listening", || !refuses(port));
        let mut answer = Vec::new();
        connect(port).unwrap().read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"bye", "round {round}");
        forwarder.end();
    }
}

#[test]
fn a_connection_that_fails_late_is_reset() {
    let port = free_port();
    let (_forwarder, guest) = publishing(&[format!("{port}:8000")]);
    guest.serve(8000, echo_at_end);
    eventually("listening", || !refuses(port));
    guest.stop_silently(8000);
    let mut stream = connect(port).unwrap();
    let read = stream.read(&mut [0; 1]);
    assert_eq!(error_kind(read), Some(io::ErrorKind::ConnectionReset));
}

#[test]
fn each_direction_ends_by_itself() {
    let port = free_port();
    let (_forwarder, guest) = publishing(&[format!("{port}:8000")]);
    // Says all it has to say before it hears the end, and then what it heard.
    guest.serve(8000, |mut stream| {
        stream.write_all(b"first ").unwrap();
        echo_at_end(stream);
    });
    eventually("listening", || !refuses(port));
    let payload = vec![7; 1 << 20];
    let answer = ask(connect(port).unwrap(), &payload).unwrap();
    assert_eq!(&answer[..6], b"first ");
    assert_eq!(answer[6..], payload);
}

#[test]
fn five_hundred_connections_are_open_at_once() {
    let port = free_port();
    let (forwarder, guest) = publishing(&[format!("{port}:8000")]);
    guest.serve(8000, echo_at_end);
    eventually("listening", || !refuses(port));
    let mut streams: Vec<_> = (0..500).map(|_| connect(port).unwrap()).collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&number.to_le_bytes()).unwrap();
    }
    for (number, stream) in streams.into_iter().enumerate() {
        assert_eq!(
            ask(stream, b"!").unwrap(),
            [&number.to_le_bytes()[..], b"!"].concat()
        );
    }
    assert!(forwarder.list().unwrap()[0].connections >= 500);
}

#[test]
fn ports_come_and_go_while_others_are_in_use() {
    let (steady, changing) = (free_port(), free_port());
    let (forwarder, guest) = publishing(&[format!("{steady}:8000")]);
    guest.serve(8000, echo_at_end);
    eventually("listening", || !refuses(steady));
    let publish: Publish = format!("{changing}:8000").parse().unwrap();
    let load = thread::spawn(move || {
        for _ in 0..200 {
            assert_eq!(ask(connect(steady).unwrap(), b"steady").unwrap(), b"steady");
        }
    });
    for _ in 0..20 {
        forwarder.publish(&publish).unwrap();
        // The guest listens, so the port answers as soon as it is there.
        let mut running = connect(changing).unwrap();
        running.write_all(b"on ").unwrap();
        let removed = forwarder.remove(&publish).unwrap();
        assert_eq!(removed.len(), 1);
        assert!(refuses(changing));
        assert_eq!(ask(running, b"and on").unwrap(), b"on and on");
    }
    load.join().unwrap();
    let missing = forwarder.remove(&publish).unwrap_err();
    assert!(
        matches!(missing, ForwardError::NoSuchForward(_)),
        "{missing}"
    );
}

#[test]
fn connections_that_run_go_on_when_their_port_is_removed() {
    let port = free_port();
    let (forwarder, guest) = publishing(&[format!("{port}:8000")]);
    guest.serve(8000, echo_at_end);
    eventually("listening", || !refuses(port));
    let client = connect(port).unwrap();
    forwarder.remove(&"8000".parse().unwrap()).unwrap();
    assert!(refuses(port));
    assert_eq!(ask(client, b"still here").unwrap(), b"still here");
}

#[test]
fn a_lost_agent_makes_all_ports_refuse_until_there_is_another() {
    let port = free_port();
    let (forwarder, guest) = publishing(&[format!("{port}:8000")]);
    guest.serve(8000, echo_at_end);
    eventually("listening", || !refuses(port));
    guest.go();
    eventually("refusing", || refuses(port));
    let error = forwarder.dial_and_wait(Target::Loopback(8000)).err();
    assert!(matches!(error, Some(DialError::Other(_))), "{error:?}");
    forwarder.attach(guest.clone()).unwrap();
    eventually("listening again", || !refuses(port));
    assert_eq!(ask(connect(port).unwrap(), b"back").unwrap(), b"back");
    assert_eq!(guest.attachments(), 2);
}

#[test]
fn a_bare_port_takes_the_same_one_or_the_next() {
    let port = free_port();
    let (first, _guest) = publishing(&[port.to_string()]);
    assert_eq!(first.list().unwrap()[0].host, format!("127.0.0.1:{port}"));
    let (second, _guest) = publishing(&[port.to_string()]);
    let next = second.list().unwrap()[0].host.clone();
    let next: SocketAddr = next.parse().unwrap();
    assert!(next.port() > port, "{next}");
}

#[test]
fn a_range_is_published_whole_or_not_at_all() {
    let port = free_port();
    let occupied = TcpListener::bind(("127.0.0.1", port + 2)).unwrap();
    let (forwarder, _guest) = publishing(&[]);
    let range: Publish = format!("{port}-{}:9000-9003", port + 3).parse().unwrap();
    let error = forwarder.publish(&range).unwrap_err().to_string();
    assert!(
        error.contains(&format!("127.0.0.1:{} is in use by", port + 2)),
        "{error}"
    );
    assert_eq!(forwarder.list().unwrap(), []);
    drop(occupied);
    let added = forwarder.publish(&range).unwrap();
    let hosts: Vec<_> = added
        .forwards
        .iter()
        .map(|forward| forward.host.clone())
        .collect();
    let expected: Vec<_> = (port..port + 4)
        .map(|port| format!("127.0.0.1:{port}"))
        .collect();
    assert_eq!(hosts, expected);
}

#[test]
fn a_port_in_use_is_refused_with_who_has_it() {
    let occupied = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = occupied.local_addr().unwrap().port();
    let declarations = Declarations {
        publish: vec![format!("{port}:8000").parse().unwrap()],
        ..Declarations::default()
    };
    let error = Forwarder::new(declarations, |_| ())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(&format!(
            "127.0.0.1:{port} is in use by this machine itself"
        )),
        "{error}"
    );
}

#[test]
fn what_others_can_reach_is_warned_of_once() {
    let (first, second) = (free_port(), free_port());
    let (forwarder, announced) = forwarder(Declarations {
        publish: vec![format!("0.0.0.0:{first}:8000").parse().unwrap()],
        ..Declarations::default()
    });
    let warned = announced.recv_timeout(PATIENCE).unwrap();
    assert!(
        matches!(&warned, Announcement::Warning(text) if text.contains("other computers")),
        "{warned:?}"
    );
    let added = forwarder
        .publish(&format!("0.0.0.0:{second}:8000").parse().unwrap())
        .unwrap();
    assert_eq!(added.warning, None);
}

#[test]
fn unix_sockets_are_published_either_way() {
    let dir = tempfile::tempdir().unwrap();
    let (host, inner) = (dir.path().join("host.sock"), dir.path().join("inner.sock"));
    let listener = std::os::unix::net::UnixListener::bind(&inner).unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            stream.write_all(b"from a path").unwrap();
        }
    });
    // What an earlier machine left.
    drop(std::os::unix::net::UnixListener::bind(&host).unwrap());
    let port = free_port();
    let (forwarder, guest) = publishing(&[
        format!("{}:/run/guest.sock", host.display()),
        format!("{port}:/run/guest.sock"),
    ]);
    guest.path_at("/run/guest.sock", &inner);
    let mut said = String::new();
    UnixStream::connect(&host)
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!(said, "from a path");
    said.clear();
    eventually("listening", || connect(port).is_ok());
    connect(port).unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "from a path");

    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(&host).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // One that somebody listens at is not replaced.
    let again = forwarder.publish(&format!("{}:9000", host.display()).parse().unwrap());
    let error = again.unwrap_err().to_string();
    assert!(error.contains("exists and is in use"), "{error}");
    forwarder.end();
    assert!(!host.exists(), "its file is left behind");
}

#[test]
fn a_file_at_the_path_of_a_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    let (forwarder, _guest) = publishing(&[]);
    let refused = forwarder.publish(&format!("{}:9000", path.display()).parse().unwrap());
    assert!(refused.is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

#[test]
fn dials_tell_whether_they_succeeded() {
    let (forwarder, guest) = publishing(&[]);
    guest.serve(8000, echo_at_end);
    let dialed = forwarder.dial_and_wait(Target::Loopback(8000)).unwrap();
    let (near, far) = fake::tcp_pair();
    dialed.attach(far).unwrap();
    assert_eq!(ask(near, b"hello").unwrap(), b"hello");
    let error = forwarder.dial_and_wait(Target::Loopback(8001)).err();
    assert_eq!(error, Some(DialError::Refused));
    // One that nobody attaches to is given back.
    let unused = forwarder.dial_and_wait(Target::Loopback(8000)).unwrap();
    assert_eq!(guest.held(), 1);
    drop(unused);
    guest.dropped(1);
    assert_eq!(guest.held(), 0);
}

#[test]
fn a_machine_that_has_ended_is_reported_as_such() {
    let (forwarder, _guest) = publishing(&[]);
    forwarder.end();
    assert!(matches!(forwarder.list(), Err(ForwardError::Ended)));
    let refused = forwarder.dial_and_wait(Target::Loopback(1)).err();
    assert!(matches!(refused, Some(DialError::Other(_))), "{refused:?}");
}

#[test]
fn the_guest_is_watched_only_while_a_port_needs_it() {
    let (forwarder, guest) = publishing(&[]);
    guest.serve(8000, echo_at_end);
    // Once the first port is published it answers, as the second does.
    for _ in 0..2 {
        let (first, second) = (free_port(), free_port());
        let publish = |port| forwarder.publish(&format!("{port}:8000").parse().unwrap());
        for port in [first, second] {
            publish(port).unwrap();
            assert_eq!(ask(connect(port).unwrap(), b"now").unwrap(), b"now");
        }
        guest.watched();
        forwarder.remove(&"8000".parse().unwrap()).unwrap();
        guest.unwatched();
    }
}
