//! Handshakes as the RFCs have them, cut anywhere, and garbage.

use proptest::prelude::*;

use super::*;

/// All of a handshake that is given `arrived` in pieces of `step` bytes: what it says, what it needs,
/// and what it keeps for the connection.
fn shake(arrived: &[u8], step: usize) -> (Vec<u8>, Next, Handshake) {
    let mut handshake = Handshake::new();
    let mut out = Vec::new();
    let mut pieces = arrived.chunks(step);
    let mut next = Next::Read;
    while next == Next::Read
        && let Some(piece) = pieces.next()
    {
        assert!(handshake.room() >= piece.len());
        next = handshake.advance(piece, &mut out);
    }
    // What is read no more stays where it is.
    handshake.bytes.extend(pieces.flatten());
    (out, next, handshake)
}

/// The same, which must not depend on the pieces.
fn shaken(arrived: &[u8]) -> (Vec<u8>, Next, Handshake) {
    let (out, next, handshake) = shake(arrived, arrived.len().max(1));
    for step in [1, 2, 3, 7] {
        let (out_cut, next_cut, handshake_cut) = shake(arrived, step);
        assert_eq!((&out_cut, &next_cut), (&out, &next), "pieces of {step}");
        // A refused client's bytes are of no use to anybody.
        if next != Next::Close {
            assert_eq!(handshake_cut.bytes, handshake.bytes, "pieces of {step}");
        }
    }
    (out, next, handshake)
}

