//! The tests' own program for guests: servers whose every behaviour a test can ask for, static, so that
//! any root can run it.
//!
//! ```text
//! peer MODE ADDRESS:PORT | vsock:PORT | unix:PATH
//! peer ask ADDRESS:PORT | vsock-host:PORT | unix:PATH QUESTION
//! peer inotify DIR…
//! peer files
//! peer SECONDS
//! ```
//!
//! It says `listening` when it listens, or watches. One thread a connection, but for `echo`, which is made for many.

use std::env;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::net::sockopt::set_socket_linger;
use tests::net::{read_digest, write_pattern};
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

#[path = "peer/echo.rs"]
mod echo;
#[path = "peer/files.rs"]
mod files;
#[path = "peer/inotify.rs"]
mod inotify;

/// What a static page is about as long as, in bytes.
const PAGE: usize = 1024;

/// What is read or written at once where only speed counts, in bytes.
const BLOCK: usize = 256 << 10;

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["clock"] => clock(),
        ["files"] => files::serve(),
        ["inotify", ref dirs @ ..] => inotify::watch(dirs),
        ["echo", at] if at.starts_with("vsock:") => serve(at, echo_one),
        ["echo", at] => echo::serve(at),
        ["discard", at] => serve(at, discard),
        ["pour", at] => serve(at, pour),
        ["udp-echo", at] => udp_echo(at),
        ["http", at] => serve(at, http),
        ["sink", at] => serve(at, sink),
        ["source", at] => serve(at, source),
        ["early", at] => serve(at, early),
        ["reset", at] => serve(at, reset),
        ["watch", at] => serve(at, watch),
        ["ask", at, question] => ask(at, question),
        ["relay", at, to] => {
            let to = to.to_owned();
            serve(at, move |stream| relay(stream, &to))
        }
        [seconds] => sleep(seconds),
        _ => Err(io::Error::other(format!("what is {words:?}?"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peer: {error}");
            ExitCode::FAILURE
        }
    }
}

fn say(line: &str) {
    // Whoever does not listen any more does not need to know.
    let _ = writeln!(io::stdout(), "{line}").and_then(|()| io::stdout().flush());
}

/// A connection of any kind.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Vsock(VsockStream),
}

impl Stream {
    fn end_writing(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
            Self::Vsock(stream) => stream.shutdown(Shutdown::Write),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).read(buffer),
            Stream::Unix(stream) => (&mut &*stream).read(buffer),
            Stream::Vsock(stream) => (&mut &*stream).read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).write(bytes),
            Stream::Unix(stream) => (&mut &*stream).write(bytes),
            Stream::Vsock(stream) => (&mut &*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Listens, and runs `handler` for each connection.
fn serve(
    at: &str,
    handler: impl Fn(Stream) -> io::Result<()> + Clone + Send + 'static,
) -> io::Result<()> {
    let handle = |stream: Stream| {
        let handler = handler.clone();
        thread::spawn(move || {
            if let Err(error) = handler(stream) {
                say(&format!("failed {:?}", error.kind()));
            }
        });
    };
    match at.split_once(':') {
        Some(("vsock", port)) => {
            let port = port.parse().map_err(io::Error::other)?;
            let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
            say("listening");
            loop {
                handle(Stream::Vsock(listener.accept()?.0));
            }
        }
        Some(("unix", path)) => {
            let listener = UnixListener::bind(path)?;
            say("listening");
            loop {
                handle(Stream::Unix(listener.accept()?.0));
            }
        }
        _ => {
            let listener = TcpListener::bind(at)?;
            say("listening");
            loop {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                handle(Stream::Tcp(stream));
            }
        }
    }
}

/// What `sleep` does, whatever this file is named: busybox goes by its name, and ends at once as a copy.
fn sleep(seconds: &str) -> io::Result<()> {
    thread::sleep(Duration::from_secs(
        seconds.parse().map_err(io::Error::other)?,
    ));
    Ok(())
}

/// Answers each line with the time: nanoseconds since 1970.
fn clock() -> io::Result<()> {
    say("listening");
    for line in io::stdin().lines() {
        line?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        say(&now.map_err(io::Error::other)?.as_nanos().to_string());
    }
    Ok(())
}

/// A client: sends the question, and says what comes back.
fn ask(at: &str, question: &str) -> io::Result<()> {
    let stream = match at.strip_prefix("unix:") {
        Some(path) => Stream::Unix(UnixStream::connect(path)?),
        None => match at.strip_prefix("vsock-host:") {
            Some(port) => {
                let port = port.parse().map_err(io::Error::other)?;
                let stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port)?;
                Stream::Vsock(stream)
            }
            None => Stream::Tcp(TcpStream::connect(at)?),
        },
    };
    (&stream).write_all(question.as_bytes())?;
    stream.end_writing()?;
    let answer = io::read_to_string(&stream)?;
    say(&answer);
    Ok(())
}

