//! What the guest reaches of the host.

use super::*;
use agent::protocol::Bind;
use std::os::unix::net::UnixListener;

fn tcp(port: u16) -> Bind {
    Bind::Tcp {
        address: None,
        port,
    }
}

/// A program of the host that answers with what it was sent.
fn host_service() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || echo_at_end(stream));
        }
    });
    port
}

/// A Unix socket of the host that says its name.
fn host_path(path: &std::path::Path, name: &'static str) -> thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(name.as_bytes()).unwrap();
    })
}

fn read_all(mut stream: TcpStream) -> String {
    let mut all = String::new();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.read_to_string(&mut all).unwrap();
    all
}

#[test]
fn the_guest_reaches_what_is_listed_by_every_way_to_write_it() {
    let port = host_service();
    let targets = [
        format!("localhost:{port}"),
        format!("127.0.0.1:{port}"),
        port.to_string(),
    ];
    let declared = format!("5000:{}", targets[0]).parse().unwrap();
    let (forwarder, _announced) = forwarder(Declarations {
        reverse: vec![declared],
        ..Declarations::default()
    });
    let guest = FakeGuest::new();
    forwarder.attach(guest.clone()).unwrap();
    for (number, target) in (5001..).zip(&targets) {
        let added = forwarder
            .reverse(&format!("{number}:{target}").parse().unwrap())
            .unwrap();
        assert_eq!(added.answers, Some(true));
    }
    for number in 5000..5004 {
        let stream = guest.connect_to_host(&tcp(number));
        assert_eq!(ask(stream, b"hello").unwrap(), b"hello", "{number}");
    }
}

#[test]
fn what_is_not_listed_or_not_listed_any_more_is_not_reached() {
    let (forwarder, guest) = publishing(&[]);
    let reverse: Reverse = format!("5000:{}", host_service()).parse().unwrap();
    forwarder.reverse(&reverse).unwrap();
    let reset =
        |stream: TcpStream| error_kind(ask(stream, b"x")) == Some(io::ErrorKind::ConnectionReset);
    let unlisted = guest.accept(77);
    guest.dropped(1);
    assert!(reset(unlisted));
    let running = guest.connect_to_host(&tcp(5000));
    eventually("joined", || guest.held() == 0);
    forwarder.remove_reverse(&reverse).unwrap();
    eventually("listening no more", || guest.binds().is_empty());
    // A guest that goes on all the same.
    let late = guest.accept(0);
    guest.dropped(2);
    assert!(reset(late));
    assert_eq!(ask(running, b"goes on").unwrap(), b"goes on");
    let gone = forwarder.remove_reverse(&reverse).unwrap_err();
    assert!(matches!(gone, ForwardError::NoSuchForward(_)), "{gone}");
}

#[test]
fn a_target_that_refuses_resets_the_guest_and_is_mentioned_once() {
    let closed = free_port();
    let (forwarder, announced) = forwarder(Declarations {
        reverse: vec![format!("5000:{closed}").parse().unwrap()],
        ..Declarations::default()
    });
    let guest = FakeGuest::new();
    forwarder.attach(guest.clone()).unwrap();
    for count in 1..=3 {
        let stream = guest.connect_to_host(&tcp(5000));
        guest.dropped(count);
        assert_eq!(
            error_kind(ask(stream, b"x")),
            Some(io::ErrorKind::ConnectionReset)
        );
    }
    let said = announced.recv_timeout(PATIENCE).unwrap().to_string();
    assert!(
        said.contains(&format!("localhost:{closed} cannot be reached")),
        "{said}"
    );
    assert!(announced.try_recv().is_err());
}

#[test]
fn a_guest_that_cannot_listen_says_why() {
    let (forwarder, guest) = publishing(&[]);
    guest.refuse_binds("port 5000 is taken\x1b[31m");
    let error = forwarder
        .reverse(&"5000:5432".parse().unwrap())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the guest cannot listen at localhost:5000: port 5000 is taken[31m"
    );
    assert_eq!(forwarder.list().unwrap(), []);
}

/// Of each forward, whether the guest listens.
fn answers(forwarder: &Forwarder) -> Vec<Option<bool>> {
    let all = forwarder.list().unwrap();
    all.iter().map(|forward| forward.answers).collect()
}

