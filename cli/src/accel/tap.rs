//! A TAP interface of the host's for a machine in the outer Linux: its frames over a vsock stream.
//!
//! The mvm on the host opens the interface and listens, for one connection, on a vsock port that the
//! mvm in the outer Linux is told of in its environment. There a pair of sockets stands for the
//! interface: the network card has one end, and the other is relayed to the stream. Both halves
//! run the same two threads, one for each direction, between a descriptor that keeps the bounds of
//! frames and the stream, on which each frame comes after its length: 32 bits, little-endian. A frame
//! begins with its virtio-net header, so what the guest leaves to the host stays left to it; the host
//! leaves nothing to the guest, as the card cannot ask it to.
//!
//! A side that is slow holds the other up through the buffers of sockets and stream; in the end it is
//! the host's queue of the interface that drops, as for any slow receiver.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{env, io, thread};

use anyhow::{Context, Result, bail};
use devices::virtio::net::{HEADER_LEN, MAX_FRAME, Tap};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use vmm::TapSource;
use vsock::{VMADDR_CID_HOST, VsockStream};

/// In the environment of an mvm in the outer Linux: the vsock port of the host's at which it finds its
/// TAP interface, and the interface's MTU after a comma where it is known.
pub const VARIABLE: &str = "MVM_TAP";

/// Bytes before each frame on the stream: its length.
const PREFIX: usize = 4;

/// Bytes that a direction holds at most: some of the longest frames, and hundreds of ordinary ones.
const BATCH: usize = 256 << 10;

/// Clients that wait to be accepted.
const BACKLOG: i32 = 64;

/// Ports from here on are nobody's.
const FIRST_PORT: u32 = 1 << 30;

/// An open TAP interface of this host.
#[derive(Debug)]
pub struct HostTap {
    name: String,
    mtu: Option<u16>,
    frames: OwnedFd,
}

impl HostTap {
    /// Opens the interface `name`, which must exist and be free.
    pub fn open(name: &str) -> Result<Self> {
        let tap = Tap::open(name, 1)?;
        tap.set_offload(0)
            .with_context(|| format!("the offloads of interface {name} cannot be switched off"))?;
        let mtu = tap.mtu();
        let mut queues = tap.into_queues();
        Ok(Self {
            name: name.to_owned(),
            mtu,
            frames: queues.pop().context("the interface has no queue")?,
        })
    }

    /// Offers the interface to the first who connects to a port of the vsock device whose Unix
    /// socket is `vsock`, for as long as the offer is held. What fails later is told on standard
    /// error.
    pub fn offer(self, vsock: &Path) -> Result<Offer> {
        let mut random = [0; 4];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .context("the host gives no random bytes")?;
        let port = FIRST_PORT | u32::from_ne_bytes(random) >> 2;
        let mut path = vsock.as_os_str().to_owned();
        path.push(format!("_{port}"));
        let offer = Offer {
            path: path.into(),
            variable: match self.mtu {
                Some(mtu) => format!("{port},{mtu}"),
                None => port.to_string(),
            },
        };
        let listener = listen(&offer.path)
            .with_context(|| format!("cannot listen at {}", offer.path.display()))?;
        let path = offer.path.clone();
        thread::Builder::new().name("tap".into()).spawn(move || {
            let accepted = listener.accept();
            drop(listener);
            remove(&path);
            let relayed = accepted
                .map_err(Into::into)
                .and_then(|(stream, _)| relay(stream.into(), self.frames));
            if let Err(error) = relayed {
                eprintln!("mvm: interface {}: {error:#}", self.name);
            }
        })?;
        Ok(offer)
    }
}

/// A TAP interface that can be reached from the outer Linux. Dropping it takes back what nobody has
/// connected to; a connection that was made goes on.
#[derive(Debug)]
pub struct Offer {
    path: PathBuf,
    variable: String,
}

impl Offer {
    /// The value of [`VARIABLE`] for who is to have the interface.
    pub fn variable(&self) -> &str {
        &self.variable
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!("{} is left behind: {error}", path.display());
        }
        _ => {}
    }
}

/// A socket at `path` for this user only.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let socket = stream_socket(AddressFamily::UNIX)?;
    // The file gets the mode that the socket has when it is bound.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    net::bind(&socket, &address)?;
    net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn stream_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    Ok(net::socket_with(
        family,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// The TAP interface called `name` for a machine of this process: the host's where this is an mvm in
/// the outer Linux that was told of one, else this system's.
pub fn source(name: &str) -> Result<TapSource> {
    match env::var(VARIABLE) {
        Ok(offer) if super::is_outer() => from_host(&offer),
        _ => Ok(TapSource::Interface(name.to_owned())),
    }
}

fn from_host(offer: &str) -> Result<TapSource> {
    let (port, mtu) =
        parse(offer).with_context(|| format!("{VARIABLE}={offer:?} makes no sense"))?;
    let stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port)
        .context("the host's TAP interface cannot be reached from the outer Linux")?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (card, frames) = net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .context("no sockets for the network card")?;
    thread::Builder::new().name("tap".into()).spawn(move || {
        if let Err(error) = relay(stream.into(), frames) {
            eprintln!("mvm: the network card in the outer Linux: {error:#}");
        }
    })?;
    Ok(TapSource::Socket { socket: card, mtu })
}

fn parse(offer: &str) -> Option<(u32, Option<u16>)> {
    match offer.split_once(',') {
        None => Some((offer.parse().ok()?, None)),
        Some((port, mtu)) => Some((port.parse().ok()?, Some(mtu.parse().ok()?))),
    }
}

/// Relays between `stream` and `frames`, which is non-blocking, until one of them ends; the end of
/// either is no error.
fn relay(stream: OwnedFd, frames: OwnedFd) -> Result<()> {
    let ends = Arc::new(Ends {
        stream: File::from(stream),
        frames,
    });
    let sending = ends.clone();
    let sender = thread::Builder::new()
        .name("tap-send".into())
        .spawn(move || {
            let result = sending.send_frames();
            sending.end_stream();
            result
        })?;
    let received = ends.receive_frames();
    ends.end_stream();
    // Fails on an interface, which is no socket: there the end of the stream ends the sender.
    let _ = net::shutdown(&ends.frames, Shutdown::Both);
    match sender.join() {
        Ok(sent) => received.and(sent),
        Err(_) => bail!("its relay panicked"),
    }
}

/// What is relayed between.
struct Ends {
    /// Frames behind their lengths.
    stream: File,
    /// One frame a read or write: a TAP interface or a socket, non-blocking.
    frames: OwnedFd,
}

/// Whether there is more to come.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    More,
    End,
}

