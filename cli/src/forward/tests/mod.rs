//! The forwarder against a guest that is none: ports that refuse as the guest's would, connections that
//! end as they do in the guest, and a guest that means no good.

mod fake;
mod hostile;
mod publish;
mod reverse;
mod udp;

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use self::fake::{FakeGuest, PATIENCE};
use super::*;

/// A forwarder of these declarations and what it announces.
fn forwarder(declarations: Declarations) -> (Forwarder, Receiver<Announcement>) {
    let (sender, announcements) = mpsc::channel();
    let announce = move |announcement| drop(sender.send(announcement));
    (
        Forwarder::new(declarations, announce).unwrap(),
        announcements,
    )
}

/// One that publishes `publish` of a guest that is up.
fn publishing(publish: &[String]) -> (Forwarder, FakeGuest) {
    let (forwarder, _) = forwarder(Declarations {
        publish: publish.iter().map(|text| text.parse().unwrap()).collect(),
        ..Declarations::default()
    });
    let guest = FakeGuest::new();
    forwarder.attach(guest.clone()).unwrap();
    guest.control();
    (forwarder, guest)
}

/// A port of this host that nobody has, as far as can be seen, and seven more after it that no other test
/// gets. Low enough not to be given to somebody
/// else's outgoing connection meanwhile.
fn free_port() -> u16 {
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let spread = (std::process::id() % 200) as u16 * 50;
    loop {
        let port = 12_000 + (spread + NEXT.fetch_add(8, Ordering::Relaxed)) % 18_000;
        let both = ["127.0.0.1", "::1"].map(|ip| TcpListener::bind((ip, port)));
        if both.iter().all(Result::is_ok) {
            return port;
        }
    }
}

/// Waits until `wanted` is true.
fn eventually(what: &str, mut wanted: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !wanted() {
        assert!(Instant::now() < deadline, "{what}: it did not come to that");
        thread::sleep(Duration::from_millis(5));
    }
}

fn connect(port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Whether the host's port refuses as one at which nothing listens.
fn refuses(port: u16) -> bool {
    let refused = |ip: &str| match TcpStream::connect((ip, port)).map_err(|error| error.kind()) {
        Ok(_) => false,
        Err(io::ErrorKind::ConnectionRefused) => true,
        // It came at the very moment at which the listening ended.
        Err(io::ErrorKind::ConnectionReset) => false,
        Err(other) => panic!("{ip}:{port}: {other}"),
    };
    refused("127.0.0.1") && (!has_ipv6() || refused("::1"))
}

fn has_ipv6() -> bool {
    TcpListener::bind("[::1]:0").is_ok()
}

/// Answers with what it was sent, when that has ended.
fn echo_at_end(mut stream: TcpStream) {
    let mut all = Vec::new();
    if stream.read_to_end(&mut all).is_ok() {
        // A client that has gone does not need it.
        let _ = stream.write_all(&all);
    }
}

/// What the guest's program says to one connection.
fn ask(mut stream: TcpStream, question: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(question)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

fn error_kind<T>(result: io::Result<T>) -> Option<io::ErrorKind> {
    result.err().map(|error| error.kind())
}
