//! One connection: a host stream, the credit of both sides, and what is still to be told to the guest.
//!
//! Nothing here touches a ring or a table; [`super::mux`] calls it with decoded packets and host
//! events, and asks it what to send next.

use std::io::ErrorKind;
use std::time::Instant;

use vm_memory::VolatileSlice;

use super::backlog::Backlog;
use super::credit::Credit;
use super::handle::Completion;
use super::linger::LastWords;
use super::packet::{
    Header, VIRTIO_VSOCK_OP_CREDIT_REQUEST, VIRTIO_VSOCK_OP_CREDIT_UPDATE, VIRTIO_VSOCK_OP_REQUEST,
    VIRTIO_VSOCK_OP_RESPONSE, VIRTIO_VSOCK_OP_SHUTDOWN, VIRTIO_VSOCK_SHUTDOWN_BOTH,
    VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE, VIRTIO_VSOCK_SHUTDOWN_F_SEND, VIRTIO_VSOCK_TYPE_STREAM,
};
use super::stream::HostStream;
use super::{HOST_CID, mux::table::Key};

/// Bytes asked of the host stream at first, and after it gave less than it was asked for.
const READ_SIZE_MIN: usize = 4 << 10;
/// The most bytes asked of the host stream at once, so that others get their turn.
const READ_SIZE_MAX: usize = 64 << 10;

/// Where a connection stands.
#[derive(Debug)]
pub(super) enum State {
    /// The host asked; the guest has not answered.
    Connecting(Completion),
    /// Data flows, in at least one direction.
    Established,
    /// The guest forgot it; bytes that it had sent still wait for the host's reader.
    Lingering,
}

/// The guest broke the protocol: the connection is to be reset.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation;

/// Control packets that wait for a receive buffer, in the order in which they are sent.
#[derive(Debug, Clone, Copy, Default)]
struct Pending {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub key: Key,
    pub state: State,
    pub stream: HostStream,
    pub credit: Credit,
    /// When the guest must have answered what it was sent.
    pub deadline: Option<Instant>,
    /// It is nobody's yet.
    pub reserved: bool,
    /// The guest is asked for this connection, and has not answered.
    pub unanswered: bool,
    backlog: Backlog,
    pending: Pending,
    /// `VIRTIO_VSOCK_SHUTDOWN_*` bits that the guest sent.
    guest_shutdown: u32,
    /// The bits that hold for our side: what the guest was told or is about to be.
    host_shutdown: u32,
    /// A credit request is under way, so another would be noise.
    credit_asked: bool,
    /// The far end has seen the end of the guest's data.
    write_closed: bool,
    read_size: usize,
}

impl Connection {
    /// A connection that the host asks the guest for, once it may ([`Connection::ask`]).
    pub fn outgoing(key: Key, stream: HostStream, buf_alloc: u32, completion: Completion) -> Self {
        Self::new(key, stream, buf_alloc, State::Connecting(completion))
    }

    /// Has the guest asked for the connection.
    pub fn ask(&mut self) {
        self.pending.request = true;
        self.unanswered = true;
    }

    /// A connection that the guest asked for and gets.
    pub fn incoming(key: Key, stream: HostStream, buf_alloc: u32) -> Self {
        let mut connection = Self::new(key, stream, buf_alloc, State::Established);
        connection.pending.response = true;
        connection
    }

    fn new(key: Key, stream: HostStream, buf_alloc: u32, state: State) -> Self {
        Self {
            key,
            state,
            stream,
            credit: Credit::new(buf_alloc),
            deadline: None,
            reserved: false,
            unanswered: false,
            backlog: Backlog::default(),
            pending: Pending::default(),
            guest_shutdown: 0,
            host_shutdown: 0,
            credit_asked: false,
            write_closed: false,
            read_size: READ_SIZE_MIN,
        }
    }

    // --- What the guest sent ---

    /// Takes over the credit fields that every packet carries.
    pub fn peer_says(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.credit.peer_says(buf_alloc, fwd_cnt);
        if self.credit.window() > 0 {
            self.credit_asked = false;
        }
    }

    /// The guest accepted. It must have been asked, and once only.
    pub fn accepted(&mut self) -> Result<(), Violation> {
        let asked = self.unanswered && !self.pending.request;
        if !asked || !matches!(self.state, State::Connecting(_)) {
            return Err(Violation);
        }
        if let State::Connecting(completion) =
            std::mem::replace(&mut self.state, State::Established)
        {
            completion.complete(Ok(self.key.host_port));
        }
        self.deadline = None;
        if self.stream.hung_up {
            // The far end left while the guest made up its mind; no event will say so again.
            self.host_takes_no_more();
        }
        Ok(())
    }

