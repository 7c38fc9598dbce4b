//! All connections of a vsock device, between the guest's rings and the host's streams.
//!
//! One thread owns a [`Mux`]. It calls [`Mux::turn`] whenever the driver notified a queue, and
//! [`Mux::look_at_host`] before it when the mux's own descriptor is readable; that descriptor is
//! an epoll of every host stream, the handles' commands and the timer. It serves two transports:
//! the MMIO device's worker and vhost-user.
//!
//! Bounds that hold whatever the guest does: connections by [`VsockConfig::max_connections`];
//! bytes held by the sum of advertised buffers; control packets as flags of their connection;
//! requests without an answer by [`asking::MAX_UNANSWERED`]; resets for packets without a connection
//! by [`MAX_RESETS`], at which the guest's packets are left in its own ring until it takes the resets.

pub(super) mod asking;
mod budget;
mod deadlines;
mod from_guest;
mod reserved;
pub(super) mod table;
mod to_guest;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use self::asking::Asking;
use self::budget::BUF_ALLOC_MIN;
use self::from_guest::TxEnd;
use self::table::{Key, Table};
use self::to_guest::RxEnd;
use super::connection::{Connection, State};
use super::counters::Counters;
use super::handle::{Command, Completion, ConnectError, Fallback, Join, Service, VsockHandle};
use super::stream::{HostStream, WATCHED, WATCHED_FOR_ROOM};
use super::{HOST_CID, VsockConfig, linger};

/// The most resets that wait for receive buffers before the guest's packets wait too.
pub(super) const MAX_RESETS: usize = 1024;

/// The first port for the host's end of connections that it opens.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Times that a turn goes over both rings before it lets the event loop look at other things.
const ROUNDS: usize = 4;

const WAKE: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// A queue whose driver is to be notified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VsockQueue {
    /// Queue 0: packets for the guest.
    Rx,
    /// Queue 1: packets from the guest.
    Tx,
}

/// A reset for a connection that does not exist, or not any more.
#[derive(Debug, Clone, Copy)]
struct Reset {
    key: Key,
    socket_type: u16,
}

/// The connections of one device.
pub struct Mux {
    guest_cid: u64,
    max_connections: usize,
    connect_timeout: Duration,
    close_timeout: Duration,
    epoll: Epoll,
    wake: Arc<EventFd>,
    timer: TimerFd,
    timer_runs: bool,
    commands: mpsc::Receiver<Command>,
    services: HashMap<u32, Service>,
    fallback: Option<(Fallback, VsockHandle)>,
    table: Table,
    /// Slots with something to send to the guest, in turn.
    runnable: VecDeque<usize>,
    asking: Asking,
    resets: VecDeque<Reset>,
    next_port: u32,
    /// What of [`budget::BUFFER_BUDGET`] is promised to the guest.
    promised: u64,
    counters: Arc<Counters>,
}

impl Mux {
    /// A mux without connections, and the handle that commands it.
    pub fn new(config: &VsockConfig) -> io::Result<(Self, VsockHandle)> {
        config.check()?;
        let epoll = Epoll::new()?;
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let timer = TimerFd::new().map_err(io::Error::from)?;
        for (fd, token) in [(wake.as_raw_fd(), WAKE), (timer.as_raw_fd(), TIMER)] {
            epoll.ctl(
                ControlOperation::Add,
                fd,
                EpollEvent::new(EventSet::IN, token),
            )?;
        }
        let counters = Arc::new(Counters::default());
        let (sender, commands) = mpsc::channel();
        let handle = VsockHandle::new(sender, wake.clone(), counters.clone());
        let mux = Self {
            guest_cid: config.cid,
            max_connections: config.max_connections,
            connect_timeout: config.connect_timeout,
            close_timeout: config.close_timeout,
            epoll,
            wake,
            timer,
            timer_runs: false,
            commands,
            services: HashMap::new(),
            fallback: None,
            table: Table::default(),
            runnable: VecDeque::new(),
            asking: Asking::new(config.connect_timeout),
            resets: VecDeque::new(),
            next_port: FIRST_HOST_PORT,
            promised: 0,
            counters,
        };
        Ok((mux, handle))
    }

