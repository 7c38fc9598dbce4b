//! The forwarder: whatever a guest binds to its localhost is reached, in every way there is, from a
//! machine that has no network device.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use tests::host::{LIMIT, eventually};
use tests::image::{self, Filesystem};
use tests::net::{
    connect, connect_eventually, curl, exchange, free_port, is_refused, write_pattern,
};
use tests::process::Input;
use tests::{Guest, Machine, Machines, Running};

const PAGE: &str = "a page of the guest\n";

/// A file server in the guest, at this port of its localhost.
fn http_server(machine: &Machine<'_>, port: u16) -> Running {
    let script = format!(
        "mkdir -p /tmp/www && cd /tmp/www && printf 'a page of the guest\\n' >page && \
         exec python3 -m http.server --bind 127.0.0.1 {port} 2>&1"
    );
    machine.start(&["sh", "-c", &script])
}

/// Fetches the page, as soon as the server is up.
#[track_caller]
fn expect_page(words: &[&str]) {
    let last = eventually(&format!("a page from curl {words:?}"), || {
        let output = curl(words);
        (output.code() == 0).then_some(output)
    });
    last.expect_stdout(PAGE);
}

#[test]
fn a_service_on_the_guests_localhost_is_reached_in_every_way() {
    const TEST: &str = "a_service_on_the_guests_localhost_is_reached_in_every_way";
    let Some(debian) = image::debian(Filesystem::Ext4, TEST) else {
        return;
    };
    let machines = Machines::new();
    let (first, second, proxy) = (free_port(), free_port(), free_port());
    let guest = Guest::new()
        .rootfs_read_only(&debian)
        .memory("1G")
        .option("-p", format!("{first}:8000"))
        .flag("--publish-auto")
        .option("--publish-auto-exclude", "8001")
        .option("--socks", proxy.to_string());
    let machine = machines.idle(guest);
    machine
        .exec("ls /sys/class/net")
        .expect_code(0)
        .expect_stdout("lo\n");
    assert!(is_refused(first), "nobody listens at 8000 in the guest yet");

    let _server = http_server(&machine, 8000);
    expect_page(&[&format!("http://127.0.0.1:{first}/page")]);
    expect_page(&[&format!("http://[::1]:{first}/page")]);
    expect_page(&[&format!("http://localhost:{first}/page")]);

    let added = machine.mvm("port add", &[&format!("{second}:8000")]);
    added.expect_code(0).expect_in_stdout(&second.to_string());
    expect_page(&[&format!("http://127.0.0.1:{second}/page")]);

    let socks = format!("127.0.0.1:{proxy}");
    let guest_url = "http://localhost:8000/page";
    expect_page(&["--socks5-hostname", &socks, guest_url]);
    expect_page(&["-x", &format!("http://{socks}"), guest_url]);
    expect_page(&["-x", &format!("http://{socks}"), "--proxytunnel", guest_url]);
    let refused = curl(&["--socks5-hostname", &socks, "http://localhost:8999/"]);
    assert_ne!(refused.code(), 0, "{refused}");

    // A second hop: a forward that was made inside the guest, bound to its localhost, to what listens at
    // another loopback address.
    machine.plant_peer();
    let hop = ["/tmp/peer", "relay", "127.0.0.1:9000", "127.0.0.1:8000"];
    let hop = machine.start(&hop);
    hop.expect_stdout("listening\n");
    let auto = eventually("9000 is published by itself", || {
        machine.find_port_of("9000")
    });
    expect_page(&[&format!("http://127.0.0.1:{auto}/page")]);
    expect_page(&["--socks5-hostname", &socks, "http://localhost:9000/page"]);
    expect_page(&[
        "-x",
        &format!("http://{socks}"),
        "http://localhost:9000/page",
    ]);
    let added = machine.mvm("port add", &["9000"]);
    added.expect_code(0);

    // One that is excluded is not.
    let excluded = machine.peer("echo", "127.0.0.1:8001");
    let listening = machine.peer("echo", "127.0.0.1:8002");
    let auto = eventually("8002 is published by itself", || {
        machine.find_port_of("8002")
    });
    assert_eq!(machine.find_port_of("8001"), None);
    drop(listening);
    eventually("8002 is withdrawn", || {
        machine.find_port_of("8002").is_none().then_some(())
    });
    assert!(is_refused(auto), "{auto} is nobody's");
    machine.mvm("port auto", &["off"]).expect_code(0);
    eventually("9000 is published by hand only", || {
        let of = machine.ports();
        let auto = of.iter().any(|forward| forward["auto"] == true);
        (!auto).then_some(())
    });
    drop(excluded);
}

