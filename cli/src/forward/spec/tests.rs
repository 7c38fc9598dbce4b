//! What may be typed, what it means, and what is refused.

use agent::protocol::Bind;
use proptest::prelude::*;

use super::*;

fn publish(text: &str) -> Publish {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn reverse(text: &str) -> Reverse {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn port_rule(address: Option<&str>, host: Option<u16>, guest: u16, protocol: Protocol) -> Rule {
    Rule {
        host: HostEnd::Port {
            address: address.map(|address| address.parse().unwrap()),
            port: host,
        },
        guest: GuestEnd::Port(guest),
        protocol,
    }
}

#[test]
fn published_ports_are_read_as_they_are_written() {
    use Protocol::{Tcp, Udp};
    for (text, rule) in [
        ("8000", port_rule(None, None, 8000, Tcp)),
        ("8080:80", port_rule(None, Some(8080), 80, Tcp)),
        ("8080:80/tcp", port_rule(None, Some(8080), 80, Tcp)),
        ("5353:53/udp", port_rule(None, Some(5353), 53, Udp)),
        ("localhost:8080:80", port_rule(None, Some(8080), 80, Tcp)),
        (
            "127.0.0.1:8080:80",
            port_rule(Some("127.0.0.1"), Some(8080), 80, Tcp),
        ),
        (
            "0.0.0.0:8080:80",
            port_rule(Some("0.0.0.0"), Some(8080), 80, Tcp),
        ),
        ("*:8080:80", port_rule(Some("0.0.0.0"), Some(8080), 80, Tcp)),
        ("[::1]:8080:80", port_rule(Some("::1"), Some(8080), 80, Tcp)),
        (
            "[2001:db8::1]:53:53/udp",
            port_rule(Some("2001:db8::1"), Some(53), 53, Udp),
        ),
        (
            "[::ffff:10.0.0.1]:1:2",
            port_rule(Some("10.0.0.1"), Some(1), 2, Tcp),
        ),
        ("10.0.0.1::80", port_rule(Some("10.0.0.1"), None, 80, Tcp)),
    ] {
        assert_eq!(publish(text).rules(), [rule], "{text}");
    }
}

#[test]
fn a_range_is_one_rule_for_each_port() {
    let rules = publish("8000-8002:9000-9002/udp").rules();
    let expected = [(8000, 9000), (8001, 9001), (8002, 9002)];
    let expected = expected.map(|(host, guest)| port_rule(None, Some(host), guest, Protocol::Udp));
    assert_eq!(rules, expected);
    let rules = publish("8000-8001").rules();
    let expected = [8000, 8001].map(|guest| port_rule(None, None, guest, Protocol::Tcp));
    assert_eq!(rules, expected);
}

#[test]
fn paths_are_unix_sockets_and_relative_ones_are_the_working_directorys() {
    let here = std::env::current_dir().unwrap();
    let path = |path: &str| PathBuf::from(path);
    for (text, host, guest) in [
        (
            "/tmp/host.sock:/run/guest.sock",
            HostEnd::Unix(path("/tmp/host.sock")),
            GuestEnd::Unix(path("/run/guest.sock")),
        ),
        (
            "./host.sock:8000",
            HostEnd::Unix(here.join("host.sock")),
            GuestEnd::Port(8000),
        ),
        (
            "8080:/run/guest.sock",
            HostEnd::Port {
                address: None,
                port: Some(8080),
            },
            GuestEnd::Unix(path("/run/guest.sock")),
        ),
        (
            "./a/udp:/b/tcp",
            HostEnd::Unix(here.join("a/udp")),
            GuestEnd::Unix(path("/b/tcp")),
        ),
    ] {
        let rule = Rule {
            host,
            guest,
            protocol: Protocol::Tcp,
        };
        assert_eq!(publish(text).rules(), [rule], "{text}");
    }
}

#[test]
fn what_cannot_be_published_is_refused_with_its_reason() {
    for (text, reason) in [
        ("", "empty"),
        (" ", "empty"),
        ("0", "\"0\" is not a port"),
        ("70000", "\"70000\" is not a port"),
        ("8080:0", "\"0\" is not a port"),
        ("65536:80", "\"65536\" is not a port"),
        ("0:80", "\"0\" is not a port"),
        ("-1", "\"\" is not a port"),
        ("+80", "\"+80\" is not a port"),
        ("80 ", "\"80 \" is not a port"),
        ("８０", "is not a port"),
        ("http", "\"http\" is not a port"),
        (":80", "\"\" is not a port"),
        ("80:", "\"\" is not a port"),
        ("::80", "is not an IP address"),
        ("8010-8000", "ends before it begins"),
        ("1-2-3", "is not a port"),
        ("8000-8001:9000", "2 host ports do not fit 1 guest ports"),
        ("8000:9000-9001", "1 host ports do not fit 2 guest ports"),
        ("example.com:80:80", "is not an IP address"),
        ("::1:8080:80", "brackets"),
        ("[::1:8080:80", "brackets"),
        ("[127.0.0.1]:80:80", "is not an IP address"),
        ("224.0.0.1:80:80", "is not an IP address"),
        ("1:2:3:4", "is not of the form"),
        ("80/sctp", "neither tcp nor udp"),
        ("80/", "neither tcp nor udp"),
        ("/udp", "HOST:/GUEST/PATH"),
        ("/run/guest.sock", "HOST:/GUEST/PATH"),
        ("8080:run/guest.sock", "has to be absolute"),
        ("8080:/run/", "it is a directory"),
        ("./a:./b", "has to be absolute"),
        (
            "8080-8081:/run/guest.sock",
            "2 host ports do not fit 1 guest ports",
        ),
        ("./a:8000-8001", "1 host ports do not fit 2 guest ports"),
        ("./a:53/udp", "UDP goes between ports"),
        ("127.0.0.1:./a:80", "is not of the form"),
        ("./a\0b:80", "zero byte"),
    ] {
        let error = text.parse::<Publish>().expect_err(text).to_string();
        assert!(error.contains(reason), "{text:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{text:?}: {error}");
    }
    let long = format!("/{}:80", "x".repeat(MAX_SOCKET_PATH));
    let error = long.parse::<Publish>().expect_err("too long").to_string();
    assert!(error.contains("longer than 107 bytes"), "{error}");
}

#[test]
fn only_loopback_is_not_wide() {
    for (text, wide) in [
        ("80", false),
        ("127.0.0.1:80:80", false),
        ("127.1.2.3:80:80", false),
        ("[::1]:80:80", false),
        ("/tmp/a:80", false),
        ("0.0.0.0:80:80", true),
        ("[::]:80:80", true),
        ("10.0.0.1:80:80", true),
    ] {
        assert_eq!(publish(text).is_wide(), wide, "{text}");
    }
}

#[test]
fn reverse_forwards_are_read_as_ssh_users_write_them() {
    let tcp = |address: Option<&str>, port| Bind::Tcp {
        address: address.map(|address| address.parse().unwrap()),
        port,
    };
    let host = |host: &str, port| HostTarget::Host {
        host: host.to_owned(),
        port,
    };
    let path = |path: &str| HostTarget::Unix(PathBuf::from(path));
    let docker = || Bind::Unix(b"/run/docker.sock".to_vec());
    for (text, at, target) in [
        (
            "5432:localhost:5432",
            tcp(None, 5432),
            host("localhost", 5432),
        ),
        ("5432:5433", tcp(None, 5432), host("localhost", 5433)),
        (
            "5432:db.example.com",
            tcp(None, 5432),
            host("db.example.com", 5432),
        ),
        ("5432:db_1:1", tcp(None, 5432), host("db_1", 1)),
        ("5432:[::1]:5433", tcp(None, 5432), host("::1", 5433)),
        ("5432:10.0.0.7", tcp(None, 5432), host("10.0.0.7", 5432)),
        (
            "0.0.0.0:5432:db:5433",
            tcp(Some("0.0.0.0"), 5432),
            host("db", 5433),
        ),
        (
            "0.0.0.0:5432:5433",
            tcp(Some("0.0.0.0"), 5432),
            host("localhost", 5433),
        ),
        ("*:5432:db", tcp(Some("0.0.0.0"), 5432), host("db", 5432)),
        ("localhost:5432:db", tcp(None, 5432), host("db", 5432)),
        ("[::]:1:db:2", tcp(Some("::"), 1), host("db", 2)),
        (
            "/run/docker.sock:/var/run/docker.sock",
            docker(),
            path("/var/run/docker.sock"),
        ),
        (
            "8080:/tmp/host.sock",
            tcp(None, 8080),
            path("/tmp/host.sock"),
        ),
        (
            "10.0.0.1:8080:/tmp/host.sock",
            tcp(Some("10.0.0.1"), 8080),
            path("/tmp/host.sock"),
        ),
        (
            "/run/docker.sock:localhost:2375",
            docker(),
            host("localhost", 2375),
        ),
        ("/run/docker.sock:2375", docker(), host("localhost", 2375)),
    ] {
        let read = reverse(text);
        assert_eq!((read.at(), read.target()), (at, &target), "{text}");
    }
}

#[test]
fn what_cannot_be_a_reverse_forward_is_refused_with_its_reason() {
    for (text, reason) in [
        ("", "empty"),
        ("8080", "is not of the form"),
        ("/run/a.sock", "is not of the form"),
        ("0:db", "\"0\" is not a port"),
        ("70000:db", "\"70000\" is not a port"),
        ("80:0", "\"0\" is not a port"),
        ("80:db:70000", "\"70000\" is not a port"),
        ("80:db:", "\"\" is not a port"),
        ("80:", "is not a host name"),
        ("80::80", "is not a host name"),
        ("80:a b", "is not a host name"),
        ("80:-x", "is not a host name"),
        ("80:1.2.3", "is not a host name"),
        ("80:[db]:80", "is not a host name"),
        ("db:80:db:80", "is not an IP address"),
        ("1:2:3:4", "is not of the form"),
        ("0.0.0.0:1:a:2:3", "is not of the form"),
        ("/run/a.sock:db", "/GUEST/PATH:HOST:PORT"),
        ("a/b:80", "has to be absolute"),
        ("10.0.0.1:/run/a.sock:80", "is not of the form"),
        ("/run/a:b:/c", "is not a port"),
    ] {
        let error = text.parse::<Reverse>().expect_err(text).to_string();
        assert!(error.contains(reason), "{text:?}: {error}");
    }
}

#[test]
fn loopback_and_any_are_of_both_families() {
    let of = |text: &str| addresses(Some(text.parse().unwrap()));
    let both = |texts: [&str; 2]| texts.map(|text| text.parse::<IpAddr>().unwrap()).to_vec();
    assert_eq!(addresses(None), both(["127.0.0.1", "::1"]));
    assert_eq!(of("127.0.0.1"), both(["127.0.0.1", "::1"]));
    assert_eq!(of("::1"), both(["::1", "127.0.0.1"]));
    assert_eq!(of("0.0.0.0"), both(["0.0.0.0", "::"]));
    assert_eq!(of("10.0.0.1"), ["10.0.0.1".parse::<IpAddr>().unwrap()]);
}

/// Pieces of forwards, so that many of their mixtures mean something.
fn mixtures() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        any::<u16>().prop_map(|port| port.to_string()),
        (any::<u16>(), any::<u16>()).prop_map(|(a, b)| format!("{a}-{b}")),
        any::<Ipv4Addr>().prop_map(|ip| ip.to_string()),
        any::<Ipv6Addr>().prop_map(|ip| format!("[{ip}]")),
        "[./]{0,2}[a-z/]{1,9}",
        "[a-z0-9.-]{0,9}",
        Just("localhost".to_owned()),
        Just("*".to_owned()),
        Just(String::new()),
    ];
    let suffix = prop_oneof![Just(""), Just("/udp"), Just("/tcp"), Just("/")];
    (prop::collection::vec(piece, 0..6), suffix)
        .prop_map(|(pieces, suffix)| pieces.join(":") + suffix)
}

proptest! {
    #[test]
    fn what_is_written_back_means_the_same(text in prop_oneof![mixtures(), any::<String>()]) {
        if let Ok(read) = text.parse::<Publish>() {
            let written = read.to_string();
            prop_assert_eq!(written.parse::<Publish>(), Ok(read), "{} became {}", text, written);
        }
        if let Ok(read) = text.parse::<Reverse>() {
            let written = read.to_string();
            prop_assert_eq!(written.parse::<Reverse>(), Ok(read), "{} became {}", text, written);
        }
    }

    #[test]
    fn every_rule_has_ports_that_exist(text in mixtures()) {
        for rule in text.parse::<Publish>().iter().flat_map(Publish::rules) {
            if let HostEnd::Port { port, .. } = rule.host {
                prop_assert_ne!(port, Some(0));
            }
            prop_assert_ne!(rule.guest, GuestEnd::Port(0));
        }
    }
}