    /// What the device has done so far.
    pub(super) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Moves everything that can be moved now, and calls `notify` for each queue whose driver
    /// wants to know.
    ///
    /// An error means that a ring cannot be right: the device needs a reset.
    pub fn turn(
        &mut self,
        memory: &GuestMemoryMmap,
        rx: &mut Queue,
        tx: &mut Queue,
        mut notify: impl FnMut(VsockQueue),
    ) -> Result<(), virtio_queue::Error> {
        Counters::add(&self.counters.turns, 1);
        for _ in 0..ROUNDS {
            let tx_end = self.drain_guest(memory, tx, &mut notify)?;
            let rx_end = self.feed_guest(memory, rx, &mut notify)?;
            match (tx_end, rx_end) {
                (TxEnd::Empty, RxEnd::Idle | RxEnd::NoBuffers) => return Ok(()),
                // The driver's next receive buffer brings the next turn.
                (TxEnd::TooManyResets, RxEnd::NoBuffers) => return Ok(()),
                _ => {}
            }
        }
        // Work is left, but other events deserve a look first. The write fails only when the
        // counter would overflow: then it is readable already.
        let _ = self.wake.write(1);
        Ok(())
    }

    /// Takes in what the guest sent before its device was reset.
    pub fn finish(&mut self, memory: &GuestMemoryMmap, tx: &mut Queue) {
        // The ring holds no more than this many rounds take, and the guest adds nothing now.
        for _ in 0..ROUNDS {
            self.resets.clear();
            match self.drain_guest(memory, tx, &mut |_| ()) {
                Ok(TxEnd::Empty) => return,
                Ok(_) => {}
                Err(error) => return tracing::debug!("the guest left a broken ring: {error}"),
            }
        }
    }

    /// Forgets all connections, as at a device reset; services stay. What the guest had sent
    /// still goes to the host's readers.
    pub fn reset(&mut self) {
        // None of those that wait is to be asked for in between.
        self.asking = Asking::new(self.connect_timeout);
        let all: Vec<usize> = self.table.iter_mut().map(|(index, _)| index).collect();
        let left = all.into_iter().filter_map(|index| self.take(index));
        let left = left.filter_map(Connection::into_last_words).collect();
        linger::deliver(left);
        self.resets.clear();
    }

    /// Takes in what the host's side has to say: streams, commands and deadlines.
    pub fn look_at_host(&mut self) {
        const BATCH: usize = 128;
        let mut events = [EpollEvent::default(); BATCH];
        // What is left after this many rounds leaves the descriptor readable.
        for _ in 0..64 {
            let count = self.epoll.wait(0, &mut events).unwrap_or(0);
            for event in &events[..count] {
                match event.data() {
                    WAKE => drop(self.wake.read()),
                    TIMER => self.tick(),
                    token => self.host_event(token, event.event_set()),
                }
            }
            if count < BATCH {
                break;
            }
        }
        self.take_commands();
    }