fn host(host: &str, port: u16) -> Next {
    Next::Dial(Target::Host {
        host: host.to_owned(),
        port,
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn socks5_connects_to_names_and_addresses() {
    let cases: [(&[u8], Next); 4] = [
        (b"\x03\x02db\x15\x38", host("db", 5432)),
        (
            b"\x03\x09localhost\x1f\x40",
            Next::Dial(Target::Loopback(8000)),
        ),
        (b"\x01\x0a\x00\x00\x01\x00\x50", host("10.0.0.1", 80)),
        (
            b"\x04\xfd\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\x01\xbb",
            host("fd00::1", 443),
        ),
    ];
    for (address, expected) in cases {
        let wire = [b"\x05\x02\x02\x00\x05\x01\x00", address, b"early"].concat();
        let (out, next, handshake) = shaken(&wire);
        assert_eq!(out, [5, 0]);
        assert_eq!(next, expected);
        assert_eq!(handshake.connected(), [5, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(handshake.into_early(), b"early");
    }
}

#[test]
fn socks5_failures_have_their_codes() {
    let (_, next, handshake) = shaken(b"\x05\x01\x00\x05\x01\x00\x03\x02db\x00\x50");
    assert_eq!(next, host("db", 80));
    let code = |error: DialError| handshake.failed(&error)[1];
    assert_eq!(code(DialError::Other(String::new())), 1);
    assert_eq!(code(DialError::Unreachable), 3);
    assert_eq!(code(DialError::NoSuchHost), 4);
    assert_eq!(code(DialError::Refused), 5);
    assert_eq!(code(DialError::TimedOut), 6);
}

#[test]
fn socks5_requests_that_cannot_be_are_refused_with_their_codes() {
    let cases: [(&[u8], u8); 8] = [
        (b"\x04\x01\x00\x01", 1),
        (b"\x05\x02\x00\x01", 7),
        (b"\x05\x09\x00\x01", 7),
        (b"\x05\x01\x00\x02", 8),
        (b"\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x00", 5),
        (b"\x05\x01\x00\x03\x00\x00\x50", 4),
        (b"\x05\x01\x00\x03\x02\xff\xfe\x00\x50", 4),
        (b"\x05\x01\x00\x03\x03a\rb\x00\x50", 4),
    ];
    for (request, code) in cases {
        let wire = [b"\x05\x01\x00", request].concat();
        let (out, next, _) = shaken(&wire);
        assert_eq!(next, Next::Close, "{request:?}");
        assert_eq!(out[..4], [5, 0, 5, code], "{request:?}");
        assert_eq!(out.len(), 2 + 10);
    }
}

#[test]
fn socks5_without_a_method_we_take_is_told_so() {
    for greeting in [&b"\x05\x00"[..], b"\x05\x01\x02", b"\x05\x02\x01\x02"] {
        let (out, next, _) = shaken(greeting);
        assert_eq!((out.as_slice(), next), (&b"\x05\xff"[..], Next::Close));
    }
}

#[test]
fn socks5_associates_with_any_address_announced() {
    for request in [
        &b"\x05\x03\x00\x01\x00\x00\x00\x00\x10\x01"[..],
        b"\x05\x03\x00\x03\x00\x10\x01",
    ] {
        let (_, next, handshake) = shaken(&[b"\x05\x01\x00", request].concat());
        assert_eq!(next, Next::Associate(0x1001));
        let relay = "127.0.0.1:258".parse().unwrap();
        assert_eq!(
            handshake.associated(relay),
            [5, 0, 0, 1, 127, 0, 0, 1, 1, 2]
        );
    }
}

#[test]
fn socks4_connects_to_addresses_and_names() {
    let (out, next, handshake) = shaken(b"\x04\x01\x00\x50\x0a\x00\x00\x01me\0early");
    assert_eq!((out.len(), next), (0, host("10.0.0.1", 80)));
    assert_eq!(handshake.connected()[..2], [0, 90]);
    assert_eq!(handshake.failed(&DialError::Refused)[..2], [0, 91]);
    assert_eq!(handshake.into_early(), b"early");

    let (_, next, handshake) = shaken(b"\x04\x01\x00\x50\0\0\0\x01\0localhost\0early");
    assert_eq!(next, Next::Dial(Target::Loopback(80)));
    assert_eq!(handshake.into_early(), b"early");
}

#[test]
fn socks4_requests_that_cannot_be_are_refused() {
    let endless = [b"\x04\x01\x00\x50\x0a\x00\x00\x01", &[b'a'; 300][..]].concat();
    for request in [
        &b"\x04\x02\x00\x50\x0a\x00\x00\x01\0"[..],
        b"\x04\x01\x00\x00\x0a\x00\x00\x01\0",
        b"\x04\x01\x00\x50\0\0\0\x01\0\0",
        &endless,
    ] {
        let (out, next, _) = shaken(request);
        assert_eq!((out[..2].to_vec(), next), (vec![0, 91], Next::Close));
    }
}

#[test]
fn http_connect_keeps_what_comes_early() {
    let wire =
        b"CONNECT localhost:443 HTTP/1.1\r\nHost: other:1\r\nProxy-Authorization: x\r\n\r\nearly";
    let (out, next, handshake) = shaken(wire);
    assert_eq!((out.len(), next), (0, Next::Dial(Target::Loopback(443))));
    assert!(text(&handshake.connected()).starts_with("HTTP/1.1 200 "));
    assert_eq!(handshake.into_early(), b"early");
}

#[test]
fn a_plain_request_goes_on_in_origin_form() {
    let wire = b"POST HTTP://db:8080?q=1 HTTP/1.1\r\nHost: elsewhere\r\nAccept: */*\r\n\
        Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic eDp5\r\nTE: trailers\r\n\
        Connection: keep-alive, X-Hop ,content-length\r\nx-hop: 1\r\nKeep-Alive: 5\r\n\
        Upgrade: h2c\r\nContent-Length: 4\r\n\r\nbody";
    let (out, next, handshake) = shaken(wire);
    assert_eq!((out.len(), next), (0, host("db", 8080)));
    assert_eq!(handshake.connected(), b"");
    assert_eq!(
        text(&handshake.into_early()),
        "POST /?q=1 HTTP/1.1\r\nHost: db:8080\r\nAccept: */*\r\nContent-Length: 4\r\n\
         Connection: close\r\n\r\nbody"
    );
}

#[test]
fn plain_requests_keep_path_version_and_port() {
    let cases = [
        ("GET http://db HTTP/1.1", "GET / HTTP/1.1", host("db", 80)),
        (
            "GET http://db/a/?b HTTP/1.0",
            "GET /a/?b HTTP/1.0",
            host("db", 80),
        ),
        (
            "OPTIONS http://db:1 HTTP/1.1",
            "OPTIONS * HTTP/1.1",
            host("db", 1),
        ),
        (
            "GET http://[::1]:8/ HTTP/1.1",
            "GET / HTTP/1.1",
            host("::1", 8),
        ),
    ];
    for (line, expected, target) in cases {
        let (_, next, handshake) = shaken(format!("{line}\n\n").as_bytes());
        assert_eq!(next, target, "{line}");
        let early = text(&handshake.into_early());
        assert_eq!(early.lines().next(), Some(expected));
    }
}

#[test]
fn http_failures_have_their_status_and_a_reason() {
    let (_, _, handshake) = shaken(b"CONNECT db:1 HTTP/1.1\r\n\r\n");
    let answer = |error: DialError| text(&handshake.failed(&error));
    assert!(answer(DialError::Refused).starts_with("HTTP/1.1 502 "));
    assert!(
        answer(DialError::Refused)
            .ends_with("\r\n\r\nNobody listens at that port in the machine.\n")
    );
    assert!(answer(DialError::Unreachable).starts_with("HTTP/1.1 502 "));
    assert!(answer(DialError::NoSuchHost).starts_with("HTTP/1.1 502 "));
    assert!(answer(DialError::TimedOut).starts_with("HTTP/1.1 504 "));
}

#[test]
fn what_a_guest_says_of_a_failure_stays_text() {
    let (_, _, handshake) = shaken(b"CONNECT db:1 HTTP/1.1\r\n\r\n");
    let said = "\r\n\r\nHTTP/1.1 200 OK\r\n\x1b[2J".to_owned() + &"x".repeat(9000);
    let answer = text(&handshake.failed(&DialError::Other(said)));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("\r\nContent-Type: text/plain"));
    assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())));
    assert!(!body.trim_end().contains(char::is_control));
    assert!(body.len() < 400);
}

#[test]
fn what_a_web_page_can_send_gets_an_error_and_nothing_else() {
    for request in [
        "GET / HTTP/1.1\r\nHost: 127.0.0.1:1080\r\nOrigin: http://attacker\r\n\r\n",
        "POST /?u=http://localhost/ HTTP/1.1\r\nHost: attacker:1080\r\nContent-Length: 3\r\n\r\nabc",
        "OPTIONS / HTTP/1.1\r\nHost: 127.0.0.1:1080\r\nAccess-Control-Request-Method: PUT\r\n\r\n",
    ] {
        let (out, next, _) = shaken(request.as_bytes());
        assert_eq!(next, Next::Close);
        let out = text(&out);
        assert!(out.starts_with("HTTP/1.1 400 "), "{out}");
        assert!(out.contains("is a proxy into a machine"), "{out}");
        assert!(!out.contains("Access-Control"), "{out}");
    }
}

#[test]
fn http_requests_that_cannot_be_are_refused() {
    let many = "a: b\r\n".repeat(200);
    let cases = [
        ("GET https://db/ HTTP/1.1\r\n\r\n".to_owned(), "400"),
        ("GET ftp://db/ HTTP/1.1\r\n\r\n".to_owned(), "400"),
        ("GET http:// HTTP/1.1\r\n\r\n".to_owned(), "400"),
        ("GET http://a@db/ HTTP/1.1\r\n\r\n".to_owned(), "400"),
        ("GET http://db:0/ HTTP/1.1\r\n\r\n".to_owned(), "400"),
        ("GET http://db#f HTTP/1.1\r\n\r\n".to_owned(), "400"),
        ("CONNECT db HTTP/1.1\r\n\r\n".to_owned(), "400"),
        ("CONNECT http://db/ HTTP/1.1\r\n\r\n".to_owned(), "400"),
        ("GET http://db/ HTTP/1.1\r\na : b\r\n\r\n".to_owned(), "400"),
        (
            "GET http://db/ HTTP/1.1\r\na: b\r\n c\r\n\r\n".to_owned(),
            "400",
        ),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), "400"),
        ("nonsense\n\n".to_owned(), "400"),
        ("\x16\x03\x01".to_owned(), "400"),
        ("\0".to_owned(), "400"),
        (format!("GET http://db/ HTTP/1.1\r\n{many}\r\n"), "431"),
    ];
    for (request, status) in cases {
        let (out, next, _) = shaken(request.as_bytes());
        assert_eq!(next, Next::Close, "{request}");
        assert!(
            text(&out).starts_with(&format!("HTTP/1.1 {status} ")),
            "{request}"
        );
    }
}