    /// The guest sent data: it goes to the host stream, and what the stream does not take at once
    /// into the backlog.
    pub fn receive(&mut self, data: &[VolatileSlice<'_>]) -> Result<(), Violation> {
        let total: usize = data.iter().map(VolatileSlice::len).sum();
        let bytes = u32::try_from(total).map_err(|_| Violation)?;
        let established = matches!(self.state, State::Established);
        if !established || self.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_SEND != 0 {
            return Err(Violation);
        }
        self.credit.received(bytes).map_err(|_| Violation)?;
        let mut taken = 0;
        if self.backlog.is_empty() && self.stream.writable && !self.discards() {
            taken = self.write_through(data);
        }
        if self.discards() {
            self.credit.forwarded(bytes);
        } else {
            self.credit.forwarded(taken as u32);
            for piece in data {
                let skip = taken.min(piece.len());
                taken -= skip;
                if let Ok(rest) = piece.offset(skip) {
                    self.backlog.push(&rest);
                }
            }
        }
        self.note_freed_credit();
        Ok(())
    }

    /// Whether data from the guest goes through as fast as it comes, and so fast that the guest
    /// has to be told of free room.
    pub fn is_flowing(&self) -> bool {
        self.backlog.is_empty() && self.pending.credit_update
    }

    /// Gives the guest more credit.
    pub fn grow(&mut self, buf_alloc: u32) {
        self.credit.grow(buf_alloc);
        self.pending.credit_update = true;
    }

    fn write_through(&mut self, data: &[VolatileSlice<'_>]) -> usize {
        match self.stream.write_guest(data) {
            Ok(taken) => taken,
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            Err(_) => {
                self.host_takes_no_more();
                0
            }
        }
    }

    /// The guest closed one direction or both; true when nothing is left to do but to confirm.
    pub fn shut_by_guest(&mut self, flags: u32) -> bool {
        let flags = flags & VIRTIO_VSOCK_SHUTDOWN_BOTH;
        if flags == VIRTIO_VSOCK_SHUTDOWN_BOTH && self.is_unfinished() {
            // There is no end to pass on: the guest's socket was closed in the middle of its data.
            return true;
        }
        self.guest_shutdown |= flags;
        if self.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE != 0 {
            self.stream.end_read();
        }
        self.pass_on_end();
        if self.host_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_SEND != 0 {
            self.close_if_both_ended();
        }
        self.guest_shutdown == VIRTIO_VSOCK_SHUTDOWN_BOTH
    }

    /// The guest wants to know our credit.
    pub fn credit_wanted(&mut self) {
        self.pending.credit_update = true;
    }

    // --- Connections that are made in advance ---

    /// Whether it is nobody's, and the guest has done nothing but accept it.
    pub fn is_untouched(&self) -> bool {
        let ends = self.guest_shutdown | self.host_shutdown;
        let open = matches!(self.state, State::Established) && ends == 0;
        self.reserved && open && !self.credit.has_received() && !self.stream.hung_up
    }

    /// Gives it to `stream`, after what it was to send first; returns the stream that it had.
    pub fn replace_stream(&mut self, mut stream: HostStream) -> HostStream {
        self.reserved = false;
        stream.take_prelude(&mut self.stream);
        std::mem::replace(&mut self.stream, stream)
    }

    // --- What the host stream did ---

    /// Writes what the backlog holds, as far as the stream takes it.
    pub fn flush(&mut self) {
        while !self.backlog.is_empty() && self.stream.writable {
            match self.stream.write_parts(self.backlog.filled()) {
                Ok(taken) => {
                    self.backlog.consume(taken);
                    self.credit.forwarded(taken as u32);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => self.host_takes_no_more(),
            }
        }
        self.note_freed_credit();
        self.pass_on_end();
    }

    /// The far end will not read any more: what the guest sends is dropped, and the guest told.
    pub fn host_takes_no_more(&mut self) {
        self.credit.forwarded(self.backlog.len() as u32);
        self.backlog.consume(self.backlog.len());
        if self.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_SEND == 0 {
            self.shut_host(VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE);
        }
    }

    /// The far end has written all it will write.
    pub fn host_ended(&mut self) {
        self.shut_host(VIRTIO_VSOCK_SHUTDOWN_F_SEND);
        self.close_if_both_ended();
    }

    /// Notes what a read of the host stream gave, where `limit` bytes were asked for.
    pub fn sent(&mut self, bytes: usize, limit: usize) {
        self.credit.sent(bytes as u32);
        self.read_size = if bytes == limit {
            (self.read_size * 2).min(READ_SIZE_MAX)
        } else {
            bytes.clamp(READ_SIZE_MIN, READ_SIZE_MAX)
        };
        self.ask_for_credit();
    }

    // --- What the guest is to be sent ---

    /// Whether there is anything to send to the guest.
    pub fn is_runnable(&self) -> bool {
        self.next_op().is_some() || self.can_read()
    }

    /// Whether the host stream may be read for the guest now.
    pub fn can_read(&self) -> bool {
        matches!(self.state, State::Established)
            && self.stream.readable
            && self.host_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_SEND == 0
            && self.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE == 0
            && self.credit.window() > 0
    }

    /// How many bytes to ask of the host stream.
    pub fn read_limit(&self) -> usize {
        self.read_size.min(self.credit.window() as usize)
    }

    /// The operation of the control packet that is next, if there is one.
    pub fn next_op(&self) -> Option<u16> {
        let pending = &self.pending;
        [
            (pending.request, VIRTIO_VSOCK_OP_REQUEST),
            (pending.response, VIRTIO_VSOCK_OP_RESPONSE),
            (pending.credit_update, VIRTIO_VSOCK_OP_CREDIT_UPDATE),
            (pending.credit_request, VIRTIO_VSOCK_OP_CREDIT_REQUEST),
            (pending.shutdown, VIRTIO_VSOCK_OP_SHUTDOWN),
        ]
        .into_iter()
        .find_map(|(is_pending, op)| is_pending.then_some(op))
    }

    /// A header for the guest with `op` and our credit.
    pub fn header(&self, guest_cid: u64, op: u16) -> Header {
        let (buf_alloc, fwd_cnt) = self.credit.ours();
        let flags = match op {
            VIRTIO_VSOCK_OP_SHUTDOWN => self.host_shutdown,
            _ => 0,
        };
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len: 0,
            socket_type: VIRTIO_VSOCK_TYPE_STREAM,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }

    /// Notes that a packet with `op` reached the guest. True when the guest now owes an answer
    /// without which the connection has to be given up.
    pub fn told(&mut self, op: u16) -> bool {
        self.credit.told();
        self.pending.credit_update = false;
        match op {
            VIRTIO_VSOCK_OP_REQUEST => self.pending.request = false,
            VIRTIO_VSOCK_OP_RESPONSE => self.pending.response = false,
            VIRTIO_VSOCK_OP_CREDIT_REQUEST => self.pending.credit_request = false,
            VIRTIO_VSOCK_OP_SHUTDOWN => {
                self.pending.shutdown = false;
                return self.host_shutdown == VIRTIO_VSOCK_SHUTDOWN_BOTH;
            }
            _ => return false,
        }
        op == VIRTIO_VSOCK_OP_REQUEST
    }

    // --- Ends ---

    /// The guest knows nothing of this connection any more. True when bytes that it sent still
    /// have to go to the host stream.
    pub fn linger(&mut self) -> bool {
        let lost = self.stream.hung_up || self.is_unfinished() || self.backlog.is_empty();
        self.pending = Pending::default();
        self.deadline = None;
        // A request that was never answered is answered here, by dropping its completion.
        self.state = State::Lingering;
        self.guest_shutdown = VIRTIO_VSOCK_SHUTDOWN_BOTH;
        !lost
    }

    /// Takes the connection apart when its device goes away: what the host's reader has not taken.
    pub fn into_last_words(self) -> Option<LastWords> {
        let lost = self.stream.hung_up || self.is_unfinished() || self.backlog.is_empty();
        (!lost).then_some(LastWords {
            stream: self.stream,
            backlog: self.backlog,
        })
    }

    /// Whether the end of the connection now is a reset for the host stream: the guest has not
    /// said that its data is complete.
    fn is_unfinished(&self) -> bool {
        self.stream.resets() && self.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_SEND == 0
    }

    /// Whether the end of the host stream is a reset for the guest: the far end has gone before it
    /// saw the guest's end, and nothing that it had sent is left to be read.
    pub fn is_cut_off(&self) -> bool {
        let all_read = self.host_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_SEND != 0
            || self.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE != 0;
        let established = matches!(self.state, State::Established);
        established && self.stream.resets() && self.stream.hung_up && all_read
    }

    /// Whether a lingering connection has nothing left to do.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Lingering) && (self.backlog.is_empty() || self.stream.hung_up)
    }

    fn discards(&self) -> bool {
        self.host_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE != 0
    }

    fn shut_host(&mut self, flag: u32) {
        if self.host_shutdown & flag == 0 && matches!(self.state, State::Established) {
            self.host_shutdown |= flag;
            self.pending.shutdown = true;
        }
    }

    /// When both sides have sent their last byte, tells the guest that we are through, so that
    /// it confirms with a reset.
    fn close_if_both_ended(&mut self) {
        if self.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_SEND != 0 {
            self.shut_host(VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE);
        }
    }

    /// Passes the end of the guest's data on once all of it was written.
    fn pass_on_end(&mut self) {
        if self.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_SEND != 0
            && self.backlog.is_empty()
            && !self.write_closed
            && !self.stream.hung_up
        {
            self.write_closed = true;
            self.stream.end_write();
        }
    }

    fn note_freed_credit(&mut self) {
        let established = matches!(self.state, State::Established);
        let ended = self.guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_F_SEND != 0;
        if established && !ended && self.credit.update_is_due() {
            self.pending.credit_update = true;
        }
    }

    fn ask_for_credit(&mut self) {
        if self.credit.window() == 0 && self.stream.readable && !self.credit_asked {
            self.credit_asked = true;
            self.pending.credit_request = true;
        }
    }
}
