//! The proxy with clients on the loopback and an agent that is this process.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};

use agent::protocol::{self, Datagram, DialError, FromForwarder, Open, Target, ToForwarder};

use super::*;
use crate::forward::listener::TcpPort;
use crate::forward::{Declarations, Guest};

/// Long enough for the slowest machine; only a failing test waits for it.
const GENEROUS: Duration = Duration::from_secs(60);

/// An agent whose guest's ports are this process's, and whose names are those below.
#[derive(Clone)]
struct Agent {
    /// What was dialed and not attached yet.
    held: Arc<Mutex<HashMap<u64, TcpStream>>>,
    /// Takes the agent's end of each connection for datagrams.
    datagrams: Sender<UnixStream>,
    events: Sender<Told>,
}

/// What the agent was told and keeps to itself.
enum Told {
    /// To dial the host `held`, with where to answer.
    Dial(u64, UnixStream),
    /// That nobody wants the connection.
    Drop(u64),
}

impl Guest for Agent {
    fn connect(&self) -> io::Result<UnixStream> {
        let (near, far) = UnixStream::pair()?;
        let agent = self.clone();
        thread::spawn(move || match protocol::receive(&far).unwrap() {
            Some(Open::Forward) => agent.control(&far),
            other => panic!("opened as {other:?}"),
        });
        Ok(near)
    }

    fn join(&self, prelude: Vec<u8>, stream: OwnedFd) -> io::Result<()> {
        let mut early = prelude.as_slice();
        let token = match protocol::receive(&mut early)? {
            Some(Open::Attach { token }) => token,
            Some(Open::Datagrams) => {
                self.datagrams.send(UnixStream::from(stream)).unwrap();
                return Ok(());
            }
            other => panic!("opened as {other:?}"),
        };
        let mut guest = self.held.lock().unwrap().remove(&token).unwrap();
        let (client, early) = (TcpStream::from(stream), early.to_vec());
        thread::spawn(move || {
            client.set_nonblocking(false).unwrap();
            guest.write_all(&early).unwrap();
            let back = (guest.try_clone().unwrap(), client.try_clone().unwrap());
            thread::spawn(move || copy(back.0, back.1));
            copy(client, guest);
        });
        Ok(())
    }
}

impl Agent {
    fn control(&self, stream: &UnixStream) {
        while let Some(message) = protocol::receive(stream).unwrap() {
            match message {
                ToForwarder::Dial { token, target } => self.dial(stream, token, target),
                ToForwarder::Drop { token } => {
                    self.held.lock().unwrap().remove(&token);
                    // Not every test asks.
                    let _ = self.events.send(Told::Drop(token));
                }
                ToForwarder::Watch(_) => {}
                other => panic!("told {other:?}"),
            }
        }
    }

    fn dial(&self, stream: &UnixStream, token: u64, target: Target) {
        let (host, port) = match target {
            Target::Loopback(port) => ("localhost".to_owned(), port),
            Target::Host { host, port } => (host, port),
            Target::Unix(_) => panic!("the proxy knows no such targets"),
        };
        let result = match host.as_str() {
            "localhost" | "service" | "127.0.0.1" => {
                match TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
                    Ok(stream) => {
                        self.held.lock().unwrap().insert(token, stream);
                        Ok(())
                    }
                    Err(_) => Err(DialError::Refused),
                }
            }
            "held" => {
                let told = Told::Dial(token, stream.try_clone().unwrap());
                return self.events.send(told).unwrap();
            }
            "unreachable" => Err(DialError::Unreachable),
            "slow" => Err(DialError::TimedOut),
            "broken" => Err(DialError::Other("it is broken".to_owned())),
            _ => Err(DialError::NoSuchHost),
        };
        answer(stream, token, result);
    }
}

fn answer(stream: &UnixStream, token: u64, result: Result<(), DialError>) {
    protocol::send(stream, &FromForwarder::Dialed { token, result }).unwrap();
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    // Either end may go before the other; the test sees what it gets.
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}

/// A proxy, what the agent was told, and its ends of connections for datagrams.
fn proxy_of(patience: Duration) -> (Proxy, Receiver<Told>, Receiver<UnixStream>) {
    let (events, told) = mpsc::channel();
    let (datagrams, agents) = mpsc::channel();
    let forwarder = Forwarder::new(Declarations::default(), |_| ()).unwrap();
    let agent = Agent {
        held: Arc::default(),
        datagrams,
        events,
    };
    forwarder.attach(agent).unwrap();
    let port = TcpPort::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let proxy = Proxy::serve(vec![HostSocket::Tcp(port)], forwarder, patience).unwrap();
    (proxy, told, agents)
}

