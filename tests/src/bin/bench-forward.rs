//! Measures the ways from the host to a service in a guest, side by side in one run on one machine:
//! mvm's own forwarder, `ssh -L` through the guest's sshd, socat on a vsock port of the guest, and a
//! vsock stream with nothing between, which is the most there can be.
//!
//! `tests/bench-forward` builds and runs it. Prints a table; with `--write` it goes into
//! `docs/benchmarks.md` too. Nothing is asserted: figures depend on the machine, ratios less so.

use std::env;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tests::host::{self, eventually, tool_command};
use tests::image::{self, Filesystem};
use tests::net::{connect, free_port};
use tests::{Guest, Machine, Machines, Running, document, ssh};

#[path = "bench-forward/table.rs"]
mod table;

use table::{Figures, Round};

/// How often everything is measured; the median counts.
const ROUNDS: usize = 3;

/// For how long one figure is measured.
const SPELL: Duration = Duration::from_secs(3);

/// How many connections are timed in a round.
const CONNECTIONS: usize = 100;

/// How many clients ask for pages at once.
const CLIENTS: usize = 4;

/// The services in the guest: each at this port of TCP, and at the same one of vsock.
const SERVICES: [(&str, u16); 4] = [
    ("discard", 7001),
    ("pour", 7002),
    ("echo", 7003),
    ("http", 7004),
];

/// What is added to a service's port for the vsock port of its socat.
const SOCAT: u16 = 100;

/// A way to the services.
enum Way {
    /// Ports of this host, in the order of [`SERVICES`].
    Ports([u16; SERVICES.len()]),
    /// Vsock ports of the guest, this far from those of the services, through the control socket.
    Vsock { socket: PathBuf, offset: u16 },
}

/// A connection of either kind.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn end_writing(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).read(buffer),
            Stream::Unix(stream) => (&mut &*stream).read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).write(bytes),
            Stream::Unix(stream) => (&mut &*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Way {
    /// Connects to the service of this name.
    fn open(&self, service: &str) -> io::Result<Stream> {
        let at = SERVICES.iter().position(|(name, _)| *name == service);
        let at = at.ok_or(io::ErrorKind::NotFound)?;
        match self {
            Self::Ports(ports) => connect(ports[at]).map(Stream::Tcp),
            Self::Vsock { socket, offset } => {
                let port = SERVICES[at].1 + offset;
                vsock(socket, port).map(Stream::Unix)
            }
        }
    }
}

/// A connection to a vsock port of the guest, as `docs/control.md` describes it.
fn vsock(socket: &Path, port: u16) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    let request = format!(r#"{{"version":1,"op":"connect","port":{port}}}"#);
    let mut frame = (request.len() as u32).to_le_bytes().to_vec();
    frame.extend_from_slice(request.as_bytes());
    stream.write_all(&frame)?;
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let mut answer = vec![0; u32::from_le_bytes(len) as usize];
    stream.read_exact(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    match answer.contains("\"ok\"") {
        true => Ok(stream),
        false => Err(io::Error::other(answer.into_owned())),
    }
}

/// Bytes a second into the guest.
fn up(way: &Way) -> io::Result<f64> {
    let stream = way.open("discard")?;
    let block = vec![0x55; 256 << 10];
    let start = Instant::now();
    let mut sent = 0u64;
    while start.elapsed() < SPELL {
        (&stream).write_all(&block)?;
        sent += block.len() as u64;
    }
    stream.end_writing()?;
    // What is under way counts when it has arrived.
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer)?;
    let passed = start.elapsed();
    if answer.trim() != sent.to_string() {
        return Err(io::Error::other(format!("sent {sent}, arrived {answer}")));
    }
    Ok(sent as f64 / passed.as_secs_f64())
}

/// Bytes a second out of the guest.
fn down(way: &Way) -> io::Result<f64> {
    let stream = way.open("pour")?;
    let mut block = vec![0; 256 << 10];
    (&stream).read_exact(&mut block)?;
    let start = Instant::now();
    let mut received = 0;
    while start.elapsed() < SPELL {
        match (&stream).read(&mut block)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            len => received += len,
        }
    }
    Ok(received as f64 / start.elapsed().as_secs_f64())
}

/// How long it takes from asking for a connection to the answer to its first byte.
fn latencies(way: &Way) -> io::Result<Vec<Duration>> {
    (0..CONNECTIONS)
        .map(|_| {
            let start = Instant::now();
            let stream = way.open("echo")?;
            (&stream).write_all(b"!")?;
            (&stream).read_exact(&mut [0])?;
            let passed = start.elapsed();
            stream.end_writing()?;
            io::copy(&mut &stream, &mut io::sink())?;
            Ok(passed)
        })
        .collect()
}

