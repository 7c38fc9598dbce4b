//! The proxy's thread: one epoll for the listeners, all clients that are not joined yet, and datagrams.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use agent::protocol::DialError;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};

use super::client::{Client, Step};
use super::datagrams::Relay;
use crate::forward::listener::HostSocket;
use crate::forward::{Dialed, Forwarder};

/// How many clients may be on their way to a connection. One more takes the place of the one that has
/// been silent the longest.
pub const MAX_CLIENTS: usize = 1024;

/// How many clients may keep flows of datagrams open.
pub const MAX_FLOWS: usize = 512;

/// How long no client is accepted where there is no room, or no descriptor, for one.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// Clients accepted before others are looked after.
const ACCEPT_BATCH: usize = 64;

/// What an event is about: the mailbox, the guest's datagrams, a listener, or else a client, whose number
/// has [`DATAGRAMS`] set where it is about its datagrams.
const MAILBOX: u64 = 0;
const GUEST: u64 = 1;
const FIRST_LISTENER: u64 = 2;
const FIRST_CLIENT: u64 = 1 << 16;
const DATAGRAMS: u64 = 1 << 63;

/// What other threads tell the proxy's.
pub enum Message {
    /// How a client's dial ended.
    Dialed(u64, Result<Dialed, DialError>),
    /// The end.
    Stop,
}

/// Takes messages for the proxy's thread. What arrives after its end is dropped.
#[derive(Debug, Clone)]
pub struct Mailbox {
    sender: Sender<Message>,
    wake: Arc<OwnedFd>,
}