fn proxy() -> Proxy {
    proxy_of(GENEROUS).0
}

fn connect(proxy: &Proxy) -> TcpStream {
    let client = TcpStream::connect(proxy.addresses()[0]).unwrap();
    client.set_read_timeout(Some(GENEROUS)).unwrap();
    client
}

/// A service that answers each connection with what was sent to it, in capitals, when all of it was.
fn service() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut request = Vec::new();
                stream.read_to_end(&mut request).unwrap();
                request.make_ascii_uppercase();
                stream.write_all(&request).unwrap();
            });
        }
    });
    port
}

/// A web server that answers each connection's request with its head.
fn web_server() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
                head.push(byte[0]);
            }
            let answer = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
            stream.write_all(answer.as_bytes()).unwrap();
            stream.write_all(&head).unwrap();
        }
    });
    port
}

/// A port where nobody listens.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

fn socks5(host: &str, port: u16) -> Vec<u8> {
    let mut wire = b"\x05\x01\x00\x05\x01\x00\x03".to_vec();
    wire.push(host.len() as u8);
    wire.extend(host.as_bytes());
    wire.extend(port.to_be_bytes());
    wire
}

const SOCKS5_CONNECTED: [u8; 12] = [5, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0];

/// What a client gets that sends `wire` and ends.
fn exchange(proxy: &Proxy, wire: &[u8]) -> Vec<u8> {
    let mut client = connect(proxy);
    client.write_all(wire).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    got
}

fn exchange_text(proxy: &Proxy, wire: &str) -> String {
    String::from_utf8(exchange(proxy, wire.as_bytes())).unwrap()
}

#[test]
fn what_is_sent_before_the_answer_arrives_in_order() {
    let (proxy, port) = (proxy(), service());
    let early = [socks5("localhost", port), b"early".to_vec()].concat();
    assert_eq!(
        exchange(&proxy, &early),
        [&SOCKS5_CONNECTED[..], b"EARLY"].concat()
    );
    let connect = format!("CONNECT service:{port} HTTP/1.1\r\n\r\nearly");
    assert_eq!(
        exchange_text(&proxy, &connect),
        "HTTP/1.1 200 Connection established\r\n\r\nEARLY"
    );
    let mut socks4 = b"\x04\x01".to_vec();
    socks4.extend(port.to_be_bytes());
    socks4.extend(b"\x7f\0\0\x01user\0early");
    assert_eq!(exchange(&proxy, &socks4), b"\0\x5a\0\0\0\0\0\0EARLY");
}

#[test]
fn data_flows_both_ways_after_the_answer() {
    let (proxy, port) = (proxy(), service());
    let mut client = connect(&proxy);
    for byte in socks5("service", port) {
        client.write_all(&[byte]).unwrap();
    }
    let mut answer = [0; 12];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(answer, SOCKS5_CONNECTED);
    let sent = vec![b'a'; 1 << 20];
    client.write_all(&sent).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert!(got == vec![b'A'; 1 << 20], "{} bytes", got.len());
}

#[test]
fn a_connection_that_is_made_outlives_the_proxy() {
    let (proxy, port) = (proxy(), service());
    let mut client = connect(&proxy);
    client.write_all(&socks5("localhost", port)).unwrap();
    let mut answer = [0; 12];
    client.read_exact(&mut answer).unwrap();
    let address = proxy.addresses()[0];
    drop(proxy);
    assert!(TcpStream::connect(address).is_err());
    client.write_all(b"later").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"LATER");
}

#[test]
fn failures_are_told_in_the_clients_protocol() {
    let proxy = proxy();
    let cases = [
        ("localhost", 5, "502", "Nobody listens"),
        ("unreachable", 3, "502", "no way"),
        ("nowhere", 4, "502", "knows no host"),
        ("slow", 6, "504", "in time"),
        ("broken", 1, "502", "it is broken"),
    ];
    let port = free_port();
    for (host, code, status, reason) in cases {
        let got = exchange(&proxy, &socks5(host, port));
        assert_eq!(got[..4], [5, 0, 5, code], "{host}");
        assert_eq!(got.len(), 12);
        for request in [
            format!("CONNECT {host}:{port} HTTP/1.1\r\n\r\n"),
            format!("GET http://{host}:{port}/ HTTP/1.1\r\n\r\n"),
        ] {
            let got = exchange_text(&proxy, &request);
            assert!(got.starts_with(&format!("HTTP/1.1 {status} ")), "{got}");
            assert!(got.contains(reason), "{got}");
        }
    }
}