#[test]
fn a_head_without_end_is_refused_when_it_is_too_long() {
    let mut handshake = Handshake::new();
    let mut out = Vec::new();
    let mut next = handshake.advance(b"GET http://db/ HTTP/1.1\r\na: ", &mut out);
    while next == Next::Read {
        assert!(handshake.room() > 0);
        let piece = vec![b'a'; handshake.room().min(1000)];
        next = handshake.advance(&piece, &mut out);
    }
    assert_eq!(next, Next::Close);
    assert!(text(&out).starts_with("HTTP/1.1 431 "));
}

#[test]
fn what_belongs_to_the_connection_fits_what_can_precede_a_stream() {
    let line = format!("GET http://{}:00080/ HTTP/1.1\r\n", "a".repeat(255));
    let headers = "a:b\r\n".repeat(126);
    let long = "c".repeat(MAX_BYTES - line.len() - headers.len() - "d:\r\n\r\n".len());
    let wire = format!("{line}{headers}d:{long}\r\n\r\n");
    let (_, next, handshake) = shake(wire.as_bytes(), 4096);
    assert!(matches!(next, Next::Dial(_)));
    let frame = 64;
    assert!(handshake.into_early().len() + frame <= devices::virtio::vsock::MAX_PRELUDE);
}

#[test]
fn a_client_too_slow_is_told_so_where_it_has_begun() {
    let slow = |arrived: &[u8]| shake(arrived, 1).2.timed_out();
    assert_eq!(slow(b""), b"");
    assert_eq!(slow(b"\x05\x01"), b"");
    assert!(text(&slow(b"GET http")).starts_with("HTTP/1.1 408 "));
}