#[test]
fn ports_are_opened_and_closed_as_the_guest_listens() {
    let machines = Machines::new();
    let (first, last) = free_range(3);
    let guest = Guest::new()
        .option("-p", format!("{first}-{last}:7000-7002"))
        .option("-p", "7005");
    let machine = machines.idle(guest);
    machine.plant_peer();
    let chosen = machine.port_of("7005");
    for port in [first, first + 1, last, chosen] {
        assert!(is_refused(port), "{port} is taken without a listener");
    }
    // On either family of the guest.
    let _four = machine.peer("echo", "127.0.0.1:7001");
    let _six = machine.peer("echo", "[::1]:7002");
    let any = machine.peer("echo", "0.0.0.0:7005");
    for port in [first + 1, last, chosen] {
        let stream = connect_eventually(port);
        assert_eq!(exchange(stream, b"hello").unwrap(), b"hello");
        let six = TcpStream::connect((Ipv6Addr::LOCALHOST, port)).unwrap();
        assert_eq!(exchange(six, b"six").unwrap(), b"six");
    }
    assert!(is_refused(first));
    // The host's port stays ours while nobody listens.
    drop(any);
    eventually("the port is refused again", || {
        is_refused(chosen).then_some(())
    });
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, chosen));
    assert!(taken.is_err_and(|error| error.kind() == ErrorKind::AddrInUse));
    let _again = machine.peer("echo", "127.0.0.1:7005");
    assert_eq!(
        exchange(connect_eventually(chosen), b"again").unwrap(),
        b"again"
    );

    // What is taken away is refused; a connection that runs goes on.
    let mut kept = connect(chosen).unwrap();
    machine
        .mvm("port rm", &[&chosen.to_string()])
        .expect_code(0);
    assert!(is_refused(chosen));
    kept.write_all(b"still here").unwrap();
    let mut answer = [0; 10];
    kept.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"still here");
    assert_eq!(machine.find_port_of("7005"), None);
    machine
        .mvm("port rm", &[&chosen.to_string()])
        .expect_code(125)
        .expect_in_stderr("port ls");

    // Wider than this host only where that was written out, and warned of.
    let wide = free_port();
    let added = machine.mvm("port add", &[&format!("0.0.0.0:{wide}:7001")]);
    added.expect_code(0).expect_in_stderr("0.0.0.0");
}

/// `count` free ports in a row.
fn free_range(count: u16) -> (u16, u16) {
    let free = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    let first = eventually("free ports in a row", || {
        let first = free_port();
        let last = first.checked_add(count - 1)?;
        (first..=last).all(free).then_some(first)
    });
    (first, first + count - 1)
}

#[test]
fn connect_is_a_connection_on_standard_input_and_output() {
    let machines = Machines::new();
    let machine = machines.idle(Guest::new());
    machine.plant_peer();
    let _echo = machine.peer("echo", "127.0.0.1:7000");
    let connect = |port: &str, input: &[u8]| {
        Running::start(machine.command("connect", &[port]), input.to_vec()).wait()
    };
    connect("7000", b"there and back")
        .expect_code(0)
        .expect_stdout("there and back");
    connect("7001", b"")
        .expect_code(1)
        .expect_stdout("")
        .expect_in_stderr("7001");
    // What does not read is not waited for.
    let command = machine.command("connect", &["7000"]);
    let mut open = Running::start(command, Input::Open);
    open.write(b"one");
    open.expect_stdout("one");
    open.write(b"two");
    open.expect_stdout("onetwo");
}