#[test]
fn a_refused_client_reads_its_answer_whatever_else_it_sent() {
    let proxy = proxy();
    let mut client = connect(&proxy);
    let request = b"POST / HTTP/1.1\r\nContent-Length: 500000\r\n\r\n";
    client.write_all(request).unwrap();
    client.write_all(&vec![b'x'; 500_000]).unwrap();
    let mut got = String::new();
    client.read_to_string(&mut got).unwrap();
    assert!(got.starts_with("HTTP/1.1 400 "), "{got}");
}

#[test]
fn garbage_is_answered_and_disturbs_nobody() {
    let (proxy, port) = (proxy(), service());
    let mut patient = connect(&proxy);
    patient.write_all(&socks5("localhost", port)).unwrap();
    assert_eq!(exchange(&proxy, b"\x05\x01\x02"), b"\x05\xff");
    assert!(exchange(&proxy, b"\x16\x03\x01\x02").starts_with(b"HTTP/1.1 400 "));
    assert!(exchange(&proxy, &[0xff; 4096]).starts_with(b"HTTP/1.1 400 "));
    assert!(exchange(&proxy, &[b'A'; 100_000]).starts_with(b"HTTP/1.1 431 "));
    // Half a message, and nothing at all.
    assert_eq!(exchange(&proxy, b"\x05"), b"");
    assert_eq!(exchange(&proxy, b""), b"");
    patient.shutdown(Shutdown::Write).unwrap();
    let mut got = Vec::new();
    patient.read_to_end(&mut got).unwrap();
    assert_eq!(got, SOCKS5_CONNECTED);
}

fn dial_held(told: &Receiver<Told>) -> (u64, UnixStream) {
    match told.recv_timeout(GENEROUS).unwrap() {
        Told::Dial(token, stream) => (token, stream),
        Told::Drop(token) => panic!("{token} was dropped"),
    }
}

#[test]
fn many_clients_are_connected_at_a_time() {
    let (proxy, told, _) = proxy_of(GENEROUS);
    let port = service();
    let mut clients: Vec<TcpStream> = (0..500).map(|_| connect(&proxy)).collect();
    for client in &mut clients {
        client.write_all(&socks5("held", port)).unwrap();
    }
    let waiting: Vec<(u64, UnixStream)> = (0..500).map(|_| dial_held(&told)).collect();
    // All are under way, and one more is served meanwhile.
    assert!(exchange(&proxy, &socks5("localhost", port)).starts_with(&SOCKS5_CONNECTED));
    for (token, stream) in waiting {
        answer(&stream, token, Err(DialError::Refused));
    }
    for mut client in clients {
        let mut got = Vec::new();
        client.read_to_end(&mut got).unwrap();
        assert_eq!(got[..4], [5, 0, 5, 5]);
    }
}

#[test]
fn clients_that_dawdle_are_told_so_and_let_go() {
    let (proxy, ..) = proxy_of(Duration::from_millis(500));
    let (mut web, mut socks, mut silent) = (connect(&proxy), connect(&proxy), connect(&proxy));
    web.write_all(b"GET http://ser").unwrap();
    socks.write_all(b"\x05\x01\x00\x05\x01").unwrap();
    let mut got = String::new();
    web.read_to_string(&mut got).unwrap();
    assert!(got.starts_with("HTTP/1.1 408 "), "{got}");
    let mut got = Vec::new();
    socks.read_to_end(&mut got).unwrap();
    assert_eq!(got, [5, 0]);
    silent.read_to_end(&mut got).unwrap();
    assert_eq!(got, [5, 0]);
}

#[test]
fn silent_clients_make_room_for_others() {
    let (proxy, port) = (proxy(), service());
    let mut silent = Vec::new();
    for number in 0..server::MAX_CLIENTS + 8 {
        let mut client = connect(&proxy);
        if number % 2 == 0 {
            client.write_all(b"G").unwrap();
        }
        silent.push(client);
    }
    assert_eq!(
        exchange(&proxy, &[socks5("localhost", port), b"x".to_vec()].concat())[12..],
        *b"X"
    );
    // The oldest had to go.
    let gone = silent[0].read(&mut [0; 64]);
    assert!(
        matches!(gone, Ok(0) | Err(_)) && !is_timeout(&gone),
        "{gone:?}"
    );
}