/// Bytes that get further than random ones do.
fn nearly() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..20),
        Just(b"\x05\x01\x00".to_vec()),
        Just(b"\x05\x01\x00\x03\x09localhost".to_vec()),
        Just(b"\x05\x03\x00\x04".to_vec()),
        Just(b"\x04\x01\x00\x50\0\0\0\x01".to_vec()),
        Just(b"CONNECT db:80 HTTP/1.1\r\n".to_vec()),
        Just(b"GET http://[::1]:80/a HTTP/1.1\r\n".to_vec()),
        Just(b"Connection: a, host\r\n".to_vec()),
        Just(b"\r\n".to_vec()),
        Just(b"\n\n".to_vec()),
    ];
    proptest::collection::vec(part, 0..8).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn no_handshake_depends_on_how_it_is_cut(bytes in nearly()) {
        let (out, next, handshake) = shaken(&bytes);
        match next {
            Next::Read => prop_assert!(bytes.len() <= MAX_BYTES),
            Next::Close => prop_assert!(!out.is_empty()),
            Next::Dial(_) | Next::Associate(_) => {
                let plain = handshake.connected().is_empty();
                let early = handshake.into_early();
                let kept = if plain { early.starts_with(b"GET /") } else { bytes.ends_with(&early) };
                prop_assert!(kept);
            }
        }
    }

    #[test]
    fn a_forwarded_head_is_one_request_for_its_target(
        path in "[!-~]{0,40}",
        name in "[A-Za-z][A-Za-z-]{0,15}",
        value in "[ -~]{0,40}",
    ) {
        let wire = format!("GET http://db:80/{path} HTTP/1.1\r\n{name}: {value}\r\n\r\n");
        let (_, next, handshake) = shake(wire.as_bytes(), wire.len());
        if next == host("db", 80) {
            let head = handshake.into_early();
            let mut headers = [httparse::EMPTY_HEADER; 8];
            let mut parsed = httparse::Request::new(&mut headers);
            let len = parsed.parse(&head).unwrap();
            prop_assert_eq!(len, httparse::Status::Complete(head.len()));
            prop_assert!(parsed.path.unwrap().starts_with('/'));
            let hosts = parsed.headers.iter().filter(|h| h.name.eq_ignore_ascii_case("host"));
            prop_assert_eq!(hosts.map(|h| h.value).collect::<Vec<_>>(), [b"db:80"]);
        }
    }

    #[test]
    fn datagrams_of_any_bytes_are_read_or_dropped(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        if let Some((_, payload)) = socks::datagram(&bytes) {
            prop_assert_eq!(bytes[2], 0);
            prop_assert!(bytes.ends_with(payload));
        }
    }
}

#[test]
fn a_datagram_comes_back_as_it_was_sent() {
    let from: SocketAddr = "[fd00::1]:53".parse().unwrap();
    let wire = socks::put_datagram(from, b"payload");
    let target = Target::Host {
        host: "fd00::1".to_owned(),
        port: 53,
    };
    assert_eq!(socks::datagram(&wire), Some((target, &b"payload"[..])));
    let fragment = [&wire[..2], &[1], &wire[3..]].concat();
    assert_eq!(socks::datagram(&fragment), None);
    for cut in 0..wire.len() - 7 {
        assert_eq!(socks::datagram(&wire[..cut]), None, "cut at {cut}");
    }
}
