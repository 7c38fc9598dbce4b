//! A guest that says what no agent says, or too much of it, or listens and unlistens without end.

use super::*;
use agent::protocol::{self, FromForwarder, Listener, Target};
use std::collections::BTreeSet;

fn auto(exclude: &[&str]) -> Declarations {
    Declarations {
        auto: Some(Auto {
            exclude: exclude.iter().map(|range| range.parse().unwrap()).collect(),
        }),
        ..Declarations::default()
    }
}

fn published(announced: &Receiver<Announcement>) -> (SocketAddr, u16) {
    match announced.recv_timeout(PATIENCE).unwrap() {
        Announcement::Published { url, guest } => {
            (url.strip_prefix("http://").unwrap().parse().unwrap(), guest)
        }
        other => panic!("not published: {other:?}"),
    }
}

#[test]
fn what_listens_in_the_guest_is_published_and_withdrawn() {
    let guest_port = free_port();
    let (forwarder, announced) = forwarder(auto(&[]));
    let guest = FakeGuest::new();
    forwarder.attach(guest.clone()).unwrap();
    guest.watched();
    guest.serve(guest_port, echo_at_end);
    let (at, port) = published(&announced);
    assert_eq!((at.port(), port), (guest_port, guest_port));
    assert_eq!(ask(connect(at.port()).unwrap(), b"auto").unwrap(), b"auto");
    guest.stop(&[guest_port]);
    let gone = announced.recv_timeout(PATIENCE).unwrap();
    assert!(
        matches!(gone, Announcement::Withdrawn { guest, .. } if guest == guest_port),
        "{gone:?}"
    );
    assert_eq!(forwarder.list().unwrap(), []);
}

#[test]
fn a_taken_port_is_published_as_the_next_and_comes_back_there() {
    let guest_port = free_port();
    let occupied = TcpListener::bind(("127.0.0.1", guest_port)).unwrap();
    let (forwarder, announced) = forwarder(auto(&[]));
    let guest = FakeGuest::new();
    forwarder.attach(guest.clone()).unwrap();
    guest.watched();
    guest.serve(guest_port, echo_at_end);
    let (first, _) = published(&announced);
    assert!(first.port() > guest_port);
    assert_eq!(
        ask(connect(first.port()).unwrap(), b"next").unwrap(),
        b"next"
    );
    guest.stop(&[guest_port]);
    announced.recv_timeout(PATIENCE).unwrap();
    drop(occupied);
    guest.serve(guest_port, echo_at_end);
    assert_eq!(published(&announced).0, first);
}

#[test]
fn excluded_and_published_ports_are_not_published_by_themselves() {
    let (excluded, explicit, wanted) = (free_port(), free_port(), free_port());
    let mut declarations = auto(&[&excluded.to_string()]);
    let host = free_port();
    declarations.publish = vec![format!("{host}:{explicit}").parse().unwrap()];
    let (forwarder, announced) = forwarder(declarations);
    let guest = FakeGuest::new();
    for port in [excluded, explicit, wanted] {
        guest.serve(port, echo_at_end);
    }
    forwarder.attach(guest.clone()).unwrap();
    assert_eq!(published(&announced).1, wanted);
    let auto: Vec<_> = forwarder
        .list()
        .unwrap()
        .into_iter()
        .filter(|one| one.kind == Kind::Auto)
        .collect();
    assert_eq!(auto.len(), 1);

    // Publishing it by hand takes its place, also at the very same host port.
    let added = forwarder
        .publish(&format!("{wanted}:{wanted}").parse().unwrap())
        .unwrap();
    assert_eq!(added.forwards[0].kind, Kind::Published);
    eventually("answering", || !refuses(wanted));
    assert!(
        forwarder
            .list()
            .unwrap()
            .iter()
            .all(|one| one.kind == Kind::Published)
    );
}

#[test]
fn publishing_by_itself_is_turned_on_and_off_at_any_time() {
    let port = free_port();
    let (forwarder, guest) = publishing(&[]);
    guest.serve(port, echo_at_end);
    forwarder.set_auto(Some(Auto::default())).unwrap();
    eventually("published", || !refuses(port));
    // Taken away by hand, it stays away.
    forwarder
        .remove(&port.to_string().parse().unwrap())
        .unwrap();
    guest.serve(free_port(), echo_at_end);
    eventually("another", || forwarder.list().unwrap().len() == 1);
    assert!(refuses(port));
    forwarder.set_auto(None).unwrap();
    eventually("withdrawn", || forwarder.list().unwrap().is_empty());
}

