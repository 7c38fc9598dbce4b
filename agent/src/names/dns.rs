//! One question to one name server: both kinds of addresses of a name, over UDP, and over TCP where
//! an answer does not fit.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use simple_dns::rdata::RData;
use simple_dns::{CLASS, Name, Packet, PacketFlag, QCLASS, QTYPE, Question, RCODE, TYPE};

/// Where name servers listen.
pub const PORT: u16 = 53;

/// The longest answer over UDP to a question that does not offer more (RFC 1035), with room for
/// servers that do not care.
const MAX_DATAGRAM: usize = 4096;

/// Records in an answer: more than any name has.
const MAX_RECORDS: usize = 1024;

/// What a server said.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// Not empty.
    Addresses(Vec<IpAddr>),
    /// There is no such name, or it has no address.
    Nothing,
}

/// Why there is no reply.
#[derive(Debug, PartialEq, Eq)]
pub enum Failure {
    /// It is no name that could be asked for.
    Invalid,
    /// This server does not help; one sentence that says how.
    Server(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => no_answer(),
            _ => Self::Server(error.to_string()),
        }
    }
}

/// One of the two questions.
struct Query<'a> {
    name: &'a Name<'a>,
    id: u16,
    kind: TYPE,
    packet: Vec<u8>,
}

/// What one packet says to one of the two questions.
enum Said {
    Addresses(Vec<IpAddr>),
    /// It did not fit.
    Truncated,
    /// The server cannot tell.
    Failed(RCODE),
}

/// Asks `server` for all addresses of `name`, IPv6 ones first.
pub fn ask(server: SocketAddr, name: &str, deadline: Instant) -> Result<Reply, Failure> {
    // What has an escape or is no printable ASCII is no name of a host.
    if !name
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && byte != b'\\')
    {
        return Err(Failure::Invalid);
    }
    let name = Name::new(name).map_err(|_| Failure::Invalid)?;
    let queries = [Query::new(&name, TYPE::AAAA)?, Query::new(&name, TYPE::A)?];
    let mut addresses = Vec::new();
    let mut failure = None;
    for (query, said) in queries
        .iter()
        .zip(ask_over_udp(server, &queries, deadline)?)
    {
        let said = match said {
            Some(Said::Truncated) => ask_over_tcp(server, query, deadline),
            Some(said) => Ok(said),
            None => Err(no_answer()),
        };
        match said {
            Ok(Said::Addresses(some)) => addresses.extend(some),
            Ok(Said::Failed(code)) => failure = Some(Failure::Server(format!("it says {code:?}"))),
            Ok(Said::Truncated) => failure = Some(nonsense()),
            Err(error) => failure = Some(error),
        }
    }
    // Either kind of address will do.
    match (addresses.is_empty(), failure) {
        (false, _) => Ok(Reply::Addresses(addresses)),
        (true, None) => Ok(Reply::Nothing),
        (true, Some(failure)) => Err(failure),
    }
}

fn no_answer() -> Failure {
    Failure::Server("it does not answer".to_owned())
}

fn nonsense() -> Failure {
    Failure::Server("its answer makes no sense".to_owned())
}

/// What came to either question until both were answered, or time was up.
fn ask_over_udp(
    server: SocketAddr,
    queries: &[Query<'_>; 2],
    deadline: Instant,
) -> Result<[Option<Said>; 2], Failure> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    // Only what the server itself sends arrives.
    socket.connect(server)?;
    for query in queries {
        socket.send(&query.packet)?;
    }
    let mut said = [None, None];
    let mut buffer = vec![0; MAX_DATAGRAM];
    while said.iter().any(Option::is_none) {
        socket.set_read_timeout(Some(left(deadline)?))?;
        let length = match socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Where one of both was answered, that has to do.
            Err(_) if said.iter().any(Option::is_some) => break,
            Err(error) => return Err(error.into()),
        };
        let packet = buffer.get(..length).unwrap_or_default();
        for (query, said) in queries.iter().zip(&mut said) {
            if said.is_none() {
                *said = query.read(packet);
            }
        }
    }
    Ok(said)
}