impl Ends {
    /// Ends the stream both ways, and with it whoever waits for it.
    fn end_stream(&self) {
        // Fails where the peer has gone.
        let _ = net::shutdown(&self.stream, Shutdown::Both);
    }

    /// Moves frames to the stream.
    fn send_frames(&self) -> Result<()> {
        let mut batch = vec![0; BATCH];
        loop {
            match self.gather(&mut batch)? {
                None => return Ok(()),
                Some(0) => {
                    if self.wait(PollFlags::IN)? == Next::End {
                        return Ok(());
                    }
                }
                Some(len) => {
                    let gathered = batch.get(..len).unwrap_or_default();
                    if let Err(error) = (&self.stream).write_all(gathered) {
                        return peer_gone(error);
                    }
                }
            }
        }
    }

    /// Reads what frames there are, as many as fit `batch`; its bytes in use, or None at the end.
    fn gather(&self, batch: &mut [u8]) -> Result<Option<usize>> {
        let mut at = 0;
        while let Some(slot) = batch.get_mut(at..at + PREFIX + MAX_FRAME) {
            let (prefix, frame) = slot.split_at_mut(PREFIX);
            match rustix::io::read(&self.frames, frame) {
                Ok(0) if at == 0 => return Ok(None),
                Ok(0) | Err(Errno::AGAIN) => break,
                // Nothing behind the header.
                Ok(len) if len <= HEADER_LEN => {}
                Ok(len) => {
                    // At most MAX_FRAME.
                    prefix.copy_from_slice(&(len as u32).to_le_bytes());
                    at += PREFIX + len;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("no more frames can be had from it"),
            }
        }
        Ok(Some(at))
    }

    /// Moves frames from the stream.
    fn receive_frames(&self) -> Result<()> {
        let mut buffer = vec![0; BATCH];
        let mut held = 0;
        loop {
            // There is room: what is held is less than a frame.
            match (&self.stream).read(buffer.get_mut(held..).unwrap_or_default()) {
                Ok(0) => return Ok(()),
                Ok(len) => held += len,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return peer_gone(error),
            }
            let mut rest = buffer.get(..held).unwrap_or_default();
            while let Some((frame, after)) = split_frame(rest)? {
                if self.put(frame)? == Next::End {
                    return Ok(());
                }
                rest = after;
            }
            let left = rest.len();
            buffer.copy_within(held - left..held, 0);
            held = left;
        }
    }

    /// Hands over one frame. One that is not taken is dropped, as a cable would: an interface refuses
    /// malformed headers, and everything while it is down.
    fn put(&self, frame: &[u8]) -> Result<Next> {
        loop {
            match rustix::io::write(&self.frames, frame) {
                Ok(_) => return Ok(Next::More),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Ok(Next::End),
                Err(Errno::AGAIN) => {
                    if self.wait(PollFlags::OUT)? == Next::End {
                        return Ok(Next::End);
                    }
                }
                Err(error) => {
                    tracing::trace!("a frame was not taken: {error}");
                    return Ok(Next::More);
                }
            }
        }
    }

    /// Waits until `frames` is ready for `what`, or in error, which its next use tells.
    fn wait(&self, what: PollFlags) -> Result<Next> {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(self.frames.as_fd(), what),
                // Only its end, which is always told.
                PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::empty()),
            ];
            match poll(&mut fds, None) {
                Ok(_) if !fds[1].revents().is_empty() => return Ok(Next::End),
                Ok(_) => return Ok(Next::More),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("it cannot be watched"),
            }
        }
    }
}

/// The first frame of `bytes` and what follows; None where it is not complete.
fn split_frame(bytes: &[u8]) -> Result<Option<(&[u8], &[u8])>> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX>() else {
        return Ok(None);
    };
    let len = u32::from_le_bytes(*prefix) as usize;
    if !(HEADER_LEN + 1..=MAX_FRAME).contains(&len) {
        bail!("the other side announces a frame of {len} bytes, which there cannot be");
    }
    Ok(rest.split_at_checked(len))
}

/// A peer that ends does not wait for what is on its way.
fn peer_gone(error: io::Error) -> Result<()> {
    match error.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::NotConnected => Ok(()),
        _ => Err(error).context("its frames cannot be passed on"),
    }
}

#[cfg(test)]
#[path = "tap_tests.rs"]
mod tests;