fn is_timeout(result: &io::Result<usize>) -> bool {
    let kind = result.as_ref().map_err(io::Error::kind);
    matches!(
        kind,
        Err(io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
    )
}

#[test]
fn a_client_that_resets_while_the_guest_connects_costs_the_connection() {
    let (proxy, told, _) = proxy_of(GENEROUS);
    let mut client = connect(&proxy);
    client.write_all(&socks5("held", 80)).unwrap();
    let (token, stream) = dial_held(&told);
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
    // A client that comes later is served after the reset was seen.
    assert_eq!(exchange(&proxy, b"\x05\x00"), b"\x05\xff");
    answer(&stream, token, Ok(()));
    match told.recv_timeout(GENEROUS).unwrap() {
        Told::Drop(dropped) => assert_eq!(dropped, token),
        Told::Dial(..) => panic!("dialed again"),
    }
}

#[test]
fn every_plain_request_has_its_own_connection_to_its_own_host() {
    let (proxy, port) = (proxy(), web_server());
    let got = exchange_text(
        &proxy,
        &format!(
            "GET http://service:{port}/page HTTP/1.1\r\nHost: service\r\nConnection: keep-alive\r\n\r\n"
        ),
    );
    assert!(
        got.contains("\r\nConnection: close\r\n\r\nGET /page HTTP/1.1\r\n"),
        "{got}"
    );
    assert!(
        got.contains(&format!(
            "\r\nHost: service:{port}\r\nConnection: close\r\n\r\n"
        )),
        "{got}"
    );
}

#[test]
fn curl_gets_pages_by_each_protocol() {
    let (proxy, port) = (proxy(), web_server());
    let at = proxy.addresses()[0];
    let ways = [
        vec!["--socks5-hostname".to_owned(), at.to_string()],
        vec!["--socks4a".to_owned(), at.to_string()],
        vec!["-x".to_owned(), format!("http://{at}")],
        vec!["-p".to_owned(), "-x".to_owned(), format!("http://{at}")],
    ];
    for way in ways {
        let Some(page) = curl(&way, &format!("http://service:{port}/page")) else {
            return;
        };
        assert!(
            page.starts_with("GET /page HTTP/1.1\r\n"),
            "{way:?}: {page}"
        );
        assert!(
            page.contains(&format!("Host: service:{port}\r\n")),
            "{page}"
        );
        assert!(!page.contains("Proxy-"), "{way:?}: {page}");
    }
}

/// What curl prints; None on a machine without it.
fn curl(way: &[String], url: &str) -> Option<String> {
    let run = Command::new("curl")
        .args([
            "--silent",
            "--show-error",
            "--noproxy",
            "",
            "--max-time",
            "60",
        ])
        .args(way)
        .arg(url)
        .output();
    let output = match run {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            eprintln!("there is no curl here: only the tests by sockets speak for it");
            return None;
        }
        run => run.unwrap(),
    };
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{way:?}: {error}");
    Some(String::from_utf8(output.stdout).unwrap())
}

/// A client with a relay for its datagrams, and where that is.
fn associate(proxy: &Proxy, port: u16) -> (TcpStream, SocketAddr) {
    let mut client = connect(proxy);
    let mut wire = b"\x05\x01\x00\x05\x03\x00\x01\0\0\0\0".to_vec();
    wire.extend(port.to_be_bytes());
    client.write_all(&wire).unwrap();
    let mut answer = [0; 12];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(answer[..10], [5, 0, 5, 0, 0, 1, 127, 0, 0, 1]);
    let port = u16::from_be_bytes([answer[10], answer[11]]);
    (client, (Ipv4Addr::LOCALHOST, port).into())
}

fn relaying() -> (Proxy, Receiver<UnixStream>) {
    let (proxy, _, agents) = proxy_of(GENEROUS);
    (proxy, agents)
}

fn udp() -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_read_timeout(Some(GENEROUS)).unwrap();
    socket
}

fn agent_end(agents: &Receiver<UnixStream>) -> UnixStream {
    let agent = agents.recv_timeout(GENEROUS).unwrap();
    agent.set_read_timeout(Some(GENEROUS)).unwrap();
    agent
}

fn next(agent: &UnixStream) -> Datagram {
    protocol::receive(agent).unwrap().unwrap()
}