fn ask_over_tcp(server: SocketAddr, query: &Query<'_>, deadline: Instant) -> Result<Said, Failure> {
    let mut stream = TcpStream::connect_timeout(&server, left(deadline)?)?;
    let length = u16::try_from(query.packet.len()).map_err(|_| Failure::Invalid)?;
    stream.set_write_timeout(Some(left(deadline)?))?;
    stream.write_all(&[&length.to_be_bytes(), query.packet.as_slice()].concat())?;
    let mut length = [0; 2];
    read_exact(&mut stream, &mut length, deadline)?;
    let mut packet = vec![0; u16::from_be_bytes(length).into()];
    read_exact(&mut stream, &mut packet, deadline)?;
    query.read(&packet).ok_or_else(nonsense)
}

/// Fills `bytes`; a server that sends one byte at a time does not get more time for it.
fn read_exact(stream: &mut TcpStream, bytes: &mut [u8], deadline: Instant) -> Result<(), Failure> {
    let mut have = 0;
    while let Some(rest @ [_, ..]) = bytes.get_mut(have..) {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(rest) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(length) => have += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The time that is left, which is never none at all: that would mean for ever.
fn left(deadline: Instant) -> Result<Duration, Failure> {
    let left = deadline.saturating_duration_since(Instant::now());
    match left.is_zero() {
        true => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        false => Ok(left),
    }
}

impl<'a> Query<'a> {
    fn new(name: &'a Name<'a>, kind: TYPE) -> Result<Self, Failure> {
        let mut id = [0; 2];
        getrandom(&mut id, GetRandomFlags::empty()).map_err(io::Error::from)?;
        let id = u16::from_ne_bytes(id);
        let mut packet = Packet::new_query(id);
        packet.set_flags(PacketFlag::RECURSION_DESIRED);
        let class = QCLASS::CLASS(CLASS::IN);
        let question = Question::new(name.clone(), QTYPE::TYPE(kind), class, false);
        packet.questions.push(question);
        Ok(Self {
            name,
            id,
            kind,
            packet: packet.build_bytes_vec().map_err(|_| Failure::Invalid)?,
        })
    }

    /// What `packet` says to this question; None where it is no answer to it.
    fn read(&self, packet: &[u8]) -> Option<Said> {
        if !packet.starts_with(&self.id.to_be_bytes()) || records(packet) > MAX_RECORDS {
            return None;
        }
        let packet = Packet::parse(packet).ok()?;
        let asks_the_same = packet.questions.iter().any(|question| {
            question.qtype == QTYPE::TYPE(self.kind) && &question.qname == self.name
        });
        if !packet.has_flags(PacketFlag::RESPONSE) || !asks_the_same {
            return None;
        }
        if packet.has_flags(PacketFlag::TRUNCATION) {
            return Some(Said::Truncated);
        }
        match packet.rcode() {
            RCODE::NoError | RCODE::NameError => {}
            code => return Some(Said::Failed(code)),
        }
        // Names that stand for others come with what they stand for.
        let addresses = packet
            .answers
            .iter()
            .filter_map(|record| match &record.rdata {
                RData::A(a) => Some(IpAddr::from(Ipv4Addr::from(a.address))),
                RData::AAAA(aaaa) => Some(IpAddr::from(Ipv6Addr::from(aaaa.address))),
                _ => None,
            });
        Some(Said::Addresses(addresses.collect()))
    }
}

/// How many records a packet's header announces.
fn records(packet: &[u8]) -> usize {
    let counts = packet.get(4..12).unwrap_or_default();
    let count = |pair: &[u8]| {
        pair.iter()
            .fold(0, |sum, byte| sum << 8 | usize::from(*byte))
    };
    counts.chunks(2).map(count).sum()
}