#[test]
fn whoever_waits_for_all_goes_on_when_the_guest_has_answered_for_each() {
    let reverse = [5000, 5001].map(|port| format!("{port}:5432").parse().unwrap());
    let (forwarder, _announced) = forwarder(Declarations {
        reverse: reverse.to_vec(),
        ..Declarations::default()
    });
    // There is nobody to answer yet.
    forwarder.await_reverses();
    assert_eq!(answers(&forwarder), [Some(false); 2]);
    let guest = FakeGuest::new();
    forwarder.attach(guest.clone()).unwrap();
    forwarder.await_reverses();
    assert_eq!(answers(&forwarder), [Some(true); 2]);
    guest.go();
    forwarder.await_reverses();
    let guest = FakeGuest::new();
    guest.refuse_binds("the port is taken");
    forwarder.attach(guest).unwrap();
    forwarder.await_reverses();
    assert_eq!(answers(&forwarder), [Some(false); 2]);
}

#[test]
fn the_same_place_of_the_guest_is_not_given_twice() {
    let (forwarder, _guest) = publishing(&[]);
    forwarder.reverse(&"5000:5432".parse().unwrap()).unwrap();
    let error = forwarder
        .reverse(&"5000:other:5432".parse().unwrap())
        .unwrap_err();
    assert_eq!(error.to_string(), "localhost:5000 is forwarded already");
}

#[test]
fn reverse_forwards_are_there_again_with_the_next_agent() {
    let (forwarder, guest) = publishing(&[]);
    forwarder
        .reverse(&format!("5000:{}", host_service()).parse().unwrap())
        .unwrap();
    guest.go();
    eventually("lost", || {
        forwarder.list().unwrap()[0].answers == Some(false)
    });
    forwarder.attach(guest.clone()).unwrap();
    assert_eq!(
        ask(guest.connect_to_host(&tcp(5000)), b"again").unwrap(),
        b"again"
    );
}

#[test]
fn unix_sockets_of_the_host_are_reached() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("docker.sock");
    let service = host_path(&path, "docker");
    let (forwarder, guest) = publishing(&[]);
    let reverse = format!("/run/docker.sock:{}", path.display())
        .parse()
        .unwrap();
    forwarder.reverse(&reverse).unwrap();
    let stream = guest.connect_to_host(&Bind::Unix(b"/run/docker.sock".to_vec()));
    assert_eq!(read_all(stream), "docker");
    service.join().unwrap();
}

#[test]
fn the_ssh_agent_is_the_one_offered_last_that_answers() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new, dead) = (
        dir.path().join("old"),
        dir.path().join("new"),
        dir.path().join("dead"),
    );
    let services = [host_path(&old, "old"), host_path(&new, "new")];
    drop(UnixListener::bind(&dead).unwrap());
    let (forwarder, announced) = forwarder(Declarations {
        ssh_agent: Some("/run/ssh.sock".into()),
        ..Declarations::default()
    });
    let guest = FakeGuest::new();
    forwarder.attach(guest.clone()).unwrap();
    let at = Bind::Unix(b"/run/ssh.sock".to_vec());
    let nobody = guest.connect_to_host(&at);
    guest.dropped(1);
    assert!(ask(nobody, b"x").is_err());
    let said = announced.recv_timeout(PATIENCE).unwrap().to_string();
    assert!(said.contains("no SSH agent answers"), "{said}");
    for path in [&new, &old, &new, &dead] {
        forwarder.offer_ssh_agent(path);
    }
    assert_eq!(read_all(guest.connect_to_host(&at)), "new");
    // It served one connection and has gone.
    std::fs::remove_file(&new).unwrap();
    assert_eq!(read_all(guest.connect_to_host(&at)), "old");
    for service in services {
        service.join().unwrap();
    }
}

#[test]
fn a_name_that_does_not_resolve_resets_the_guest() {
    let (forwarder, guest) = publishing(&[]);
    forwarder
        .reverse(&"5000:no-such-host.invalid:80".parse().unwrap())
        .unwrap();
    let stream = guest.connect_to_host(&tcp(5000));
    guest.dropped(1);
    assert_eq!(
        error_kind(ask(stream, b"x")),
        Some(io::ErrorKind::ConnectionReset)
    );
}