/// Reads to the end, and answers with the digest of it.
fn sink(stream: Stream) -> io::Result<()> {
    let digest = read_digest(&stream)?;
    (&stream).write_all(digest.line().as_bytes())?;
    stream.end_writing()
}

/// Reads a number, and answers with so many bytes of the pattern.
fn source(stream: Stream) -> io::Result<()> {
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    let len = line.trim().parse().map_err(io::Error::other)?;
    write_pattern(&stream, len)?;
    stream.end_writing()?;
    // Closed only when the other end is: what is on its way must not be cut short.
    io::copy(&mut &stream, &mut io::sink()).map(drop)
}

/// Reads to the end, and answers with how many bytes came: as little work as there can be.
fn discard(stream: Stream) -> io::Result<()> {
    let mut buffer = vec![0; BLOCK];
    let mut count = 0;
    loop {
        match (&stream).read(&mut buffer)? {
            0 => break,
            len => count += len as u64,
        }
    }
    (&stream).write_all(format!("{count}\n").as_bytes())?;
    stream.end_writing()
}

/// Writes until nobody reads any more: as little work as there can be.
fn pour(stream: Stream) -> io::Result<()> {
    let buffer = vec![0x55; BLOCK];
    loop {
        if let Err(error) = (&stream).write_all(&buffer) {
            return match error.kind() {
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Ok(()),
                _ => Err(error),
            };
        }
    }
}

fn echo_one(stream: Stream) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        match (&stream).read(&mut buffer)? {
            0 => return stream.end_writing(),
            len => (&stream).write_all(&buffer[..len])?,
        }
    }
}

/// Ends its own direction first, then reads the other to its end and says how much came.
fn early(stream: Stream) -> io::Result<()> {
    (&stream).write_all(b"early\n")?;
    stream.end_writing()?;
    let len = io::copy(&mut &stream, &mut io::sink())?;
    say(&format!("read {len}"));
    Ok(())
}

/// Reads a byte, and resets the connection.
fn reset(stream: Stream) -> io::Result<()> {
    (&stream).read_exact(&mut [0])?;
    if let Stream::Tcp(stream) = &stream {
        set_socket_linger(stream, Some(Duration::ZERO))?;
    }
    drop(stream);
    Ok(())
}

/// Says how the connection ended.
fn watch(stream: Stream) -> io::Result<()> {
    (&stream).write_all(b"!")?;
    io::copy(&mut &stream, &mut io::sink())?;
    say("ended");
    Ok(())
}

/// A hop of its own: everything goes on to `to`.
fn relay(stream: Stream, to: &str) -> io::Result<()> {
    let onward = TcpStream::connect(to)?;
    let Stream::Tcp(near) = stream else {
        return Err(io::Error::other("a relay is for TCP"));
    };
    let (mut from, mut into) = (onward.try_clone()?, near.try_clone()?);
    let back = thread::spawn(move || {
        io::copy(&mut from, &mut into).and_then(|_| into.shutdown(Shutdown::Write))
    });
    io::copy(&mut &near, &mut &onward)?;
    onward.shutdown(Shutdown::Write)?;
    back.join().map_err(|_| io::Error::other("a panic"))?
}

/// Answers every request with the same page, and keeps the connection where the client wants that.
fn http(stream: Stream) -> io::Result<()> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {PAGE}\r\n\r\n");
    let mut answer = head.into_bytes();
    answer.resize(answer.len() + PAGE, b'x');
    let mut requests = BufReader::new(&stream);
    let mut line = String::new();
    loop {
        let mut keep = true;
        loop {
            line.clear();
            if requests.read_line(&mut line)? == 0 {
                return Ok(());
            }
            keep &= !line.eq_ignore_ascii_case("connection: close\r\n");
            if line.trim_end().is_empty() {
                break;
            }
        }
        (&stream).write_all(&answer)?;
        if !keep {
            return stream.end_writing();
        }
    }
}

fn udp_echo(at: &str) -> io::Result<()> {
    let socket = UdpSocket::bind(at)?;
    say("listening");
    let mut buffer = vec![0; 65_536];
    loop {
        let (len, from) = socket.recv_from(&mut buffer)?;
        // A sender that has gone is no reason to end.
        let _ = socket.send_to(&buffer[..len], from);
    }
}