#[test]
fn datagrams_go_to_the_guest_and_back() {
    let (proxy, agents) = relaying();
    let (client, relay) = associate(&proxy, 0);
    let agent = agent_end(&agents);
    let socket = udp();
    socket
        .send_to(b"\0\0\0\x03\x02ns\x00\x35query", relay)
        .unwrap();
    let Datagram::Send { flow, to, payload } = next(&agent) else {
        panic!("something else was sent");
    };
    let host = "ns".to_owned();
    assert_eq!(
        (to, payload),
        (Target::Host { host, port: 53 }, b"query".to_vec())
    );

    let answer = Datagram::Received {
        flow,
        from: "10.0.0.9:53".parse().unwrap(),
        payload: vec![7; 65_000],
    };
    protocol::send(&agent, &answer).unwrap();
    let mut buffer = vec![0; 70_000];
    let (len, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!((len, from), (65_010, relay));
    assert_eq!(buffer[..10], *b"\0\0\0\x01\x0a\0\0\x09\0\x35");

    // The flow ends with the client's connection.
    drop(client);
    assert_eq!(next(&agent), Datagram::Closed { flow });
}

#[test]
fn fragments_garbage_and_strangers_datagrams_are_dropped() {
    let (proxy, agents) = relaying();
    let (socket, stranger) = (udp(), udp());
    let port = socket.local_addr().unwrap().port();
    let (_client, relay) = associate(&proxy, port);
    let agent = agent_end(&agents);
    stranger
        .send_to(b"\0\0\0\x01\x0a\0\0\x01\0\x35stranger", relay)
        .unwrap();
    socket
        .send_to(b"\0\0\x01\x01\x0a\0\0\x01\0\x35fragment", relay)
        .unwrap();
    socket.send_to(b"\0\0\0\x09garbage", relay).unwrap();
    socket.send_to(b"", relay).unwrap();
    socket
        .send_to(b"\0\0\0\x03\x09localhost\0\x35", relay)
        .unwrap();
    let Datagram::Send { to, payload, .. } = next(&agent) else {
        panic!("something else was sent");
    };
    assert_eq!((to, payload), (Target::Loopback(53), Vec::new()));
}

#[test]
fn a_relay_without_a_port_is_the_first_senders() {
    let (proxy, agents) = relaying();
    let (socket, stranger) = (udp(), udp());
    let (_client, relay) = associate(&proxy, 0);
    let agent = agent_end(&agents);
    for (sender, payload) in [(&socket, b'1'), (&stranger, b'2'), (&socket, b'3')] {
        let wire = [&b"\0\0\0\x01\x0a\0\0\x01\0\x35"[..], &[payload]].concat();
        sender.send_to(&wire, relay).unwrap();
    }
    for expected in [b"1", b"3"] {
        let Datagram::Send { payload, .. } = next(&agent) else {
            panic!("something else was sent");
        };
        assert_eq!(payload, expected);
    }
}

#[test]
fn a_guest_that_sends_nonsense_loses_its_flows_and_can_begin_anew() {
    let (proxy, agents) = relaying();
    for nonsense in [&[0xff; 64][..], &[4, 0, 0, 0, 9, 9, 9, 9], b""] {
        let (mut client, _) = associate(&proxy, 0);
        let mut agent = agent_end(&agents);
        // Flows that are not there are not worth a word.
        let odd = Datagram::Received {
            flow: 7,
            from: "10.0.0.9:53".parse().unwrap(),
            payload: Vec::new(),
        };
        protocol::send(&agent, &odd).unwrap();
        protocol::send(&agent, &Datagram::Closed { flow: 8 }).unwrap();
        agent.write_all(nonsense).unwrap();
        agent.shutdown(Shutdown::Both).unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn there_are_as_many_relays_as_there_is_room_for() {
    let (proxy, agents) = relaying();
    let mut clients: Vec<_> = (0..server::MAX_FLOWS)
        .map(|_| associate(&proxy, 0))
        .collect();
    let _agent = agent_end(&agents);
    let mut wire = b"\x05\x01\x00\x05\x03\x00\x01\0\0\0\0\0\0".to_vec();
    assert_eq!(exchange(&proxy, &wire)[..4], [5, 0, 5, 1]);
    // Ended by what the client says on it, which is nothing, and its end.
    wire.clear();
    clients.pop();
    let mut client = associate_when_free(&proxy);
    client.write_all(b"ignored").unwrap();
}

/// A relay's end is seen in its own time.
fn associate_when_free(proxy: &Proxy) -> TcpStream {
    loop {
        let mut client = connect(proxy);
        client
            .write_all(b"\x05\x01\x00\x05\x03\x00\x01\0\0\0\0\0\0")
            .unwrap();
        let mut answer = [0; 12];
        client.read_exact(&mut answer).unwrap();
        if answer[3] == 0 {
            return client;
        }
    }
}