impl Mailbox {
    /// Leaves a message and wakes the thread.
    pub fn send(&self, message: Message) {
        if self.sender.send(message).is_ok() {
            // It can only fail for a full counter, which has woken the thread already.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// The state of the proxy's thread.
pub struct Server {
    epoll: OwnedFd,
    listeners: Vec<HostSocket>,
    /// Set while no client is accepted.
    paused_until: Option<Instant>,
    forwarder: Forwarder,
    patience: Duration,
    mailbox: Mailbox,
    messages: Receiver<Message>,
    /// By number, so the oldest comes first.
    clients: BTreeMap<u64, Client>,
    next_client: u64,
    relay: Relay,
}

impl Server {
    /// Ready to run on a thread; clients are given `patience`.
    pub fn new(
        listeners: Vec<HostSocket>,
        forwarder: Forwarder,
        patience: Duration,
    ) -> io::Result<(Self, Mailbox)> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &wake, EventData::new_u64(MAILBOX), EventFlags::IN)?;
        let (sender, messages) = mpsc::channel();
        let mailbox = Mailbox {
            sender,
            wake: Arc::new(wake),
        };
        for (number, listener) in (FIRST_LISTENER..FIRST_CLIENT).zip(&listeners) {
            epoll::add(&epoll, listener, EventData::new_u64(number), EventFlags::IN)?;
        }
        let server = Self {
            epoll,
            listeners,
            paused_until: None,
            forwarder,
            patience,
            mailbox: mailbox.clone(),
            messages,
            clients: BTreeMap::new(),
            next_client: FIRST_CLIENT,
            relay: Relay::new(),
        };
        Ok((server, mailbox))
    }

    /// Serves until told to stop.
    pub fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(256);
        loop {
            let timeout = self.timeout();
            events.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                timeout.as_ref(),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                match event.data.u64() {
                    MAILBOX => {
                        if !self.read_mailbox() {
                            return Ok(());
                        }
                    }
                    GUEST => self.serve_guest(),
                    number if number < FIRST_CLIENT => self.accept(number)?,
                    number if number & DATAGRAMS != 0 => self.serve_datagrams(number & !DATAGRAMS),
                    number => self.serve_client(number, event.flags),
                }
            }
            self.expire()?;
        }
    }

    /// Until the next deadline: a look at each client costs less than keeping them in order would.
    fn timeout(&self) -> Option<Timespec> {
        let deadlines = self.clients.values().filter_map(Client::deadline);
        let next = deadlines.chain(self.paused_until).min()?;
        let wait = next.saturating_duration_since(Instant::now());
        Timespec::try_from(wait).ok()
    }

    /// Does what is due.
    fn expire(&mut self) -> io::Result<()> {
        let now = Instant::now();
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
            self.watch_listeners(EventFlags::IN)?;
        }
        let due = |client: &Client| client.deadline().is_some_and(|when| when <= now);
        let late = self.clients.iter().filter(|(_, client)| due(client));
        let late: Vec<u64> = late.map(|(number, _)| *number).collect();
        for number in late {
            self.step(number, Client::expire);
        }
        Ok(())
    }

    fn accept(&mut self, number: u64) -> io::Result<()> {
        for _ in 0..ACCEPT_BATCH {
            let connecting = self.clients.len().saturating_sub(self.relay.len());
            let is_full = connecting >= MAX_CLIENTS;
            let in_the_way = is_full.then(|| self.oldest_idle());
            if in_the_way == Some(None) {
                return self.pause();
            }
            let index = usize::try_from(number - FIRST_LISTENER).unwrap_or(usize::MAX);
            let Some(listener) = self.listeners.get(index) else {
                return Ok(());
            };
            match listener.accept() {
                Ok(stream) => {
                    if let Some(Some(number)) = in_the_way {
                        self.remove(number);
                    }
                    self.welcome(stream.into());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if is_shortage(&error) => {
                    tracing::warn!("the proxy cannot take another client yet: {error}");
                    return self.pause();
                }
                // This client failed; the next need not.
                Err(error) => tracing::debug!("a client of the proxy is lost: {error}"),
            }
        }
        Ok(())
    }

    fn welcome(&mut self, stream: TcpStream) {
        let number = self.next_client;
        let data = EventData::new_u64(number);
        if let Err(error) = epoll::add(&self.epoll, &stream, data, EventFlags::IN) {
            tracing::debug!("a client of the proxy is lost: {error}");
            return;
        }
        self.next_client += 1;
        self.clients
            .insert(number, Client::new(stream, self.patience));
    }

    /// The oldest client that is waited for.
    fn oldest_idle(&self) -> Option<u64> {
        let mut idle = self.clients.iter().filter(|(_, client)| client.is_idle());
        idle.next().map(|(number, _)| *number)
    }

    fn pause(&mut self) -> io::Result<()> {
        self.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
        self.watch_listeners(EventFlags::empty())
    }

    fn watch_listeners(&self, flags: EventFlags) -> io::Result<()> {
        for (number, listener) in (FIRST_LISTENER..).zip(&self.listeners) {
            epoll::modify(&self.epoll, listener, EventData::new_u64(number), flags)?;
        }
        Ok(())
    }

    /// Reads all messages; false at the end.
    fn read_mailbox(&mut self) -> bool {
        let mut count = [0; 8];
        // It only rearms the wake-up: what there is to do is in the channel.
        let _ = rustix::io::read(&self.mailbox.wake, &mut count);
        while let Ok(message) = self.messages.try_recv() {
            match message {
                Message::Dialed(number, result) => {
                    // A client that has gone takes its connection along.
                    self.step(number, |client| client.dialed(result));
                }
                Message::Stop => return false,
            }
        }
        true
    }

    fn serve_client(&mut self, number: u64, flags: EventFlags) {
        // Reset, or ended both ways: nobody is there to be answered.
        if flags.intersects(EventFlags::ERR | EventFlags::HUP) {
            self.remove(number);
        } else {
            self.step(number, Client::advance);
        }
    }

    /// Has a client do something, and gives it what it then needs.
    fn step(&mut self, number: u64, act: impl FnOnce(&mut Client) -> Step) {
        if let Some(client) = self.clients.get_mut(&number) {
            let step = act(client);
            self.follow(number, step);
        }
    }

    fn follow(&mut self, number: u64, step: Step) {
        match step {
            Step::Wait(flags) => self.watch_client(number, flags),
            Step::Dial(target) => {
                self.watch_client(number, EventFlags::empty());
                let mailbox = self.mailbox.clone();
                let done = move |result| mailbox.send(Message::Dialed(number, result));
                self.forwarder.dial(target, done);
            }
            Step::Associate(port) => {
                let result = self.associate(number, port);
                self.step(number, |client| match result {
                    Ok(relay) => client.associated(relay),
                    Err(error) => client.dialed(Err(DialError::Other(error.to_string()))),
                });
            }
            Step::Join => {
                if let Some(client) = self.remove(number)
                    && let Err(error) = client.join()
                {
                    tracing::debug!("a client of the proxy is lost: {error}");
                }
            }
            Step::Over => drop(self.remove(number)),
        }
    }

    fn watch_client(&mut self, number: u64, flags: EventFlags) {
        let data = EventData::new_u64(number);
        let watched = match self.clients.get(&number) {
            Some(client) => epoll::modify(&self.epoll, client.stream(), data, flags),
            None => Ok(()),
        };
        if let Err(error) = watched {
            tracing::debug!("a client of the proxy is lost: {error}");
            self.remove(number);
        }
    }

    /// Takes a client out of everything.
    fn remove(&mut self, number: u64) -> Option<Client> {
        let client = self.clients.remove(&number)?;
        // Not left to the close: the connection lives on where it is joined.
        let _ = epoll::delete(&self.epoll, client.stream());
        self.relay.close(flow_of(number));
        self.watch_guest();
        Some(client)
    }

    fn associate(&mut self, number: u64, port: u16) -> io::Result<SocketAddr> {
        if self.relay.len() >= MAX_FLOWS {
            return Err(io::Error::other("too many clients send datagrams"));
        }
        if self.relay.guest().is_none() {
            let guest = self.forwarder.open_datagrams()?;
            epoll::add(
                &self.epoll,
                &guest,
                EventData::new_u64(GUEST),
                EventFlags::IN,
            )?;
            self.relay.connected(guest)?;
        }
        let client = self.clients.get(&number).ok_or(io::ErrorKind::NotFound)?;
        let socket = self.relay.open(flow_of(number), client.stream(), port)?;
        let data = EventData::new_u64(number | DATAGRAMS);
        epoll::add(&self.epoll, socket, data, EventFlags::IN)?;
        socket.local_addr()
    }

    fn serve_datagrams(&mut self, number: u64) {
        self.relay.take(flow_of(number));
        self.watch_guest();
    }

    fn serve_guest(&mut self) {
        if let Err(error) = self.relay.exchange() {
            tracing::debug!("the guest carries no more datagrams: {error}");
            let over: Vec<u32> = self.relay.disconnected().collect();
            let gone = |number: &u64| over.contains(&flow_of(*number));
            let gone: Vec<u64> = self.clients.keys().copied().filter(gone).collect();
            for number in gone {
                self.remove(number);
            }
        }
        self.watch_guest();
    }

    fn watch_guest(&self) {
        let Some(guest) = self.relay.guest() else {
            return;
        };
        let mut flags = EventFlags::IN;
        flags.set(EventFlags::OUT, guest.is_waiting());
        if let Err(error) = epoll::modify(&self.epoll, guest, EventData::new_u64(GUEST), flags) {
            tracing::debug!("the guest's datagrams cannot be waited for: {error}");
        }
    }
}

/// A client's flow of datagrams has its number, as far as it fits.
fn flow_of(number: u64) -> u32 {
    (number & u64::from(u32::MAX)) as u32
}

/// Whether what was missing will be there again.
fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error);
    [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM]
        .iter()
        .any(|one| errno == Some(*one))
}
