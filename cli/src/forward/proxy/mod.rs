//! `--socks`: one port of the host through which programs reach what the guest reaches, by its own names.
//!
//! It speaks SOCKS5, SOCKS4a and HTTP. A client is served by one thread with all others until its
//! connection is made, which is then joined to the guest's and gone from here.
//!
//! It asks for no password: it listens on the loopback unless told otherwise, and answers requests that a
//! web page can make a browser send there with an error that says nothing of the machine.

mod at;
mod client;
mod datagrams;
mod handshake;
mod http;
mod server;
mod socks;
mod target;

use std::io;
use std::net::SocketAddr;
use std::thread::{self, JoinHandle};
use std::time::Duration;

pub use self::at::At;
use self::server::{Mailbox, Message, Server};
use super::error::BindError;
use super::listener::{HostSocket, bind_port};
use super::spec::Protocol;
use super::{ForwardError, Forwarder};

/// How long a client may take to say what it wants, and again to take an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A proxy that runs until it is dropped; connections that were made go on.
#[derive(Debug)]
pub struct Proxy {
    addresses: Vec<SocketAddr>,
    mailbox: Mailbox,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Serves clients at `at` with what `forwarder` reaches; as long as that has no agent they are told that
    /// the machine is not up.
    ///
    /// # Errors
    /// Where the port is not to be had, or the system has no thread or descriptor left.
    pub fn open(at: At, forwarder: Forwarder) -> Result<Self, ForwardError> {
        let sockets = bind_port(at.address(), at.port(), Protocol::Tcp);
        let sockets = sockets.map_err(BindError::explain)?;
        Ok(Self::serve(sockets, forwarder, PATIENCE)?)
    }

    fn serve(
        mut listeners: Vec<HostSocket>,
        forwarder: Forwarder,
        patience: Duration,
    ) -> io::Result<Self> {
        let mut addresses = Vec::new();
        for listener in &mut listeners {
            if let HostSocket::Tcp(port) = listener {
                port.listen()?;
            }
            addresses.push(rustix::net::getsockname(&listener)?.try_into()?);
        }
        let (mut server, mailbox) = Server::new(listeners, forwarder, patience)?;
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