/// Requests a second, each on a connection of its own, by several clients at once.
fn requests(way: &Way) -> io::Result<f64> {
    let served = AtomicU64::new(0);
    let start = Instant::now();
    thread::scope(|scope| {
        let client = || -> io::Result<()> {
            while start.elapsed() < SPELL {
                let stream = way.open("http")?;
                (&stream).write_all(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")?;
                let mut answer = Vec::new();
                (&stream).read_to_end(&mut answer)?;
                if !answer.starts_with(b"HTTP/1.1 200 ") {
                    return Err(io::Error::other("no page came"));
                }
                served.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        clients.into_iter().try_for_each(|client| {
            let ended = client.join();
            ended.map_err(|_| io::Error::other("a client panicked"))?
        })
    })?;
    Ok(served.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64())
}

/// Starts the services in the guest, each for TCP and for vsock, and a socat between the two.
fn start_services(machine: &Machine<'_>) -> Vec<Running> {
    machine.plant_peer();
    let mut running = Vec::new();
    for (name, port) in SERVICES {
        running.push(machine.peer(name, &format!("127.0.0.1:{port}")));
        running.push(machine.peer(name, &format!("vsock:{port}")));
        let listen = format!("VSOCK-LISTEN:{},fork,reuseaddr", port + SOCAT);
        let to = format!("TCP:127.0.0.1:{port},nodelay");
        running.push(machine.start(&["socat", "-b262144", &listen, &to]));
    }
    running
}

/// sshd in the guest and `ssh -L` to it, over a connection that mvm makes.
fn start_ssh(machine: &Machine<'_>, dir: &Path, ports: &[u16]) -> Vec<Running> {
    let key = ssh::make_key(dir, "bench");
    let server = ssh::start_sshd(machine, &key);
    let mut client = tool_command("ssh", "openssh-client");
    let connect = machine.command("connect", &["22"]);
    let words = std::iter::once(connect.get_program()).chain(connect.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    client
        .arg("-o")
        .arg(format!("ProxyCommand={}", words.join(" ")));
    for (name, value) in connect.get_envs() {
        if let Some(value) = value {
            client.env(name, value);
        }
    }
    client
        .args(["-N", "-F", "none", "-o", "BatchMode=yes", "-i"])
        .arg(&key);
    client.args([
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
    ]);
    client.args(["-o", "ExitOnForwardFailure=yes", "-o", "IdentitiesOnly=yes"]);
    for (port, (_, service)) in ports.iter().zip(SERVICES) {
        client
            .arg("-L")
            .arg(format!("127.0.0.1:{port}:127.0.0.1:{service}"));
    }
    client.arg("root@guest");
    let client = Running::start(client, Vec::new());
    eventually("ssh listens", || connect_all(ports).ok());
    vec![server, client]
}

fn connect_all(ports: &[u16]) -> io::Result<()> {
    ports.iter().try_for_each(|port| connect(*port).map(drop))
}

fn measure(way: &Way) -> io::Result<Round> {
    Ok(Round {
        up: up(way)?,
        down: down(way)?,
        latencies: latencies(way)?,
        requests: requests(way)?,
    })
}

fn main() {
    let write = match env::args().nth(1).as_deref() {
        None => false,
        Some("--write") => true,
        Some(other) => panic!("{other}: the only option is --write"),
    };
    let debian =
        image::debian(Filesystem::Ext4, "bench-forward").expect("an image is made as root");
    let machines = Machines::new();
    let ours = [(); SERVICES.len()].map(|()| free_port());
    let theirs = [(); SERVICES.len()].map(|()| free_port());
    let mut guest = Guest::new().rootfs_read_only(&debian).memory("1G");
    for (port, (_, service)) in ours.iter().zip(SERVICES) {
        guest = guest.option("-p", format!("{port}:{service}"));
    }
    let machine = machines.idle(guest);
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let _services = start_services(&machine);
    let _ssh = start_ssh(&machine, dir.path(), &theirs);
    eventually("the ports are open", || connect_all(&ours).ok());
    let socket = machine.control_socket();
    let vsock = |offset| Way::Vsock {
        socket: socket.clone(),
        offset,
    };
    let ways = [
        ("mvm -p", Way::Ports(ours)),
        ("ssh -L", Way::Ports(theirs)),
        ("socat over vsock", vsock(SOCAT)),
        ("vsock alone", vsock(0)),
    ];
    let mut figures: Vec<_> = ways.iter().map(|(name, _)| Figures::new(name)).collect();
    // In turns, so that whatever else the machine does meets all of them.
    for round in 1..=ROUNDS {
        for ((name, way), figures) in ways.iter().zip(&mut figures) {
            eprintln!("round {round} of {ROUNDS}: {name}");
            let measured = measure(way);
            figures.push(measured.unwrap_or_else(|error| panic!("{name}: {error}")));
        }
    }
    let told = &machine.inspect()["machine"];
    let heading = format!(
        "{} rounds of {} s a figure; machine run by {}, guest kernel {}, 1 CPU.",
        ROUNDS,
        SPELL.as_secs(),
        told["accel"].as_str().unwrap_or("?"),
        told["kernel"].as_str().unwrap_or("?"),
    );
    let table = table::show(&heading, &figures);
    print!("{table}");
    if write {
        let path = host::workspace().join("docs/benchmarks.md");
        document::replace(&path, "tests/bench-forward", &table).expect("the table can be written");
        let mut status = Command::new("git");
        status.args(["diff", "--stat", "--"]).arg(&path);
        // Only to show what has become of it.
        let _ = status.current_dir(host::workspace()).status();
    }
}
