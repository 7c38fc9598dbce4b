//! A guest without a machine: it speaks the agent's protocol, and its ports are those of this host's
//! loopback.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use agent::protocol::{
    self, Bind, Datagram, DialError, FromForwarder, Listener, Open, Target, ToForwarder,
};

use crate::forward::Guest;

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What the guest has, and what was asked of it.
#[derive(Default)]
struct State {
    /// TCP ports of the guest, and where on this host they are.
    ports: HashMap<u16, SocketAddr>,
    /// The same for UDP.
    datagrams: HashMap<u16, SocketAddr>,
    /// Unix sockets of the guest, and where on this host they are.
    paths: HashMap<Vec<u8>, std::path::PathBuf>,
    /// Ends of connections that wait for their other end.
    held: HashMap<u64, TcpStream>,
    /// What was dropped.
    dropped: Vec<u64>,
    /// What the guest listens for.
    binds: HashMap<u32, Bind>,
    /// Why it does not.
    refuse_binds: Option<String>,
    watched: bool,
    /// The agent's ends of control connections, the current one last.
    controls: Vec<UnixStream>,
    tokens: u64,
    /// Datagram flows that were seen.
    flows: usize,
    closed_flows: usize,
    /// Dials are never answered.
    silent: bool,
}

/// The guest; clones are the same.
#[derive(Clone, Default)]
pub struct FakeGuest {
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl FakeGuest {
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the guest's state is as wanted.
    fn wait<T>(&self, what: &str, mut wanted: impl FnMut(&mut State) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.state();
        loop {
            if let Some(found) = wanted(&mut state) {
                return found;
            }
            assert!(Instant::now() < deadline, "{what}: it did not come to that");
            let changed = &self.shared.1;
            state = changed
                .wait_timeout(state, Duration::from_millis(50))
                .unwrap()
                .0;
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state());
        self.shared.1.notify_all();
        result
    }

    /// A program of the guest listens at `port` and serves each connection by `serve`; the host is told.
    pub fn serve(&self, port: u16, serve: impl Fn(TcpStream) + Clone + Send + 'static) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let serve = serve.clone();
                thread::spawn(move || serve(stream));
            }
        });
        self.listen_at(port, at);
    }

    /// The guest's `port` is at `at`, whoever listens there; the host is told.
    pub fn listen_at(&self, port: u16, at: SocketAddr) {
        self.change(|state| state.ports.insert(port, at));
        self.report();
    }

    /// Nothing listens at these ports any more; the host is told.
    pub fn stop(&self, ports: &[u16]) {
        self.change(|state| state.ports.retain(|port, _| !ports.contains(port)));
        self.report();
    }

    /// Connections to `port` fail from now on; the host is not told.
    pub fn stop_silently(&self, port: u16) {
        self.change(|state| state.ports.remove(&port));
    }

    /// A UDP port of the guest is at `at`.
    pub fn datagrams_at(&self, port: u16, at: SocketAddr) {
        self.change(|state| state.datagrams.insert(port, at));
    }

    /// A Unix socket of the guest is at `at` of this host.
    pub fn path_at(&self, path: &str, at: &std::path::Path) {
        let path = path.as_bytes().to_vec();
        self.change(|state| state.paths.insert(path, at.to_owned()));
    }

    /// No request to listen is granted, for this reason.
    pub fn refuse_binds(&self, reason: &str) {
        self.change(|state| state.refuse_binds = Some(reason.to_owned()));
    }

    /// No dial is answered from now on.
    pub fn be_silent(&self) {
        self.change(|state| state.silent = true);
    }

    /// Says what listens, to a host that watches.
    pub fn report(&self) {
        let state = self.state();
        if !state.watched {
            return;
        }
        let listener = |port: &u16| Listener {
            port: *port,
            address: "127.0.0.1".parse().unwrap(),
            uid: 0,
        };
        let listeners = state.ports.keys().map(listener).collect();
        if let Some(control) = state.controls.last() {
            // A host that has gone does not need it.
            let _ = protocol::send(control, &FromForwarder::Listeners(listeners));
        }
    }

    /// The agent's end of the control connection, once there is one.
    pub fn control(&self) -> UnixStream {
        self.wait("a control connection", |state| {
            Some(state.controls.last()?.try_clone().unwrap())
        })
    }

    /// How many control connections there were.
    pub fn attachments(&self) -> usize {
        self.state().controls.len()
    }

    /// Waits until the host watches for listeners.
    pub fn watched(&self) {
        self.wait("being watched", |state| state.watched.then_some(()));
    }

    /// Waits until it does not.
    pub fn unwatched(&self) {
        self.wait("not being watched", |state| (!state.watched).then_some(()));
    }

    /// The agent goes, with all its connections.
    pub fn go(&self) {
        let control = self.control();
        self.change(|state| {
            state.watched = false;
            state.binds.clear();
            state.held.clear();
        });
        control.shutdown(Shutdown::Both).unwrap();
    }

    /// A program of the guest connects to what the host asked to listen at `at`: its end.
    pub fn connect_to_host(&self, at: &Bind) -> TcpStream {
        let id = self.wait("listening for the host", |state| {
            let bound = state.binds.iter().find(|(_, bound)| *bound == at);
            bound.map(|(id, _)| *id)
        });
        self.accept(id)
    }

    /// The same, of a listener that may never have been asked for.
    pub fn accept(&self, id: u32) -> TcpStream {
        let (near, far) = tcp_pair();
        let (token, control) = self.change(|state| {
            state.tokens += 1;
            state.held.insert(state.tokens, far);
            (
                state.tokens,
                state.controls.last().unwrap().try_clone().unwrap(),
            )
        });
        protocol::send(&control, &FromForwarder::Accepted { id, token }).unwrap();
        near
    }

    /// What the host asked the guest to listen for.
    pub fn binds(&self) -> Vec<Bind> {
        self.state().binds.values().cloned().collect()
    }

    /// Connections that wait for their other end.
    pub fn held(&self) -> usize {
        self.state().held.len()
    }

    /// Waits until `count` connections were dropped.
    pub fn dropped(&self, count: usize) {
        self.wait("drops", |state| {
            (state.dropped.len() >= count).then_some(())
        });
    }

    /// Flows of datagrams that were opened and closed by the host.
    pub fn flows(&self) -> (usize, usize) {
        let state = self.state();
        (state.flows, state.closed_flows)
    }

    fn address_of(&self, target: &Target) -> Option<SocketAddr> {
        match target {
            Target::Loopback(port) => self.state().ports.get(port).copied(),
            Target::Host { host, port } => Some(SocketAddr::new(host.parse().ok()?, *port)),
            Target::Unix(_) => None,
        }
    }

    fn control_loop(&self, mut control: UnixStream) {
        self.change(|state| state.controls.push(control.try_clone().unwrap()));
        while let Ok(Some(message)) = protocol::receive::<ToForwarder>(&mut control) {
            let answer = match message {
                ToForwarder::Watch(on) => {
                    self.change(|state| state.watched = on);
                    self.report();
                    continue;
                }
                ToForwarder::Dial { token, target } => {
                    if self.state().silent {
                        continue;
                    }
                    let stream = self.address_of(&target).map(TcpStream::connect);
                    let result = match stream {
                        Some(Ok(stream)) => {
                            self.change(|state| state.held.insert(token, stream));
                            Ok(())
                        }
                        _ => Err(DialError::Refused),
                    };
                    FromForwarder::Dialed { token, result }
                }
                ToForwarder::Drop { token } => {
                    self.change(|state| {
                        if let Some(stream) = state.held.remove(&token) {
                            reset(&stream);
                        }
                        state.dropped.push(token);
                    });
                    continue;
                }
                ToForwarder::Listen { id, at } => {
                    let refused = self.state().refuse_binds.clone();
                    let result = match refused {
                        Some(reason) => Err(reason),
                        None => {
                            self.change(|state| state.binds.insert(id, at));
                            Ok(0)
                        }
                    };
                    FromForwarder::Bound { id, result }
                }
                ToForwarder::Unlisten { id } => {
                    self.change(|state| state.binds.remove(&id));
                    continue;
                }
            };
            if protocol::send(&control, &answer).is_err() {
                return;
            }
        }
    }

    fn datagram_loop(&self, connection: UnixStream) {
        let mut flows: HashMap<u32, UdpSocket> = HashMap::new();
        while let Ok(Some(message)) = protocol::receive::<Datagram>(&connection) {
            let (flow, to, payload) = match message {
                Datagram::Send { flow, to, payload } => (flow, to, payload),
                Datagram::Closed { flow } => {
                    if let Some(socket) = flows.remove(&flow) {
                        // Wakes its thread.
                        let _ = socket.send_to(&[], socket.local_addr().unwrap());
                    }
                    self.change(|state| state.closed_flows += 1);
                    continue;
                }
                Datagram::Received { .. } => panic!("the host sends what only the guest may"),
            };
            let Target::Loopback(port) = to else {
                panic!("published datagrams go to the guest's loopback");
            };
            let Some(at) = self.state().datagrams.get(&port).copied() else {
                continue;
            };
            let socket = flows.entry(flow).or_insert_with(|| {
                let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                let (answers, connection) =
                    (socket.try_clone().unwrap(), connection.try_clone().unwrap());
                thread::spawn(move || answer_loop(&answers, &connection, flow, at, port));
                self.change(|state| state.flows += 1);
                socket
            });
            socket.send_to(&payload, at).unwrap();
        }
    }
}

