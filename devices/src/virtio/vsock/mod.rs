//! virtio-vsock in user space: stream connections between guest and host, with no help from the
//! host's kernel.
//!
//! Virtio 1.2, section 5.10. The guest sees the host as context id 2. In the process, services
//! register on a port and callers open connections through a [`VsockHandle`]; both get one end of
//! a socket pair, or bring a stream socket of their own, and data moves between that socket and
//! guest memory without a copy in between. One worker thread owns the queues and every
//! connection.

mod asked;
mod backlog;
mod connection;
mod counters;
mod credit;
mod handle;
mod linger;
mod mux;
mod packet;
mod reserve;
mod stream;
pub mod uds;
mod worker;

use std::io;
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use self::worker::VsockWorker;
use super::{ActivateError, Activation, VirtioDevice, read_config_bytes};
use crate::worker::Worker;

pub use self::asked::Asked;
pub use self::counters::Counters;
pub use self::handle::{Answer, ConnectError, Fallback, MAX_PRELUDE, Service, VsockHandle};
pub use self::mux::{Mux, VsockQueue};
pub use self::reserve::Reserved;

/// The host's context id (`VMADDR_CID_HOST`).
pub const HOST_CID: u64 = 2;

/// Entries of each queue at most.
pub const QUEUE_SIZE: u16 = 256;

/// `VIRTIO_VSOCK_F_STREAM`: stream sockets, the only ones here.
pub const VIRTIO_VSOCK_F_STREAM: u32 = 0;

/// What a vsock device is to be like.
#[derive(Debug, Clone)]
pub struct VsockConfig {
    /// The guest's context id: 3 to 2^32 - 2.
    pub cid: u64,
    /// Connections at once, at least 1.
    pub max_connections: usize,
    /// How long the guest may take to answer a connection request.
    pub connect_timeout: Duration,
    /// How long the guest may take to confirm that a connection is closed.
    pub close_timeout: Duration,
}

impl VsockConfig {
    /// The defaults for a guest with this context id.
    pub fn new(cid: u64) -> Self {
        Self {
            cid,
            max_connections: 16_384,
            connect_timeout: Duration::from_secs(30),
            close_timeout: Duration::from_secs(8),
        }
    }

    fn check(&self) -> io::Result<()> {
        let invalid = |message: String| Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        if !(3..u64::from(u32::MAX)).contains(&self.cid) {
            return invalid(format!(
                "{} cannot be a guest's vsock context id: it has to be 3 to {}",
                self.cid,
                u32::MAX - 1
            ));
        }
        if self.max_connections == 0 || self.max_connections > 1 << 20 {
            return invalid(format!(
                "{} cannot be the limit of vsock connections: it has to be 1 to {}",
                self.max_connections,
                1 << 20
            ));
        }
        Ok(())
    }
}

/// Where the mux is.
enum Place {
    /// Here, while the driver has not started the device.
    Idle(Box<Mux>),
    /// In the worker.
    Running(Worker<VsockWorker>),
    /// Nowhere: its worker could not be started, or panicked.
    Lost,
}

/// A vsock device.
pub struct Vsock {
    cid: u64,
    place: Place,
}

impl Vsock {
    /// A device, and the handle to its connections.
    pub fn new(config: VsockConfig) -> io::Result<(Self, VsockHandle)> {
        let (mux, handle) = Mux::new(&config)?;
        let device = Self {
            cid: config.cid,
            place: Place::Idle(Box::new(mux)),
        };
        Ok((device, handle))
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_VSOCK_F_STREAM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mux = match std::mem::replace(&mut self.place, Place::Lost) {
            Place::Idle(mux) => mux,
            other => {
                self.place = other;
                return Err(ActivateError::Worker(io::Error::other(
                    "the vsock device has no connection table left",
                )));
            }
        };
        match VsockWorker::new(mux, activation) {
            Ok(worker) => {
                self.place = Place::Running(Worker::spawn("vsock", worker)?);
                Ok(())
            }
            Err((mux, error)) => {
                self.place = Place::Idle(mux);
                Err(error)
            }
        }
    }

    fn reset(&mut self) {
        let place = std::mem::replace(&mut self.place, Place::Lost);
        self.place = match place {
            Place::Running(worker) => match worker.stop() {
                Some(worker) => {
                    let mut mux = worker.finish();
                    mux.reset();
                    Place::Idle(mux)
                }
                None => Place::Lost,
            },
            other => other,
        };
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // So that what the guest sent last is not lost with the worker.
        self.reset();
    }
}

#[cfg(test)]
mod tests;
