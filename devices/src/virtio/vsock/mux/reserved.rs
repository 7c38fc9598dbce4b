//! Connections that were made in advance get their streams.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use vmm_sys_util::epoll::{ControlOperation, EpollEvent};

use super::Mux;
use crate::virtio::vsock::handle::{Completion, ConnectError, Join};
use crate::virtio::vsock::reserve::Reserved;
use crate::virtio::vsock::stream::{HostStream, WATCHED};

impl Mux {
    /// Makes `stream` one with a reserved connection; with a new one where that is there no more, or
    /// the guest has done anything with it.
    pub(super) fn join_reserved(
        &mut self,
        reserved: Reserved,
        prelude: Vec<u8>,
        stream: OwnedFd,
        completion: Completion,
    ) {
        let key = reserved.key;
        let untouched = self.table.find(key).filter(|index| {
            let connection = self.table.get_mut(*index);
            connection.is_some_and(|connection| connection.is_untouched())
        });
        let Some(index) = untouched else {
            let mut bytes = reserved.prelude;
            bytes.extend_from_slice(&prelude);
            return self.connect(key.guest_port, stream, Join::Abortive(bytes), completion);
        };
        let replaced = HostStream::abortive(stream, prelude)
            .and_then(|stream| self.replace_stream(index, stream));
        if let Err(error) = replaced {
            tracing::warn!(
                "a stream cannot be joined to guest port {}: {error}",
                key.guest_port
            );
            self.abort(index);
            return completion.complete(Err(ConnectError::BadStream));
        }
        completion.complete(Ok(key.host_port));
        self.schedule(index);
    }

    /// Gives a connection another stream, and watches that.
    fn replace_stream(&mut self, index: usize, stream: HostStream) -> io::Result<()> {
        let token = self.table.token(index);
        let Some(connection) = self.table.get_mut(index) else {
            return Ok(());
        };
        let former = connection.replace_stream(stream);
        let (add, delete) = (connection.stream.as_raw_fd(), former.as_raw_fd());
        let none = EpollEvent::default();
        self.epoll.ctl(ControlOperation::Delete, delete, none)?;
        let event = EpollEvent::new(WATCHED, token);
        self.epoll.ctl(ControlOperation::Add, add, event)
    }
}
