//! Connections that the guest asks for, to be answered now or later.

use std::fmt;
use std::os::fd::OwnedFd;

use super::handle::{Command, VsockHandle};
use super::mux::table::Key;
use super::packet::Header;

/// A connection that the guest asks for, at a port without a service. The guest waits; dropping this
/// refuses.
pub struct Asked {
    request: Option<Request>,
    port: u32,
    handle: VsockHandle,
}

/// What the guest said when it asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    pub key: Key,
    pub socket_type: u16,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Request {
    pub fn new(key: Key, header: &Header) -> Self {
        Self {
            key,
            socket_type: header.socket_type,
            buf_alloc: header.buf_alloc,
            fwd_cnt: header.fwd_cnt,
        }
    }
}

impl Asked {
    pub(super) fn new(request: Request, handle: VsockHandle) -> Self {
        Self {
            port: request.key.host_port,
            request: Some(request),
            handle,
        }
    }

    /// The port of the host.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Makes the connection one with `stream`, a connected stream socket. A guest that waits no more
    /// closes it.
    pub fn accept(mut self, stream: impl Into<OwnedFd>) {
        self.answer(Some(stream.into()));
    }

    fn answer(&mut self, stream: Option<OwnedFd>) {
        if let Some(request) = self.request.take() {
            // Fails only where the device is gone, and the guest's connection with it.
            let _ = self.handle.send(Command::Answer { request, stream });
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.answer(None);
    }
}

impl fmt::Debug for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Asked")
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}
