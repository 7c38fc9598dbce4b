//! Heads of HTTP proxy requests: CONNECT (RFC 9110, section 9.3.6) and requests in absolute form
//! (RFC 9112, section 3.2.2), rewritten for the server that they are for.
//!
//! Only heads are read: bodies flow as they are. That is right since every connection carries one
//! plain request: the server is told `Connection: close`, and its answer then tells the client,
//! which opens a connection of its own for the next request, whichever host that is for.

use std::borrow::Cow;

use agent::protocol::{DialError, Target};
use httparse::{EMPTY_HEADER, Header, Status};

use super::target;

/// More than any browser sends.
const MAX_HEADERS: usize = 128;

/// The answer to a CONNECT that succeeded.
pub const ESTABLISHED: &[u8] = b"HTTP/1.1 200 Connection established\r\n\r\n";

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// A tunnel.
    Connect(Target),
    /// One plain request.
    Forward {
        /// For whom.
        target: Target,
        /// Its head, as the server is to see it.
        head: Vec<u8>,
    },
}

/// An answer of the proxy's own in the place of the server's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    status: &'static str,
    text: Cow<'static, str>,
}

impl Answer {
    const fn new(status: &'static str, text: &'static str) -> Self {
        Self {
            status,
            text: Cow::Borrowed(text),
        }
    }

    /// The request is not one.
    pub const MALFORMED: Self = Self::new("400 Bad Request", "This is no HTTP request.");
    /// The head is longer than is read.
    pub const TOO_LARGE: Self = Self::new(
        "431 Request Header Fields Too Large",
        "The head of the request is too long.",
    );
    /// The client did not finish its request.
    pub const TOO_SLOW: Self = Self::new(
        "408 Request Timeout",
        "The head of the request did not arrive in time.",
    );
    const NOT_A_SERVER: Self = Self::new(
        "400 Bad Request",
        "This port is a proxy into a machine, not a web server: \
         set it as the SOCKS5 or HTTP proxy of a client.",
    );
    const NOT_HTTP: Self = Self::new(
        "400 Bad Request",
        "Only http:// is forwarded request by request; anything else goes through CONNECT.",
    );
    const NO_HOST: Self = Self::new(
        "400 Bad Request",
        "The request names no host and port that could be connected to.",
    );

    /// The whole message; the connection is closed after it.
    pub fn message(&self) -> Vec<u8> {
        // What a guest says is no reason for a browser to take it for a page.
        format!(
            "HTTP/1.1 {}\r\nContent-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\n\
             Cache-Control: no-store\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{}\n",
            self.status,
            self.text.len() + 1,
            self.text
        )
        .into_bytes()
    }
}

impl From<&DialError> for Answer {
    fn from(error: &DialError) -> Self {
        const BAD: &str = "502 Bad Gateway";
        match error {
            DialError::Refused => Self::new(BAD, "Nobody listens at that port in the machine."),
            DialError::Unreachable => Self::new(BAD, "The machine has no way to that host."),
            DialError::NoSuchHost => Self::new(BAD, "The machine knows no host of that name."),
            DialError::TimedOut => Self::new(
                "504 Gateway Timeout",
                "The host did not answer the machine in time.",
            ),
            DialError::Other(text) => {
                let printable = text.chars().filter(|c| !c.is_control());
                let text = printable.take(300).collect::<String>();
                Self {
                    status: BAD,
                    text: format!("The machine could not connect: {text}").into(),
                }
            }
        }
    }
}

/// The length of the head at the start of `bytes`, of which the first `seen` are known to end none.
pub fn head_len(bytes: &[u8], seen: usize) -> Option<usize> {
    // The end is an empty line: \n\n or \n\r\n, which may have begun in what was seen.
    let from = seen.saturating_sub(2);
    let fresh = bytes.get(from..)?;
    fresh
        .iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'\n')
        .find_map(|(at, _)| match fresh.get(at + 1..)? {
            [b'\n', ..] => Some(from + at + 2),
            [b'\r', b'\n', ..] => Some(from + at + 3),
            _ => None,
        })
}

/// Parses a whole head, from its first byte to its empty line.
pub fn request(head: &[u8]) -> Result<Request, Answer> {
    let mut headers = [EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    match parsed.parse(head) {
        Ok(Status::Complete(_)) => {}
        Ok(Status::Partial) => return Err(Answer::MALFORMED),
        Err(httparse::Error::TooManyHeaders) => return Err(Answer::TOO_LARGE),
        Err(_) => return Err(Answer::MALFORMED),
    }
    let (Some(method), Some(uri), Some(minor)) = (parsed.method, parsed.path, parsed.version)
    else {
        return Err(Answer::MALFORMED);
    };
    if method == "CONNECT" {
        return target::authority(uri, None)
            .map(Request::Connect)
            .ok_or(Answer::NO_HOST);
    }
    let (authority, path) = absolute(method, uri)?;
    let target = target::authority(authority, Some(80)).ok_or(Answer::NO_HOST)?;
    // The client's version stays: a client of HTTP/1.0 could not read an answer of HTTP/1.1.
    let mut out = format!("{method} {path} HTTP/1.{minor}\r\nHost: {authority}\r\n").into_bytes();
    put_headers(&mut out, parsed.headers);
    Ok(Request::Forward { target, head: out })
}

/// The authority of an absolute URI and what follows it, as the server is to see it.
fn absolute<'a>(method: &str, uri: &'a str) -> Result<(&'a str, Cow<'a, str>), Answer> {
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Err(Answer::NOT_A_SERVER);
    };
    if scheme.contains(['/', '?']) {
        return Err(Answer::NOT_A_SERVER);
    }
    if !scheme.eq_ignore_ascii_case("http") {
        return Err(Answer::NOT_HTTP);
    }
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let path = match path {
        "" if method == "OPTIONS" => "*".into(),
        path if path.starts_with('/') => path.into(),
        query => format!("/{query}").into(),
    };
    Ok((authority, path))
}

/// Writes the headers that go on to the server, and the end of the head.
///
/// There is no Via: the server is to see what it would see of a client beside it.
fn put_headers(out: &mut Vec<u8>, headers: &[Header<'_>]) {
    let listed: Vec<&str> = headers
        .iter()
        .filter(|header| header.name.eq_ignore_ascii_case("connection"))
        .filter_map(|header| std::str::from_utf8(header.value).ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .collect();
    let is_any = |name: &str, of: &[&str]| of.iter().any(|one| name.eq_ignore_ascii_case(one));
    for header in headers {
        // Without what frames the body the server would take it for a request.
        let frames = is_any(header.name, &["Content-Length", "Transfer-Encoding"]);
        if !frames && (is_any(header.name, HOP_BY_HOP) || is_any(header.name, &listed)) {
            continue;
        }
        out.extend_from_slice(header.name.as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(header.value);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"Connection: close\r\n\r\n");
}

/// What is between the client and the proxy only (RFC 9110, section 7.6.1), and Host, which is written anew.
/// Whoever wants another protocol than HTTP, a browser with a WebSocket say, asks for it through CONNECT.
const HOP_BY_HOP: &[&str] = &[
    "Connection",
    "Host",
    "Keep-Alive",
    "Proxy-Authenticate",
    "Proxy-Authorization",
    "Proxy-Connection",
    "TE",
    "Upgrade",
];