#[test]
fn unix_sockets_are_forwarded_both_ways() {
    let machines = Machines::new();
    let dir = tempfile::tempdir().unwrap();
    let (published, service) = (
        dir.path().join("host.sock"),
        dir.path().join("service.sock"),
    );
    let listener = UnixListener::bind(&service).unwrap();
    let guest = Guest::new()
        .option("-p", format!("{}:/run/guest.sock", published.display()))
        .option("-R", format!("/run/a/service.sock:{}", service.display()));
    let machine = machines.idle(guest);
    machine.plant_peer();

    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let mut said = String::new();
            // Whoever breaks off is not served.
            let _ = stream.read_to_string(&mut said);
            let _ = stream.write_all(format!("host heard {said}").as_bytes());
        }
    });
    machine
        .exec("/tmp/peer ask unix:/run/a/service.sock 'a question'")
        .expect_code(0)
        .expect_stdout("host heard a question\n");

    // A path of the guest is not watched: whether somebody listens there shows when it is used.
    let mut refused = UnixStream::connect(&published).unwrap();
    refused.set_read_timeout(Some(LIMIT)).unwrap();
    assert!(
        matches!(refused.read(&mut [0]), Ok(0) | Err(_)),
        "nobody listens in the guest yet"
    );
    let _sink = machine.peer("sink", "unix:/run/guest.sock");
    let mut stream = eventually("the socket of the guest is reached", || {
        UnixStream::connect(&published).ok()
    });
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let sent = write_pattern(&stream, 1 << 20).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, sent.line());
    let mode = fs::metadata(&published).unwrap().permissions();
    let mode = std::os::unix::fs::PermissionsExt::mode(&mode);
    assert_eq!(mode & 0o077, 0, "others may not use the socket: {mode:o}");

    machine.mvm("stop", &["-t", "1"]).expect_code(0);
    assert!(!published.exists(), "a socket is left behind");
}

#[test]
fn the_guest_reaches_what_was_listed_and_nothing_else() {
    let machines = Machines::new();
    let listed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let (open, shut) = (port(&listed), port(&other));
    let nobody = free_port();
    let guest = Guest::new()
        .option("-R", format!("6000:127.0.0.1:{open}"))
        .option("-R", format!("127.0.0.1:6001:localhost:{nobody}"));
    let machine = machines.idle(guest);
    let served = thread::spawn(move || {
        let (mut stream, _) = listed.accept().unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        stream
            .write_all(format!("heard {said}").as_bytes())
            .unwrap();
    });
    machine
        .exec("echo hello | nc 127.0.0.1 6000")
        .expect_code(0)
        .expect_stdout("heard hello\n");
    served.join().unwrap();
    // A service that is down looks so from the guest, too.
    machine
        .exec("echo hello | nc 127.0.0.1 6001")
        .expect_stdout("");
    // No other way leads to the host.
    other.set_nonblocking(true).unwrap();
    for address in ["127.0.0.1", "10.0.2.2", "192.168.0.1"] {
        let script = format!("echo hello | timeout 5 nc -w 2 {address} {shut}");
        let output = machine.exec(&script);
        assert_ne!(output.code(), 0, "{address}: {output}");
    }
    assert!(
        other
            .accept()
            .is_err_and(|error| error.kind() == ErrorKind::WouldBlock),
        "the guest has reached what was not listed"
    );
}

#[test]
fn a_machine_in_the_foreground_tells_of_ports_as_they_come_and_go() {
    let guest = Guest::new().flag("--publish-auto").input(Input::Open);
    let script = "read line; nc -l -p 7000 -e cat; read line";
    let mut machine = guest.flag("-i").start(&["sh", "-c", script]);
    machine.write(b"go\n");
    machine.expect_stderr("→ guest port 7000\n");
    let told = machine.errors_so_far();
    let url = told
        .lines()
        .find_map(|line| line.strip_suffix(" → guest port 7000"));
    let port = url.and_then(|line| line.rsplit(':').next()?.parse().ok());
    let port = port.unwrap_or_else(|| panic!("no URL: {told}"));
    assert!(told.contains(&format!("http://127.0.0.1:{port}")), "{told}");
    let stream = connect_eventually(port);
    assert_eq!(exchange(stream, b"hello").unwrap(), b"hello");
    machine.expect_stderr("is gone: nothing listens at guest port 7000\n");
    machine.write(b"end\n");
    machine.wait().expect_code(0).expect_nothing_left();
}