/// Passes on what comes back from the program at `at`, which is the guest's `port`.
fn answer_loop(socket: &UdpSocket, connection: &UnixStream, flow: u32, at: SocketAddr, port: u16) {
    static WRITES: Mutex<()> = Mutex::new(());
    let mut buffer = vec![0; 65_536];
    loop {
        let (len, from) = socket.recv_from(&mut buffer).unwrap();
        if from == socket.local_addr().unwrap() {
            return;
        }
        let from = match from == at {
            true => SocketAddr::new(at.ip(), port),
            false => from,
        };
        let payload = buffer[..len].to_vec();
        let message = Datagram::Received {
            flow,
            from,
            payload,
        };
        let _turn = WRITES.lock().unwrap_or_else(PoisonError::into_inner);
        if protocol::send(connection, &message).is_err() {
            return;
        }
    }
}

impl Guest for FakeGuest {
    fn connect(&self) -> io::Result<UnixStream> {
        let (near, far) = UnixStream::pair()?;
        let guest = self.clone();
        thread::spawn(move || match protocol::receive::<Open>(&far) {
            Ok(Some(Open::Forward)) => guest.control_loop(far),
            Ok(Some(Open::Datagrams)) => guest.datagram_loop(far),
            other => panic!("a connection that is neither: {other:?}"),
        });
        Ok(near)
    }

