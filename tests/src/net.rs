//! The host's end of connections: clients and servers that wait for a bounded time, and the contents
//! that both ends can check.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, setrlimit};

use crate::host::{LIMIT, eventually, tool_command};
use crate::process::{Output, Running};

/// A port that nothing listens at, as far as can be known.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("there is a free port");
    listener.local_addr().expect("a listener has a port").port()
}

/// Connects to a port of this host.
pub fn connect(port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Connects to a port of this host as soon as somebody listens there.
#[track_caller]
pub fn connect_eventually(port: u16) -> TcpStream {
    eventually("somebody listens", || connect(port).ok())
}

/// Sends `bytes`, which must come back, and reads to the end.
pub fn exchange(mut stream: TcpStream, bytes: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(bytes)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// Whether connections to `port` are refused, rather than taken and closed.
pub fn is_refused(port: u16) -> bool {
    connect(port).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// curl with these words, bounded, and silent but for errors.
pub fn curl(words: &[&str]) -> Output {
    let mut command: Command = tool_command("curl", "curl");
    let limit = LIMIT.as_secs().to_string();
    command
        .args(["-sS", "--fail", "--max-time", &limit])
        .args(words);
    for name in [
        "http_proxy",
        "all_proxy",
        "no_proxy",
        "ALL_PROXY",
        "NO_PROXY",
    ] {
        command.env_remove(name);
    }
    Running::start(command, Vec::new()).wait()
}

/// Allows this process as many descriptors as it may have; how many that are.
pub fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(1 << 20);
    let raised = Rlimit {
        current: Some(most),
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).expect("a limit can be raised to its maximum");
    most
}

/// Bytes of memory that a process holds.
pub fn resident(pid: Pid) -> u64 {
    let path = format!("/proc/{}/status", pid.as_raw_pid());
    let status = fs::read_to_string(&path).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.expect("a process has memory") << 10
}

/// How many descriptors a process has open.
pub fn descriptors(pid: Pid) -> usize {
    let dir = format!("/proc/{}/fd", pid.as_raw_pid());
    fs::read_dir(dir).expect("the process runs").count()
}

/// The time for which a process ran on any CPU.
pub fn cpu_time(pid: Pid) -> Duration {
    let path = format!("/proc/{}/stat", pid.as_raw_pid());
    let stat = fs::read_to_string(path).expect("the process runs");
    // The second field is the program in parentheses, and may have spaces.
    let (_, fields) = stat.rsplit_once(')').expect("a stat has a name");
    let ticks: u64 = fields
        .split_ascii_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

/// A digest of a byte stream that costs a few instructions a word, for streams that are emulated. Order,
/// loss and change of any byte show.
#[derive(Debug, Clone, Copy)]
pub struct Digest {
    state: u64,
    len: u64,
    partial: [u8; 8],
}

impl Default for Digest {
    fn default() -> Self {
        Self {
            state: 0xcbf2_9ce4_8422_2325,
            len: 0,
            partial: [0; 8],
        }
    }
}

impl Digest {
    /// Takes more of the stream.
    pub fn update(&mut self, mut bytes: &[u8]) {
        let have = (self.len % 8) as usize;
        self.len += bytes.len() as u64;
        if have > 0 {
            let (first, rest) = bytes.split_at(bytes.len().min(8 - have));
            self.partial[have..have + first.len()].copy_from_slice(first);
            bytes = rest;
            if have + first.len() < 8 {
                return;
            }
            self.mix(u64::from_le_bytes(self.partial));
        }
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.mix(u64::from_le_bytes(*word));
        }
        self.partial[..rest.len()].copy_from_slice(rest);
    }

    fn mix(&mut self, word: u64) {
        self.state = (self.state.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    /// The length and the digest, as a line.
    pub fn line(&self) -> String {
        let mut last = *self;
        let have = (self.len % 8) as usize;
        last.partial[have..].fill(0);
        last.mix(u64::from_le_bytes(last.partial));
        format!("{} {:016x}\n", self.len, last.state)
    }
}

/// Bytes that look like chance and can be made again on the other end: a xorshift sequence.
#[derive(Debug)]
pub struct Pattern(u64);

impl Default for Pattern {
    fn default() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }
}

impl Pattern {
    /// Fills `buffer` with what comes next. Its length has to be a multiple of 8 in all calls but the last.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Writes `len` bytes of the pattern to `to`.
pub fn write_pattern(mut to: impl Write, len: u64) -> io::Result<Digest> {
    let mut digest = Digest::default();
    let mut pattern = Pattern::default();
    let mut buffer = vec![0; 256 << 10];
    let mut left = len;
    while left > 0 {
        let now = (buffer.len() as u64).min(left) as usize;
        pattern.fill(&mut buffer[..now]);
        digest.update(&buffer[..now]);
        to.write_all(&buffer[..now])?;
        left -= now as u64;
    }
    Ok(digest)
}

/// Reads to the end.
pub fn read_digest(mut from: impl Read) -> io::Result<Digest> {
    let mut digest = Digest::default();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(digest),
            Ok(len) => digest.update(&buffer[..len]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_does_not_depend_on_how_a_stream_is_cut() {
        let mut sent = Vec::new();
        let whole = write_pattern(&mut sent, 100_003).unwrap();
        for cut in [1, 3, 7, 8, 9, 4096] {
            let mut digest = Digest::default();
            sent.chunks(cut).for_each(|chunk| digest.update(chunk));
            assert_eq!(digest.line(), whole.line(), "in pieces of {cut}");
        }
        sent.swap(5000, 50_000);
        assert_ne!(read_digest(sent.as_slice()).unwrap().line(), whole.line());
    }
}
