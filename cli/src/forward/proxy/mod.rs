//! `--socks`: one port of the host through which programs reach what the guest reaches, by its own names.
//!
//! It speaks SOCKS5, SOCKS4a and HTTP. A client is served by one thread with all others until its
//! connection is made, which is then joined to the guest's and gone from here.
//!
//! It asks for no password: it listens on the loopback unless told otherwise, and answers requests that a
//! web page can make a browser send there with an error that says nothing of the machine.

mod client;
mod datagrams;
mod handshake;
mod http;
mod server;
mod socks;
mod target;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use agent::protocol::{DialError, Target};

use server::{Mailbox, Message, Server};

/// How long a client may take to say what it wants, and again to take an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is called with the outcome of a dial.
pub type DialDone = Box<dyn FnOnce(Result<Box<dyn Held>, DialError>) + Send>;

/// A way into a guest.
pub trait Dialer: Send + 'static {
    /// Connects to `target` and calls `done`, on whichever thread, exactly once and in bounded time.
    /// Does not block.
    fn dial(&self, target: Target, done: DialDone);

    /// Opens a connection that carries [`agent::protocol::Datagram`]s. Does not block.
    fn datagrams(&self) -> io::Result<UnixStream>;
}

/// A connection in the guest that waits for its other end; reset where it is dropped.
pub trait Held: Send {
    /// Makes it one with `stream`, sending `early` into the guest first. Does not block. Where that
    /// fails, `stream` is reset.
    fn join(self: Box<Self>, stream: OwnedFd, early: Vec<u8>) -> io::Result<()>;
}

/// A proxy that runs until it is dropped; connections that were made go on.
#[derive(Debug)]
pub struct Proxy {
    addresses: Vec<SocketAddr>,
    mailbox: Mailbox,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Serves the clients of `listeners`.
    ///
    /// # Errors
    /// Where the system has no thread or descriptor left.
    pub fn start(listeners: Vec<TcpListener>, dialer: impl Dialer) -> io::Result<Self> {
        Self::start_with(listeners, dialer, PATIENCE)
    }

    fn start_with(
        listeners: Vec<TcpListener>,
        dialer: impl Dialer,
        patience: Duration,
    ) -> io::Result<Self> {
        let addresses = listeners.iter().map(TcpListener::local_addr);
        let addresses = addresses.collect::<io::Result<_>>()?;
        let (mut server, mailbox) = Server::new(listeners, dialer, patience)?;
        let thread = thread::Builder::new().name("proxy".into());
        let thread = thread.spawn(move || {
            if let Err(error) = server.run() {
                tracing::error!("the proxy ended: {error}");
            }
        })?;
        Ok(Self {
            addresses,
            mailbox,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.mailbox.send(Message::Stop);
        if let Some(thread) = self.thread.take() {
            // It has logged why, where it did not end well.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
