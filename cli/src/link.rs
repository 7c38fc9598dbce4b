//! How an agent is reached: one way for every kind of machine.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use agent::protocol::{self, AGENT_PORT, HELLO_PORT, Hello, Open};
use devices::virtio::vsock::VsockHandle;
use vmm::Reach;

use crate::accel::join::Joiner;
use crate::control::client::Client;
use crate::instance::Relay;
use crate::spares::Spares;
use crate::store::{Name, Store};

/// The longest answer to a CONNECT line.
const MAX_ANSWER: u64 = 64;

/// Connections to the port of the greeting that are listened to at once.
const MAX_GREETINGS: usize = 8;

/// How long one may take over its greeting.
const GREETING: Duration = Duration::from_secs(30);

/// A way to the vsock ports of one guest.
#[derive(Debug, Clone)]
pub enum Link {
    /// The machine's vsock device is in this process, and maybe all of it.
    Machine(VsockHandle, Option<Reach>),
    /// Another process owns the machine and offers its ports at this Unix socket.
    Socket(PathBuf),
    /// The machine belongs to another process on this host, which is asked at its control socket.
    Owned(Store, Name),
    /// The machine is in the outer Linux, behind its runner.
    Relayed(Arc<Relayed>),
}

impl Link {
    /// Opens a stream to `port` of the guest.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        match self {
            Self::Machine(vsock, _) => vsock.connect(port),
            Self::Socket(path) => connect_line(UnixStream::connect(path)?, port),
            Self::Owned(store, name) => Client::connect(store, name)
                .and_then(|client| client.into_guest(port))
                .map_err(io::Error::other),
            Self::Relayed(relayed) => relayed.connect(port),
        }
    }

    /// What can be done with the guest besides, where the machine is in this process.
    pub fn reach(&self) -> Option<&Reach> {
        match self {
            Self::Machine(_, reach) => reach.as_ref(),
            Self::Socket(_) | Self::Owned(..) | Self::Relayed(_) => None,
        }
    }

    /// Makes `stream` and a new connection to `port` of the guest one, whose first bytes are
    /// `prelude`. Does not wait for the guest; a connection that fails resets `stream`.
    pub fn join(&self, port: u32, prelude: Vec<u8>, stream: OwnedFd) -> io::Result<()> {
        match self {
            Self::Machine(vsock, _) => vsock.join(port, prelude, stream),
            Self::Relayed(relayed) => relayed.join(port, &prelude, stream),
            // Its owner joins only what it is handed on its own connection.
            Self::Socket(_) | Self::Owned(..) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// A way to a guest's agent for many connections: some are made before they are wanted.
#[derive(Debug)]
pub struct AgentLink {
    link: Link,
    /// Those of a machine in this process; of others, whoever owns their vsock device has them.
    spares: Option<Spares>,
}

impl AgentLink {
    /// The agent of the guest behind `link`.
    pub fn new(link: Link) -> Self {
        let spares = match &link {
            Link::Machine(vsock, _) => Some(Spares::new(vsock.clone(), AGENT_PORT)),
            _ => None,
        };
        Self { link, spares }
    }

    /// Opens a stream to the agent.
    pub fn connect(&self) -> io::Result<UnixStream> {
        self.link.connect(AGENT_PORT)
    }

    /// As [`Link::join`] to the agent.
    pub fn join(&self, prelude: Vec<u8>, stream: OwnedFd) -> io::Result<()> {
        match (&self.spares, &self.link) {
            (Some(spares), _) => spares.join(prelude, stream),
            (None, Link::Relayed(relayed)) => relayed.join_agent(&prelude, stream),
            (None, link) => link.join(AGENT_PORT, prelude, stream),
        }
    }
}

/// Asks the guest behind `link` to power off, with so long for its processes to end by themselves. The
/// connection has to stay open until the machine has ended.
pub fn ask_to_power_off(link: &Link, grace: Duration) -> io::Result<UnixStream> {
    let stream = link.connect(AGENT_PORT)?;
    let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
    protocol::send(&stream, &Open::PowerOff { grace_ms })?;
    Ok(stream)
}

/// The way to a machine in the outer Linux.
#[derive(Debug)]
pub struct Relayed {
    /// Where the outer Linux offers its own ports.
    socket: PathBuf,
    joiner: Joiner,
    /// The runner's ports there.
    ports: Ports,
}

/// At which ports of the outer Linux a runner takes connections from the host.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    /// Where they begin with a [`Relay`].
    pub relay: u32,
    /// Where they are connections to the agent.
    pub agent: u32,
}

impl Relayed {
    /// The machine whose runner takes connections at `ports` of the outer Linux at `socket`.
    pub fn new(socket: PathBuf, joiner: Joiner, ports: Ports) -> Self {
        Self {
            socket,
            joiner,
            ports,
        }
    }

    /// Opens a stream that the runner makes what `relay` says.
    pub fn open(&self, relay: &Relay) -> io::Result<UnixStream> {
        let stream = self.outer_stream(self.ports.relay)?;
        protocol::send(&stream, relay)?;
        Ok(stream)
    }

    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        match port {
            AGENT_PORT => self.outer_stream(self.ports.agent),
            port => self.open(&Relay::Dial(port)),
        }
    }

    fn outer_stream(&self, port: u32) -> io::Result<UnixStream> {
        connect_line(UnixStream::connect(&self.socket)?, port)
    }

    /// Makes `stream` one with a connection to `port` of the guest; whoever is at its other end is sent
    /// `OK <port>` and a newline first.
    pub fn join_with_line(&self, port: u32, stream: OwnedFd) -> io::Result<()> {
        let mut bytes = Vec::new();
        protocol::send(&mut bytes, &Relay::DialWithLine(port))?;
        self.joiner.join(self.ports.relay, &bytes, stream)
    }

    /// As [`Link::join`] to the agent, by a connection that was made in advance where there is one.
    fn join_agent(&self, prelude: &[u8], stream: OwnedFd) -> io::Result<()> {
        self.joiner.join_spare(self.ports.agent, prelude, stream)
    }

    /// Makes `stream` one with the connection that the guest has asked for under this number.
    pub fn accept(&self, number: u64, stream: OwnedFd) -> io::Result<()> {
        self.answer(&Relay::Accept(number), stream)
    }

    /// Refuses the connection that the guest has asked for under this number.
    pub fn refuse(&self, number: u64) -> io::Result<()> {
        let (nobody, _) = UnixStream::pair()?;
        self.answer(&Relay::Refuse(number), nobody.into())
    }

    fn answer(&self, answer: &Relay, stream: OwnedFd) -> io::Result<()> {
        let mut bytes = Vec::new();
        protocol::send(&mut bytes, answer)?;
        self.joiner.join(self.ports.relay, &bytes, stream)
    }

    fn join(&self, port: u32, prelude: &[u8], stream: OwnedFd) -> io::Result<()> {
        if port == AGENT_PORT {
            return self.joiner.join(self.ports.agent, prelude, stream);
        }
        let mut bytes = Vec::new();
        protocol::send(&mut bytes, &Relay::Dial(port))?;
        bytes.extend_from_slice(prelude);
        self.joiner.join(self.ports.relay, &bytes, stream)
    }
}

