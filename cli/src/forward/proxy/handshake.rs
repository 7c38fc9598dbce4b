//! What a client of the proxy says before its connection is one, as a state machine without I/O:
//! bytes in, answers and a target out. The first byte tells the protocols apart.

use std::net::SocketAddr;

use agent::protocol::{DialError, Target};

use super::http::{self, Answer};
use super::socks::{self, Reply};

/// The most bytes that a client may send before it has an answer: the head of an HTTP request. Written
/// anew it is a little longer, and still fits into what can precede a stream to the guest, 64 KiB.
pub const MAX_BYTES: usize = 60 << 10;

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// More bytes of the client.
    Read,
    /// A connection to this; go on with [`Handshake::connected`] or [`Handshake::failed`].
    Dial(Target),
    /// A relay for datagrams that the client sends from this port, or from any where it is 0; go on
    /// with [`Handshake::associated`] or [`Handshake::failed`].
    Associate(u16),
    /// The end, after what there is to send.
    Close,
}

/// What the client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    Socks4,
    Socks5 { greeted: bool },
    Http { tunnel: bool },
}

/// One client's handshake.
#[derive(Debug)]
pub struct Handshake {
    dialect: Dialect,
    /// What arrived and was not yet understood; what comes early stays in it.
    bytes: Vec<u8>,
    /// How many of `bytes` are known to hold no end of a head.
    seen: usize,
}

impl Handshake {
    /// A client that has said nothing.
    pub fn new() -> Self {
        Self {
            // Until the first byte says otherwise.
            dialect: Dialect::Http { tunnel: false },
            bytes: Vec::new(),
            seen: 0,
        }
    }

    /// How many bytes may be given to [`Handshake::advance`]; not 0 while it asks for more.
    pub fn room(&self) -> usize {
        MAX_BYTES.saturating_sub(self.bytes.len())
    }

    /// Takes what arrived, and appends to `out` what the client is to be sent.
    pub fn advance(&mut self, arrived: &[u8], out: &mut Vec<u8>) -> Next {
        if self.bytes.is_empty() && !self.is_greeted() {
            match arrived.first() {
                None => return Next::Read,
                Some(&socks::VERSION_5) => self.dialect = Dialect::Socks5 { greeted: false },
                Some(&socks::VERSION_4) => self.dialect = Dialect::Socks4,
                Some(first) if first.is_ascii_alphabetic() => {}
                Some(_) => return refuse(out, &Answer::MALFORMED.message()),
            }
        }
        self.bytes.extend_from_slice(arrived);
        match self.dialect {
            Dialect::Socks5 { greeted: false } => self.greeting(out),
            Dialect::Socks5 { greeted: true } => self.request(out),
            Dialect::Socks4 => self.request4(out),
            Dialect::Http { .. } => self.head(out),
        }
    }

    /// What the client is to be sent before the connection that it asked for.
    pub fn connected(&self) -> Vec<u8> {
        match self.dialect {
            Dialect::Socks5 { .. } => socks::reply(Reply::Succeeded, None),
            Dialect::Socks4 => socks::reply4(true),
            Dialect::Http { tunnel: true } => http::ESTABLISHED.to_vec(),
            Dialect::Http { tunnel: false } => Vec::new(),
        }
    }

    /// What the client is to be sent as there is a relay at `relay`.
    pub fn associated(&self, relay: SocketAddr) -> Vec<u8> {
        socks::reply(Reply::Succeeded, Some(relay))
    }

    /// What the client is to be sent, and no more after it.
    pub fn failed(&self, error: &DialError) -> Vec<u8> {
        match self.dialect {
            Dialect::Socks5 { .. } => socks::reply(error.into(), None),
            Dialect::Socks4 => socks::reply4(false),
            Dialect::Http { .. } => Answer::from(error).message(),
        }
    }

    /// What the client is to be sent as its request did not come in time.
    pub fn timed_out(&self) -> Vec<u8> {
        match self.dialect {
            // A browser opens connections that it may never need.
            Dialect::Http { .. } if !self.bytes.is_empty() => Answer::TOO_SLOW.message(),
            _ => Vec::new(),
        }
    }

    /// What belongs to the connection already: a plain request's head, and what the client sent early.
    pub fn into_early(self) -> Vec<u8> {
        self.bytes
    }

    fn is_greeted(&self) -> bool {
        self.dialect == Dialect::Socks5 { greeted: true }
    }

    fn greeting(&mut self, out: &mut Vec<u8>) -> Next {
        let Some((acceptable, len)) = socks::greeting(&self.bytes) else {
            return Next::Read;
        };
        if !acceptable {
            return refuse(out, &socks::METHOD_UNACCEPTABLE);
        }
        self.bytes.drain(..len);
        self.dialect = Dialect::Socks5 { greeted: true };
        out.extend_from_slice(&socks::METHOD_NONE);
        self.request(out)
    }

    fn request(&mut self, out: &mut Vec<u8>) -> Next {
        match socks::request(&self.bytes) {
            Ok(None) => Next::Read,
            Ok(Some((request, len))) => {
                self.bytes.drain(..len);
                match request {
                    socks::Request::Connect(target) => Next::Dial(target),
                    socks::Request::Associate { port } => Next::Associate(port),
                }
            }
            Err(reply) => refuse(out, &socks::reply(reply, None)),
        }
    }

    fn request4(&mut self, out: &mut Vec<u8>) -> Next {
        match socks::request4(&self.bytes) {
            Ok(None) => Next::Read,
            Ok(Some((target, len))) => {
                self.bytes.drain(..len);
                Next::Dial(target)
            }
            Err(()) => refuse(out, &socks::reply4(false)),
        }
    }

    fn head(&mut self, out: &mut Vec<u8>) -> Next {
        let Some(len) = http::head_len(&self.bytes, self.seen) else {
            self.seen = self.bytes.len();
            if self.room() == 0 {
                return refuse(out, &Answer::TOO_LARGE.message());
            }
            return Next::Read;
        };
        let request = http::request(self.bytes.get(..len).unwrap_or_default());
        match request {
            Ok(http::Request::Connect(target)) => {
                self.dialect = Dialect::Http { tunnel: true };
                self.bytes.drain(..len);
                Next::Dial(target)
            }
            Ok(http::Request::Forward { target, head }) => {
                self.bytes.splice(..len, head);
                Next::Dial(target)
            }
            Err(answer) => refuse(out, &answer.message()),
        }
    }
}

fn refuse(out: &mut Vec<u8>, answer: &[u8]) -> Next {
    out.extend_from_slice(answer);
    Next::Close
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
