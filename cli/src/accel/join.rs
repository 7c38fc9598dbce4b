//! Handing sockets to the supervisor of an outer Linux, which joins them to the guest's vsock ports:
//! their bytes then pass through no other process of the host.
//!
//! A message of this `SOCK_SEQPACKET` socket is a vsock port and a number (u32 each, little endian), what
//! the guest is to be sent first, and one stream socket (`SCM_RIGHTS`). The number says whether some connections
//! to that port are made in advance. Nothing is answered: where the guest refuses, the socket is reset.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;

use anyhow::{Context, Result};
use devices::virtio::vsock::{MAX_PRELUDE, VsockHandle};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::spares::Spares;

/// Bytes of each of the two numbers before what is sent first.
const NUMBER: usize = 4;

/// Nothing is to be made in advance, and some connections are.
const ONE: u32 = 0;
const WITH_SPARES: u32 = 1;

/// The longest message.
const MAX_MESSAGE: usize = 2 * NUMBER + MAX_PRELUDE;

/// Clients that wait to be accepted.
const BACKLOG: i32 = 64;

/// A client's connection to the supervisor.
#[derive(Debug)]
pub struct Joiner(OwnedFd);

impl Joiner {
    /// Connects to the supervisor that serves at `path`.
    pub fn connect(path: &Path) -> Result<Self> {
        let connected = || -> io::Result<OwnedFd> {
            let socket = socket()?;
            net::connect(&socket, &SocketAddrUnix::new(path)?)?;
            Ok(socket)
        };
        let socket = connected()
            .with_context(|| format!("the outer Linux does not answer at {}", path.display()))?;
        Ok(Self(socket))
    }

    /// Joins `stream` to a connection to vsock port `port` of the outer Linux, which is sent `prelude`
    /// first.
    pub fn join(&self, port: u32, prelude: &[u8], stream: OwnedFd) -> io::Result<()> {
        self.send(port, ONE, prelude, stream)
    }

    /// As [`Joiner::join`]; from now on, some connections to `port` are made in advance.
    pub fn join_spare(&self, port: u32, prelude: &[u8], stream: OwnedFd) -> io::Result<()> {
        self.send(port, WITH_SPARES, prelude, stream)
    }

    fn send(&self, port: u32, how: u32, prelude: &[u8], stream: OwnedFd) -> io::Result<()> {
        if prelude.len() > MAX_PRELUDE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let streams = [stream.as_fd()];
        // It is made for one descriptor.
        if !ancillary.push(SendAncillaryMessage::ScmRights(&streams)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (port, how) = (port.to_le_bytes(), how.to_le_bytes());
        let message = [&port, &how, prelude].map(IoSlice::new);
        loop {
            match net::sendmsg(&self.0, &message, &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn socket() -> io::Result<OwnedFd> {
    Ok(net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Serves at `path`, for this user only, for as long as the process lives.
pub fn serve(path: &Path, vsock: VsockHandle) -> Result<()> {
    let listening = || -> io::Result<OwnedFd> {
        let socket = socket()?;
        // The file gets the mode that the socket has when it is bound.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        net::listen(&socket, BACKLOG)?;
        Ok(socket)
    };
    let listener = listening().with_context(|| format!("cannot listen at {}", path.display()))?;
    thread::Builder::new().name("join".into()).spawn(move || {
        loop {
            match net::accept_with(&listener, SocketFlags::CLOEXEC) {
                Ok(client) => serve_client(client, vsock.clone()),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    tracing::warn!("no client can be accepted: {error}");
                    thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        }
    })?;
    Ok(())
}

fn serve_client(client: OwnedFd, vsock: VsockHandle) {
    let serve = move || {
        let mut spares = None;
        loop {
            match receive(&client) {
                Ok(Some(request)) => {
                    if let Err(error) = join(&vsock, &mut spares, request) {
                        return tracing::debug!("no stream can be joined any more: {error}");
                    }
                }
                Ok(None) => return,
                Err(error) => return tracing::warn!("a client makes no sense: {error}"),
            }
        }
    };
    if let Err(error) = thread::Builder::new().name("join".into()).spawn(serve) {
        tracing::warn!("no thread for a client: {error}");
    }
}

/// Does what a client asks for. `spares` are those of the latest port that it wanted some for: it has but one.
fn join(vsock: &VsockHandle, spares: &mut Option<Spares>, request: Request) -> io::Result<()> {
    let Request {
        port,
        with_spares,
        prelude,
        stream,
    } = request;
    if !with_spares {
        return vsock.join(port, prelude, stream);
    }
    let known = spares.take().filter(|spares| spares.are(port));
    let known = known.unwrap_or_else(|| Spares::new(vsock.clone(), port));
    spares.insert(known).join(prelude, stream)
}

/// A message.
struct Request {
    port: u32,
    with_spares: bool,
    prelude: Vec<u8>,
    stream: OwnedFd,
}

/// The next message; None where the client has gone.
fn receive(client: &OwnedFd) -> io::Result<Option<Request>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        let mut into = [IoSliceMut::new(&mut bytes)];
        match net::recvmsg(client, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => break message,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    let stream = ancillary.drain().find_map(|item| match item {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    if message.bytes == 0 && stream.is_none() {
        return Ok(None);
    }
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    if message
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(invalid("its message is too long"));
    }
    bytes.truncate(message.bytes);
    let stream = stream.ok_or_else(|| invalid("its message brings no stream"))?;
    let request = parse(&bytes, stream).ok_or_else(|| invalid("its message is incomplete"))?;
    Ok(Some(request))
}

fn parse(bytes: &[u8], stream: OwnedFd) -> Option<Request> {
    let (port, rest) = bytes.split_first_chunk::<NUMBER>()?;
    let (how, prelude) = rest.split_first_chunk::<NUMBER>()?;
    let with_spares = match u32::from_le_bytes(*how) {
        ONE => false,
        WITH_SPARES => true,
        _ => return None,
    };
    Some(Request {
        port: u32::from_le_bytes(*port),
        with_spares,
        prelude: prelude.to_vec(),
        stream,
    })
}
