//! The agent's end of vsock: the listening port, and the word to the host that it is there.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use agent::protocol::{self, AGENT_PORT, HELLO_PORT, Hello};
use anyhow::{Context, Result};
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

use crate::clock;
use crate::connection::Connection;
use crate::forward;

/// Connections that wait to be accepted: the kernel's own default limit (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// How long the host may take to read the message.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The listening socket at [`AGENT_PORT`].
#[derive(Debug)]
pub struct Listener(VsockListener);

impl Listener {
    /// Starts listening.
    pub fn new() -> Result<Self> {
        let context =
            "the machine has no vsock (is its driver in the kernel or among the modules?)";
        let listener =
            VsockListener::bind_with_cid_port(VMADDR_CID_ANY, AGENT_PORT).context(context)?;
        rustix::net::listen(&listener, BACKLOG).context(context)?;
        listener.set_nonblocking(true).context(context)?;
        Ok(Self(listener))
    }
}

impl forward::Listener for Listener {
    /// With vsock_loopback loaded, any user of the machine can connect: only the host is answered.
    fn accept(&self) -> io::Result<Connection> {
        loop {
            let (stream, peer) = self.0.accept()?;
            if peer.cid() == VMADDR_CID_HOST {
                return Ok(Connection::new(stream));
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Tells the host that the machine is ready.
pub fn ready(started: Duration) -> Result<()> {
    say(&Hello::Ready {
        version: protocol::VERSION,
        agent_started_ns: nanoseconds(started),
        agent_ready_ns: nanoseconds(clock::since_boot()),
        kernel_release: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
    })
}

/// Tells the host that the machine cannot be used, and why.
pub fn failed(reason: String) -> Result<()> {
    say(&Hello::Failed(reason))
}

fn say(hello: &Hello) -> Result<()> {
    let context = "the host cannot be reached over vsock";
    let stream =
        VsockStream::connect_with_cid_port(VMADDR_CID_HOST, HELLO_PORT).context(context)?;
    stream.set_write_timeout(Some(TIMEOUT)).context(context)?;
    protocol::send(&stream, hello).context(context)?;
    let must_arrive = matches!(hello, Hello::Failed(_));
    if must_arrive {
        // The machine is about to be cut off, so wait until the host has read and closed; a host
        // that does neither has nothing to lose.
        stream
            .shutdown(std::net::Shutdown::Write)
            .context(context)?;
        stream.set_read_timeout(Some(TIMEOUT)).context(context)?;
        let _ = (&stream).read(&mut [0]);
    }
    Ok(())
}

/// More than 584 years do not fit, and do not happen.
fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