#[test]
fn datagrams_of_a_thousand_senders_come_back_to_each() {
    const SENDERS: usize = 1000;
    let machines = Machines::new();
    let port = free_port();
    let proxy = free_port();
    let guest = Guest::new()
        .option("-p", format!("{port}:7000/udp"))
        .option("--socks", proxy.to_string());
    let machine = machines.idle(guest);
    machine.plant_peer();
    let _echo = machine.peer("udp-echo", "127.0.0.1:7000");
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    tests::net::raise_descriptor_limit();
    let senders: Vec<UdpSocket> = (0..SENDERS).map(|_| udp_client()).collect();
    let mut missing: Vec<usize> = (0..SENDERS).collect();
    // Datagrams may be lost, so those without an answer are sent again, in portions that fit queues.
    eventually("each sender has its own answer", || {
        for portion in missing.chunks(100) {
            for &sender in portion {
                // A refusal of an earlier datagram is reported here.
                let _ = senders[sender].send_to(format!("from {sender}").as_bytes(), at);
            }
            thread::sleep(Duration::from_millis(100));
        }
        missing.retain(|&sender| !has_answer(&senders[sender], &format!("from {sender}")));
        missing.is_empty().then_some(())
    });
    // The largest datagram fits, and so does an empty one.
    for len in [0, 1472, 60_000] {
        let message = "x".repeat(len);
        eventually(&format!("a datagram of {len} bytes comes back"), || {
            let _ = senders[0].send_to(message.as_bytes(), at);
            thread::sleep(Duration::from_millis(100));
            has_answer(&senders[0], &message).then_some(())
        });
    }
    socks_datagram(proxy);
}

fn udp_client() -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

/// Reads what has come; another's answer is a failure.
#[track_caller]
fn has_answer(socket: &UdpSocket, wanted: &str) -> bool {
    let mut buffer = vec![0; 65_536];
    let mut found = false;
    loop {
        match socket.recv(&mut buffer) {
            Ok(len) if &buffer[..len] == wanted.as_bytes() => found = true,
            // Of an earlier attempt with another message.
            Ok(len) => assert!(
                !buffer[..len].starts_with(b"from ")
                    || wanted.starts_with('x')
                    || wanted.is_empty(),
                "{wanted:?} was answered with {:?}",
                String::from_utf8_lossy(&buffer[..len])
            ),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return found,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// RFC 1928, UDP ASSOCIATE: to the guest's localhost by name.
fn socks_datagram(proxy: u16) {
    let mut control = connect(proxy).unwrap();
    control.write_all(&[5, 1, 0]).unwrap();
    let mut method = [0; 2];
    control.read_exact(&mut method).unwrap();
    assert_eq!(method, [5, 0]);
    control.write_all(&[5, 3, 0, 1, 0, 0, 0, 0, 0, 0]).unwrap();
    let mut reply = [0; 10];
    control.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..4], [5, 0, 0, 1], "{reply:?}");
    let at = SocketAddr::from((
        Ipv4Addr::from([reply[4], reply[5], reply[6], reply[7]]),
        u16::from_be_bytes([reply[8], reply[9]]),
    ));
    let client = udp_client();
    let mut datagram = vec![0, 0, 0, 3, 9];
    datagram.extend_from_slice(b"localhost");
    datagram.extend_from_slice(&7000u16.to_be_bytes());
    datagram.extend_from_slice(b"through the proxy");
    eventually("a datagram through the proxy comes back", || {
        client.send_to(&datagram, at).unwrap();
        thread::sleep(Duration::from_millis(100));
        let mut buffer = [0; 1500];
        let (len, from) = client.recv_from(&mut buffer).ok()?;
        assert_eq!(from, at);
        assert!(buffer[..len].ends_with(b"through the proxy"));
        Some(())
    });
}
