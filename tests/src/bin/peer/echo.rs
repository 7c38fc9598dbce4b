//! An echo server for thousands of connections: one thread, one epoll, a bounded buffer each.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use tests::net::raise_descriptor_limit;

/// What is read but not written back yet, at most.
const BUFFER: usize = 16 << 10;

/// The listener's number; connections have that of their descriptor.
const LISTENER: u64 = u64::MAX;

struct Connection {
    stream: TcpStream,
    pending: Vec<u8>,
    ended: bool,
}

/// Echoes what comes, and ends when the other end does.
pub fn serve(at: &str) -> io::Result<()> {
    raise_descriptor_limit();
    let listener = TcpListener::bind(at)?;
    // The standard library's backlog is 128.
    rustix::net::listen(&listener, 4096)?;
    listener.set_nonblocking(true)?;
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    let listening = EventData::new_u64(LISTENER);
    epoll::add(&epoll, &listener, listening, EventFlags::IN)?;
    super::say("listening");
    let mut connections = HashMap::new();
    let mut events: Vec<Event> = Vec::with_capacity(256);
    loop {
        events.clear();
        epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            let number = event.data.u64();
            if number == LISTENER {
                accept(&listener, &epoll, &mut connections)?;
            } else if let Some(connection) = connections.get_mut(&number)
                && let Ok(false) | Err(_) = connection.advance()
            {
                connections.remove(&number);
            }
        }
    }
}

fn accept(
    listener: &TcpListener,
    epoll: &impl std::os::fd::AsFd,
    connections: &mut HashMap<u64, Connection>,
) -> io::Result<()> {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error),
        };
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let number = stream.as_raw_fd() as u64;
        let wanted = EventFlags::IN | EventFlags::OUT | EventFlags::ET | EventFlags::RDHUP;
        epoll::add(epoll, &stream, EventData::new_u64(number), wanted)?;
        let connection = Connection {
            stream,
            pending: Vec::new(),
            ended: false,
        };
        connections.insert(number, connection);
    }
}

impl Connection {
    /// Reads and writes what goes; false when there is no more to do.
    fn advance(&mut self) -> io::Result<bool> {
        let mut buffer = [0; BUFFER];
        loop {
            while !self.pending.is_empty() {
                match (&self.stream).write(&self.pending) {
                    Ok(len) => drop(self.pending.drain(..len)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                    Err(error) => return Err(error),
                }
            }
            if self.ended {
                self.stream.shutdown(Shutdown::Write)?;
                return Ok(false);
            }
            match (&self.stream).read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(len) => self.pending.extend_from_slice(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            }
        }
    }
}