    /// Does what the handles asked for so far.
    fn take_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            self.command(command);
        }
    }

    fn host_event(&mut self, token: u64, events: EventSet) {
        let Some(index) = self.table.find_token(token) else {
            return;
        };
        let Some(connection) = self.table.get_mut(index) else {
            return;
        };
        connection.stream.note(events);
        if connection.stream.hung_up {
            connection.host_takes_no_more();
        }
        connection.flush();
        if connection.is_done() {
            self.remove(index);
        } else if connection.is_cut_off() {
            self.abort(index);
        } else {
            self.schedule(index);
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Connect {
                port,
                stream,
                how,
                completion,
            } => self.connect(port, stream, how, completion),
            Command::JoinReserved {
                reserved,
                prelude,
                stream,
                completion,
            } => self.join_reserved(reserved, prelude, stream, completion),
            Command::Listen { port, service } => {
                self.services.insert(port, service);
            }
            Command::Unlisten { port } => {
                self.services.remove(&port);
            }
            Command::Fallback(fallback) => self.fallback = fallback,
            Command::Answer { request, stream } => self.answer(&request, stream),
        }
    }

    fn connect(&mut self, guest_port: u32, stream: OwnedFd, how: Join, completion: Completion) {
        let reserved = matches!(how, Join::Reserved(_));
        let stream = match how {
            Join::Plain => HostStream::new(stream),
            Join::Abortive(prelude) | Join::Reserved(prelude) => {
                HostStream::abortive(stream, prelude)
            }
        };
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!("a stream cannot be joined to guest port {guest_port}: {error}");
                return completion.complete(Err(ConnectError::BadStream));
            }
        };
        let Some(key) = self.free_key(guest_port) else {
            return completion.complete(Err(ConnectError::TooMany));
        };
        let buf_alloc = self.buf_alloc();
        let mut connection = Connection::outgoing(key, stream, buf_alloc, completion);
        connection.reserved = reserved;
        if let Some(index) = self.add(connection) {
            self.ask_in_turn(index);
        }
    }

    /// A port of the host for a connection to `guest_port`; None where the table is full.
    fn free_key(&mut self, guest_port: u32) -> Option<Key> {
        if self.table.len() >= self.max_connections {
            return None;
        }
        // Fewer keys are taken than this loop tries.
        for _ in 0..=self.max_connections {
            let key = Key {
                host_port: self.next_port,
                guest_port,
            };
            self.next_port = match self.next_port {
                // The last number means "any port" (VMADDR_PORT_ANY).
                port if port >= u32::MAX - 1 => FIRST_HOST_PORT,
                port => port + 1,
            };
            if self.table.find(key).is_none() {
                return Some(key);
            }
        }
        None
    }

    /// Puts a connection into the table and watches its stream; None where that fails.
    fn add(&mut self, connection: Connection) -> Option<usize> {
        let fd = connection.stream.as_raw_fd();
        let promised = connection.credit.buf_alloc() - BUF_ALLOC_MIN;
        let index = self.table.insert(connection);
        let event = EpollEvent::new(WATCHED, self.table.token(index));
        if let Err(error) = self.epoll.ctl(ControlOperation::Add, fd, event) {
            tracing::warn!("a vsock host stream cannot be watched: {error}");
            if let Some(connection) = self.table.remove(index)
                && let State::Connecting(completion) = connection.state
            {
                completion.complete(Err(ConnectError::BadStream));
            }
            return None;
        }
        self.promised += u64::from(promised);
        Counters::set(&self.counters.connections, self.table.len() as u64);
        Counters::add(&self.counters.opened, 1);
        self.schedule(index);
        Some(index)
    }

    /// Has the thread woken when a stream that is full takes more.
    fn watch_for_room(&mut self, index: usize) {
        let token = self.table.token(index);
        let Some(connection) = self.table.get_mut(index) else {
            return;
        };
        if !connection.stream.begins_to_wait_for_room() {
            return;
        }
        let fd = connection.stream.as_raw_fd();
        let event = EpollEvent::new(WATCHED_FOR_ROOM, token);
        if let Err(error) = self.epoll.ctl(ControlOperation::Modify, fd, event) {
            tracing::warn!("a vsock host stream that is full cannot be watched: {error}");
        }
    }

    /// Puts a connection into the queue of those with something to send, if it has.
    fn schedule(&mut self, index: usize) {
        self.watch_for_room(index);
        let runnable = self
            .table
            .get_mut(index)
            .is_some_and(|connection| connection.is_runnable());
        if runnable && !self.table.set_queued(index, true) {
            self.runnable.push_back(index);
        }
    }

    /// Ends a connection as the guest sees it. Bytes that the guest had sent still go to the host.
    fn close(&mut self, index: usize) {
        let Some(connection) = self.table.get_mut(index) else {
            return;
        };
        let key = connection.key;
        if connection.linger() {
            self.table.forget_key(key, index);
            self.watch_for_room(index);
            self.answered(index);
        } else {
            self.remove(index);
        }
    }

    /// Ends a connection and tells the guest so.
    fn abort(&mut self, index: usize) {
        if let Some(connection) = self.table.get_mut(index) {
            let key = connection.key;
            self.resets.push_back(Reset {
                key,
                socket_type: super::packet::VIRTIO_VSOCK_TYPE_STREAM,
            });
            self.close(index);
        }
    }

    fn remove(&mut self, index: usize) {
        drop(self.take(index));
    }

    /// Takes a connection out of the table and out of what is watched.
    fn take(&mut self, index: usize) -> Option<Connection> {
        self.answered(index);
        let connection = self.table.remove(index)?;
        // Closing the socket is not enough where the caller kept a duplicate of it.
        let fd = connection.stream.as_raw_fd();
        if let Err(error) = self
            .epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default())
        {
            tracing::warn!("a vsock host stream is still watched: {error}");
        }
        self.promised -= u64::from(connection.credit.buf_alloc() - BUF_ALLOC_MIN);
        Counters::set(&self.counters.connections, self.table.len() as u64);
        Some(connection)
    }

    fn reset_header(&self, reset: Reset) -> super::packet::Header {
        super::packet::Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: reset.key.host_port,
            dst_port: reset.key.guest_port,
            socket_type: reset.socket_type,
            op: super::packet::VIRTIO_VSOCK_OP_RST,
            ..Default::default()
        }
    }
}

impl AsRawFd for Mux {
    /// The descriptor that is readable when [`Mux::look_at_host`] has something to do.
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

impl Drop for Mux {
    fn drop(&mut self) {
        self.reset();
    }
}

impl std::fmt::Debug for Mux {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mux")
            .field("guest_cid", &self.guest_cid)
            .field("connections", &self.table.len())
            .finish_non_exhaustive()
    }
}