/// Calls `greeted` with what the agent of a guest says when it is up, or cannot be.
///
/// Any program of the guest can connect there: few are listened to at once, and none for long.
pub fn listen_for_hello(
    vsock: &VsockHandle,
    greeted: impl Fn(Hello) + Clone + Send + 'static,
) -> io::Result<()> {
    let listened_to = Arc::new(AtomicUsize::new(0));
    vsock.listen(HELLO_PORT, move |stream| {
        if listened_to.load(Ordering::Relaxed) >= MAX_GREETINGS {
            return;
        }
        listened_to.fetch_add(1, Ordering::Relaxed);
        let (greeted, done) = (greeted.clone(), listened_to.clone());
        // The guest may be slow to say anything; the device's thread does not wait for it.
        let reader = thread::Builder::new().name("hello".into());
        let spawned = reader.spawn(move || {
            let said = stream
                .set_read_timeout(Some(GREETING))
                .and_then(|()| protocol::receive(&stream));
            match said {
                Ok(Some(hello)) => greeted(hello),
                Ok(None) => {}
                Err(error) => tracing::debug!("a greeting of the guest makes no sense: {error}"),
            }
            done.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = spawned {
            listened_to.fetch_sub(1, Ordering::Relaxed);
            tracing::error!("no thread for the guest's greeting: {error}");
        }
    })
}

/// Asks for `port` on a fresh connection to a vsock Unix socket and waits for the answer.
fn connect_line(mut stream: UnixStream, port: u32) -> io::Result<UnixStream> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    // Unbuffered: what follows the line belongs to the stream's user.
    let mut answer = String::new();
    BufReader::with_capacity(1, Read::take(&stream, MAX_ANSWER)).read_line(&mut answer)?;
    if answer.starts_with("OK ") && answer.ends_with('\n') {
        Ok(stream)
    } else {
        Err(io::Error::new(
            io::ErrorKind::ConnectionRefused,
            format!("the guest does not answer at port {port}"),
        ))
    }
}