    fn join(&self, prelude: Vec<u8>, stream: OwnedFd) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&stream, false)?;
        let open: Open = protocol::receive(prelude.as_slice())?.expect("a prelude");
        let guest = self.clone();
        thread::spawn(move || match open {
            Open::Dial(Target::Unix(path)) => {
                let at = guest.state().paths.get(&path).cloned();
                match at.map(UnixStream::connect) {
                    Some(Ok(far)) => splice(stream.into(), OwnedFd::from(far).into()),
                    _ => reset(&stream),
                }
            }
            Open::Dial(target) => match guest.address_of(&target).map(TcpStream::connect) {
                Some(Ok(far)) => splice(stream.into(), far),
                _ => reset(&stream),
            },
            Open::Attach { token } => match guest.change(|state| state.held.remove(&token)) {
                Some(far) => splice(stream.into(), far),
                None => reset(&stream),
            },
            other => panic!("not a prelude: {other:?}"),
        });
        Ok(())
    }
}

/// Both ends of a TCP connection.
pub fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

/// Makes the end of this stream a reset, when it is closed.
fn reset(stream: impl std::os::fd::AsFd) {
    rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).unwrap();
}

/// Copies both ways, half-closes and resets included. Unix streams pass for TCP ones here: only what both
/// have is used.
fn splice(one: TcpStream, other: TcpStream) {
    let (one_too, other_too) = (one.try_clone().unwrap(), other.try_clone().unwrap());
    let back = thread::spawn(move || copy(&other_too, &one_too));
    let there = copy(&one, &other);
    if there.is_err() || back.join().unwrap().is_err() {
        reset(&one);
        reset(&other);
    }
}

fn copy(mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    let result = loop {
        match from.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(len) => {
                if let Err(error) = to.write_all(&buffer[..len]) {
                    break Err(error);
                }
            }
            Err(error) => break Err(error),
        }
    };
    match &result {
        Ok(()) => drop(to.shutdown(Shutdown::Write)),
        Err(_) => {
            reset(from);
            reset(to);
            // The other direction must not go on alone.
            drop(from.shutdown(Shutdown::Read));
            drop(to.shutdown(Shutdown::Read));
        }
    }
    result
}
