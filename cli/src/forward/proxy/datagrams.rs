//! UDP ASSOCIATE: datagrams between sockets of the host, one for each client that asked, and flows in the
//! guest, all over one connection to it.
//!
//! Datagrams that find no room are dropped, as anywhere else on their way.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;

use agent::protocol::Datagram;

use super::socks;
use crate::forward::framed::Framed;

/// The largest UDP datagram.
const MAX_DATAGRAM: usize = 65_535;

/// The most bytes that wait for the guest to take them.
const MAX_QUEUED: usize = 1 << 20;

/// Datagrams of one client that are taken before others are looked after.
const BATCH: usize = 32;

/// The flows of all clients.
pub struct Relay {
    /// The connection to the guest.
    guest: Option<Framed>,
    flows: BTreeMap<u32, Flow>,
    buffer: Vec<u8>,
}

/// One client's datagrams.
struct Flow {
    socket: UdpSocket,
    /// Where its connection comes from, and where it said that its datagrams would, or 0.
    address: IpAddr,
    port: u16,
    /// Where the first of them came from; all others do, and answers go there.
    peer: Option<SocketAddr>,
}

impl Relay {
    /// No flows.
    pub fn new() -> Self {
        Self {
            guest: None,
            flows: BTreeMap::new(),
            buffer: vec![0; MAX_DATAGRAM],
        }
    }

    /// How many flows there are.
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// The connection to the guest.
    pub fn guest(&self) -> Option<&Framed> {
        self.guest.as_ref()
    }

    /// Has a connection to the guest.
    pub fn connected(&mut self, stream: UnixStream) -> io::Result<()> {
        self.guest = Some(Framed::new(stream, MAX_QUEUED)?);
        Ok(())
    }

    /// The connection to the guest has ended: all flows have.
    pub fn disconnected(&mut self) -> impl Iterator<Item = u32> {
        self.guest = None;
        std::mem::take(&mut self.flows).into_keys()
    }

    /// Opens `flow` for the client behind `control`, which said that it will send from `port`, or 0.
    /// The socket takes its datagrams.
    pub fn open(&mut self, flow: u32, control: &TcpStream, port: u16) -> io::Result<&UdpSocket> {
        if self.flows.contains_key(&flow) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let mut at = control.local_addr()?;
        at.set_port(0);
        // An IPv4 client of an IPv6 listener wants to send IPv4.
        if at.ip() != at.ip().to_canonical() {
            at.set_ip(at.ip().to_canonical());
        }
        let socket = UdpSocket::bind(at)?;
        socket.set_nonblocking(true)?;
        let flow = self.flows.entry(flow).or_insert(Flow {
            socket,
            address: control.peer_addr()?.ip().to_canonical(),
            port,
            peer: None,
        });
        Ok(&flow.socket)
    }

    /// Ends `flow`, if there is one.
    pub fn close(&mut self, flow: u32) {
        if self.flows.remove(&flow).is_some() {
            self.tell_guest(&Datagram::Closed { flow });
        }
    }

    /// Takes what the client of `flow` sent.
    pub fn take(&mut self, flow: u32) {
        let mut buffer = std::mem::take(&mut self.buffer);
        for _ in 0..BATCH {
            let Some(found) = self.flows.get_mut(&flow) else {
                break;
            };
            match found.socket.recv_from(&mut buffer) {
                Ok((len, from)) => {
                    let bytes = buffer.get(..len).unwrap_or_default();
                    if let Some(datagram) = found.datagram(flow, from, bytes) {
                        self.tell_guest(&datagram);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // What became of an answer that was sent there.
                Err(error) => tracing::debug!("a client's datagrams cannot be received: {error}"),
            }
        }
        self.buffer = buffer;
    }

    /// Takes what the guest sent, and gives it what waits. Fails where the connection ended or makes no sense.
    pub fn exchange(&mut self) -> io::Result<()> {
        let Some(guest) = &mut self.guest else {
            return Ok(());
        };
        guest.flush()?;
        if !guest.fill()? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while let Some(message) = guest.next()? {
            // A flow that the guest closes for its silence is made anew by the client's next datagram.
            let Datagram::Received {
                flow,
                from,
                payload,
            } = message
            else {
                continue;
            };
            if let Some(found) = self.flows.get(&flow) {
                found.answer(from, &payload);
            }
        }
        Ok(())
    }

    fn tell_guest(&mut self, datagram: &Datagram) {
        let Some(guest) = &mut self.guest else {
            return;
        };
        // Where there is no room it is lost; what else is wrong shows when the connection is read.
        if let Err(error) = guest.send(datagram) {
            tracing::debug!("a datagram for the guest is lost: {error}");
        }
    }
}

impl Flow {
    /// The message that carries a client's datagram; None drops it.
    fn datagram(&mut self, flow: u32, from: SocketAddr, bytes: &[u8]) -> Option<Datagram> {
        let expected = from.ip() == self.address
            && (self.port == 0 || self.port == from.port())
            && self.peer.is_none_or(|peer| peer == from);
        if !expected {
            return None;
        }
        let (to, payload) = socks::datagram(bytes)?;
        self.peer = Some(from);
        let payload = payload.to_vec();
        Some(Datagram::Send { flow, to, payload })
    }

    fn answer(&self, from: SocketAddr, payload: &[u8]) {
        let Some(peer) = self.peer else {
            return;
        };
        if let Err(error) = self
            .socket
            .send_to(&socks::put_datagram(from, payload), peer)
        {
            tracing::debug!("a datagram for {peer} is lost: {error}");
        }
    }
}