#[test]
fn garbage_from_the_agent_ends_its_connection_and_nothing_else() {
    let port = free_port();
    let (forwarder, guest) = publishing(&[format!("{port}:8000")]);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    for round in 0..50 {
        let mut control = guest.control();
        let garbage: Vec<u8> = (0..256)
            .map(|_| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed as u8
            })
            .collect();
        let with_length = [&200u32.to_le_bytes()[..], &garbage].concat();
        // It may be cut off in the midst of it.
        let _ = control.write_all(if round % 2 == 0 {
            &garbage
        } else {
            &with_length
        });
        guest.go();
        eventually("lost", || forwarder.open_datagrams().is_err());
        forwarder.attach(guest.clone()).unwrap();
        eventually("attached", || guest.attachments() == round + 2);
        guest.watched();
    }
    guest.serve(8000, echo_at_end);
    eventually("listening", || !refuses(port));
    assert_eq!(ask(connect(port).unwrap(), b"well").unwrap(), b"well");
}

#[test]
fn answers_to_questions_that_nobody_asked_are_harmless() {
    let (forwarder, guest) = publishing(&[]);
    guest.serve(8000, echo_at_end);
    let control = guest.control();
    for number in 0..1000 {
        let token = u64::from(number);
        for message in [
            FromForwarder::Dialed {
                token,
                result: Ok(()),
            },
            FromForwarder::Accepted { id: number, token },
            FromForwarder::Bound {
                id: number,
                result: Ok(1),
            },
            FromForwarder::Bound {
                id: number,
                result: Err("no".to_owned()),
            },
        ] {
            protocol::send(&control, &message).unwrap();
        }
    }
    // Dials that are not held, and connections that are not listed.
    guest.dropped(2000);
    let dialed = forwarder.dial_and_wait(Target::Loopback(8000)).unwrap();
    let (near, far) = fake::tcp_pair();
    dialed.attach(far).unwrap();
    assert_eq!(ask(near, b"fine").unwrap(), b"fine");
}

#[test]
fn a_guest_that_listens_everywhere_takes_a_bounded_part_of_the_host() {
    let (forwarder, announced) = forwarder(auto(&[]));
    let guest = FakeGuest::new();
    forwarder.attach(guest.clone()).unwrap();
    guest.watched();
    let all = |ports: std::ops::RangeInclusive<u16>| {
        let listener = |port| Listener {
            port,
            address: "0.0.0.0".parse().unwrap(),
            uid: 0,
        };
        FromForwarder::Listeners(ports.map(listener).collect())
    };
    let control = guest.control();
    // A low limit on descriptors may end it sooner, and must not end anything else.
    for _ in 0..20 {
        protocol::send(&control, &all(40_000..=65_535)).unwrap();
        protocol::send(&control, &all(40_000..=40_000)).unwrap();
    }
    protocol::send(&control, &all(40_000..=65_535)).unwrap();
    eventually("published", || !forwarder.list().unwrap().is_empty());
    let listed = forwarder.list().unwrap();
    assert!(listed.len() <= 1024, "{} ports", listed.len());
    let hosts: BTreeSet<_> = listed.iter().map(|one| &one.host).collect();
    assert_eq!(hosts.len(), listed.len());
    forwarder.set_auto(None).unwrap();
    eventually("withdrawn", || forwarder.list().unwrap().is_empty());
    let said: Vec<_> = announced.try_iter().collect();
    // 32 at once, and one a second.
    assert!(
        said.len() < 32 + 2 * PATIENCE.as_secs() as usize,
        "{} lines",
        said.len()
    );
}

#[test]
fn a_guest_that_never_answers_a_dial_does_not_hold_up_others() {
    let port = free_port();
    let (forwarder, guest) = publishing(&[format!("{port}:8000")]);
    guest.serve(8000, echo_at_end);
    eventually("listening", || !refuses(port));
    guest.be_silent();
    let (sender, ended) = mpsc::channel();
    for _ in 0..5000 {
        let sender = sender.clone();
        forwarder.dial(Target::Loopback(8000), move |result| {
            let _ = sender.send(result.is_ok());
        });
    }
    assert_eq!(
        ask(connect(port).unwrap(), b"meanwhile").unwrap(),
        b"meanwhile"
    );
    // Those beyond the limit fail at once, and the others with the agent.
    guest.go();
    for _ in 0..5000 {
        assert!(!ended.recv_timeout(PATIENCE).unwrap());
    }
}
