//! One client of the proxy, from its accept to the moment its connection is joined to the guest.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use agent::protocol::{DialError, Target};
use rustix::event::epoll::EventFlags;

use super::handshake::{Handshake, Next};
use crate::forward::Dialed;

/// How long, and for how many bytes, the client of a refused request is listened to, so that it reads
/// the answer: closing with unread bytes resets the connection and takes the answer away.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
const DRAIN_BYTES: usize = 1 << 20;

/// Bytes read at a time.
const CHUNK: usize = 16 << 10;

/// A client.
pub struct Client {
    stream: TcpStream,
    handshake: Handshake,
    /// What it is still to be sent.
    out: Vec<u8>,
    phase: Phase,
    /// How long it may take to say what it wants, and again to take the answer.
    patience: Duration,
    deadline: Option<Instant>,
}

enum Phase {
    /// It says what it wants.
    Reading,
    /// The guest is asked.
    Dialing,
    /// It is sent the answer, and is then joined.
    Joining(Dialed),
    /// It is sent the answer, and then nothing more.
    Ending,
    /// It is listened to until it ends, or has said this much.
    Draining(usize),
    /// It keeps its flow of datagrams open.
    Associated,
}

/// What a client needs next.
pub enum Step {
    /// These events.
    Wait(EventFlags),
    /// This connection; go on with [`Client::dialed`].
    Dial(Target),
    /// A relay for datagrams from this port; go on with [`Client::associated`] or [`Client::dialed`].
    Associate(u16),
    /// To be taken apart with [`Client::join`].
    Join,
    /// Nothing: it is over.
    Over,
}

impl Client {
    /// A client that was just accepted, and may take `patience` to say what it wants and again to take
    /// the answer.
    pub fn new(stream: TcpStream, patience: Duration) -> Self {
        Self {
            stream,
            handshake: Handshake::new(),
            out: Vec::new(),
            phase: Phase::Reading,
            patience,
            deadline: Some(Instant::now() + patience),
        }
    }

    /// Its connection.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// When [`Client::expire`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether it is the client that is waited for.
    pub fn is_idle(&self) -> bool {
        matches!(
            self.phase,
            Phase::Reading | Phase::Ending | Phase::Draining(_)
        )
    }

    /// Goes as far as it can without waiting.
    pub fn advance(&mut self) -> Step {
        match self.try_advance() {
            Ok(step) => step,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(),
            Err(_) => Step::Over,
        }
    }

    /// How the guest answered [`Step::Dial`], or that there is no relay.
    pub fn dialed(&mut self, result: Result<Dialed, DialError>) -> Step {
        match result {
            Ok(dialed) => {
                self.out.extend(self.handshake.connected());
                self.enter(Phase::Joining(dialed), Some(self.patience));
            }
            Err(error) => {
                self.out.extend(self.handshake.failed(&error));
                self.enter(Phase::Ending, Some(self.patience));
            }
        }
        self.advance()
    }

    /// Its datagrams are taken at `relay`.
    pub fn associated(&mut self, relay: SocketAddr) -> Step {
        self.out.extend(self.handshake.associated(relay));
        self.enter(Phase::Associated, None);
        self.advance()
    }

    /// The deadline has passed.
    pub fn expire(&mut self) -> Step {
        if !matches!(self.phase, Phase::Reading) {
            return Step::Over;
        }
        self.out.extend(self.handshake.timed_out());
        self.enter(Phase::Ending, Some(DRAIN_TIMEOUT));
        self.advance()
    }

    /// Joins the connection to the guest's; nothing of it is left here.
    pub fn join(self) -> io::Result<()> {
        match self.phase {
            Phase::Joining(dialed) => {
                dialed.attach_after(&self.handshake.into_early(), self.stream)
            }
            _ => Ok(()),
        }
    }

    fn enter(&mut self, phase: Phase, timeout: Option<Duration>) {
        self.phase = phase;
        self.deadline = timeout.map(|timeout| Instant::now() + timeout);
    }

    fn wait(&self) -> Step {
        Step::Wait(match self.phase {
            _ if !self.out.is_empty() => EventFlags::OUT,
            // What comes early stays in the kernel. A client that ends its side still wants its answer.
            Phase::Dialing | Phase::Joining(_) | Phase::Ending => EventFlags::empty(),
            Phase::Reading | Phase::Draining(_) | Phase::Associated => EventFlags::IN,
        })
    }

    fn try_advance(&mut self) -> io::Result<Step> {
        let mut chunk = [0; CHUNK];
        loop {
            self.flush()?;
            match &mut self.phase {
                Phase::Reading => {
                    let room = self.handshake.room().min(CHUNK);
                    let arrived = read(&self.stream, chunk.get_mut(..room).unwrap_or_default())?;
                    match self.handshake.advance(arrived, &mut self.out) {
                        Next::Read => {}
                        Next::Dial(target) => {
                            self.enter(Phase::Dialing, None);
                            return Ok(Step::Dial(target));
                        }
                        Next::Associate(port) => {
                            self.enter(Phase::Dialing, None);
                            return Ok(Step::Associate(port));
                        }
                        Next::Close => self.enter(Phase::Ending, Some(self.patience)),
                    }
                }
                Phase::Dialing => return Ok(self.wait()),
                Phase::Joining(_) => return Ok(Step::Join),
                Phase::Ending => {
                    self.stream.shutdown(Shutdown::Write)?;
                    self.enter(Phase::Draining(DRAIN_BYTES), Some(DRAIN_TIMEOUT));
                }
                Phase::Draining(left) => {
                    let len = read(&self.stream, &mut chunk)?.len();
                    match left.checked_sub(len) {
                        Some(less) => *left = less,
                        None => return Ok(Step::Over),
                    }
                }
                // Only its end means something; one read each time, so that it keeps nobody else waiting.
                Phase::Associated => {
                    read(&self.stream, &mut chunk)?;
                    return Ok(self.wait());
                }
            }
        }
    }

    /// Sends what there is to send; fails with WouldBlock where some is left.
    fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => drop(self.out.drain(..len)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// What has arrived; its end is an error here, as no client may end before it is answered.
fn read<'a>(mut stream: &TcpStream, chunk: &'a mut [u8]) -> io::Result<&'a [u8]> {
    loop {
        match stream.read(chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => return Ok(chunk.get(..len).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
