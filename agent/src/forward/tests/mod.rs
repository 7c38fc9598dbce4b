//! The reactor from outside: Unix sockets stand for vsock, this machine's loopback for the guest's.

mod control;
mod datagram;
mod join;
mod leftover;
mod name;
mod watch;

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use agent::protocol::{self, Open, Target};

use super::{Handle, Listener, Reactor};
use crate::connection::Connection;
use crate::tree::Tree;

/// Long enough for a loaded machine; a test that gets here has failed.
const PATIENCE: Duration = Duration::from_secs(60);

impl Listener for UnixListener {
    fn accept(&self) -> io::Result<Connection> {
        Ok(Connection::new(UnixListener::accept(self)?.0))
    }
}

/// Where the host connects to a reactor that is to be.
fn door() -> (SocketAddr, UnixListener) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("mvm-agent-test-{}-{number}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    // As many wait as in a machine, where std asks for fewer.
    rustix::net::listen(&listener, 4096).unwrap();
    listener.set_nonblocking(true).unwrap();
    (address, listener)
}

/// Starts a reactor on a thread, which ends with the process, and tells where it listens.
pub fn start(
    handle: Handle,
    root: Tree,
    hand_on: impl FnMut(Connection, Open) + Send + 'static,
) -> SocketAddr {
    let (address, listener) = door();
    thread::spawn(move || {
        let (listener, hand_on) = (Box::new(listener), Box::new(hand_on));
        let reactor = Reactor::new(listener, handle, Arc::new(root), hand_on).unwrap();
        reactor.run().unwrap()
    });
    address
}

/// A reactor that the test runs itself, and where it listens.
fn reactor(handle: Handle, root: Tree) -> (SocketAddr, Reactor) {
    let (address, listener) = door();
    let hand_on = |_, open| panic!("{open:?} was handed on");
    let reactor = Reactor::new(
        Box::new(listener),
        handle,
        Arc::new(root),
        Box::new(hand_on),
    );
    (address, reactor.unwrap())
}

/// A reactor for a machine with this root, which nothing is handed on from.
fn start_in(root: Tree) -> SocketAddr {
    let handle = Handle::new().unwrap();
    start(handle, root, |_, open| panic!("{open:?} was handed on"))
}

/// The host's end of a new connection to a reactor that all tests share.
fn connect(open: &Open) -> UnixStream {
    static DOOR: OnceLock<SocketAddr> = OnceLock::new();
    connect_to(DOOR.get_or_init(|| start_in(Tree::own().unwrap())), open)
}

/// The host's end of a new connection.
fn connect_to(door: &SocketAddr, open: &Open) -> UnixStream {
    let host = UnixStream::connect_addr(door).unwrap();
    host.set_read_timeout(Some(PATIENCE)).unwrap();
    host.set_write_timeout(Some(PATIENCE)).unwrap();
    protocol::send(&host, open).unwrap();
    host
}

/// A connection from the host to a service in the guest: both ends.
fn joined() -> (UnixStream, TcpStream) {
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = service.local_addr().unwrap().port();
    let host = connect(&Open::Dial(Target::Loopback(port)));
    let guest = service.accept().unwrap().0;
    guest.set_read_timeout(Some(PATIENCE)).unwrap();
    guest.set_write_timeout(Some(PATIENCE)).unwrap();
    (host, guest)
}

/// What reading ends with.
fn end_of(mut from: impl Read) -> io::Result<usize> {
    from.read(&mut [0; 64])
}

/// The host's connection was closed, not only shut down for writing.
fn assert_reset(mut host: &UnixStream) {
    match end_of(host) {
        Ok(0) => {}
        // A Unix socket says so where its peer had not read all.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
        other => panic!("the host reads {other:?}"),
    }
    let error = host.write_all(b"more").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}
