//! Messages between host and agent, and their framing.
//!
//! Every vsock connection starts with one framed message. On a connection that the host opens to
//! [`AGENT_PORT`] it is an [`Open`]; on the one that the agent opens to [`HELLO_PORT`] of the host
//! it is a [`Hello`]. A byte stream ([`Open::Stream`]) is raw from there on, so that it can be
//! spliced with nothing in between, and so are [`Open::Dial`], [`Open::Attach`] and [`Open::MountStream`]; all
//! others stay framed.
//!
//! On raw connections an end that is closed before it was shut down for writing is a reset: it
//! stands for TCP's RST, hop by hop, and is passed on as one.
//!
//! A frame is its length (u32, little endian, at most [`MAX_FRAME`]) and that many bytes of postcard.

mod copy;
mod mount;

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use self::copy::{FromUnpack, Landing, Pack, Report, Unpack};
pub use self::mount::{
    AFTER_REPLIES, ATTRIBUTES, CALL_ANSWERED, CALL_ASKED, CALL_DONE, CALL_HEADER, CALL_PAGES,
    CALLS, ChangeKind, EMPTY, FromMount, HostChange, HostMemory, LIST, MAX_MOUNT_QUEUES, Mount,
    MountPoint, MountStream, Mounted, NEW, NewDirectory, PLACE, PLACED, PLACED_FROM,
    REQUEST_PLACED, SLOT_PAGES, ToMount, WINDOW, WINDOW_PAGE, WINDOW_SLOTS, for_agent, for_host,
};

/// Changes with every change of a message.
pub const VERSION: u32 = 6;

/// The vsock port on which the agent listens in the guest.
pub const AGENT_PORT: u32 = 1024;

/// The vsock port of the host (CID 2) to which the agent connects when it is ready.
pub const HELLO_PORT: u32 = 1024;

/// The longest frame: room for the 2 MiB of arguments and environment that Linux allows.
pub const MAX_FRAME: usize = 4 << 20;

/// What the agent says first, on a connection to [`HELLO_PORT`]; it is closed after this message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hello {
    /// The machine is up and [`AGENT_PORT`] is listening.
    Ready {
        /// [`VERSION`] of the agent.
        version: u32,
        /// CLOCK_BOOTTIME when the agent's first instruction ran, in nanoseconds: the kernel's share of the boot.
        agent_started_ns: u64,
        /// CLOCK_BOOTTIME when it was ready, in nanoseconds.
        agent_ready_ns: u64,
        /// `uname -r`.
        kernel_release: String,
    },
    /// The machine cannot be used; one sentence that says why.
    Failed(String),
}

/// The first message of a connection to [`AGENT_PORT`], at any time: the host makes some in advance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Open {
    /// Run a command; the connection goes on with [`ToSession`] and [`FromSession`].
    ///
    /// The command starts when all the streams that it needs have been opened: Terminal with
    /// a terminal, else Stdout, Stderr and (with `stdin`) Stdin.
    Exec(Exec),
    /// Becomes one stream of the session with this number; raw bytes follow.
    Stream {
        /// [`Exec::session`].
        session: u64,
        /// Which stream.
        kind: StreamKind,
    },
    /// End all processes (SIGTERM, then SIGKILL after `grace_ms`), sync, and power off. No answer: the machine ends.
    PowerOff {
        /// Milliseconds between SIGTERM and SIGKILL.
        grace_ms: u32,
    },
    /// Tells and sets CLOCK_REALTIME; the connection goes on with [`ShiftClock`], each answered with [`Clock`].
    Clock,
    /// Becomes a connection to something in the guest: raw bytes follow at once. Where the target
    /// cannot be reached the connection is reset.
    Dial(Target),
    /// Becomes the connection that the agent holds under this token ([`ToForwarder::Dial`],
    /// [`FromForwarder::Accepted`]): raw bytes follow at once. Reset where there is none.
    Attach {
        /// Names the connection; used once.
        token: u64,
    },
    /// Controls forwards; the connection goes on with [`ToForwarder`] and [`FromForwarder`]. When it
    /// ends, what it listened for and held is closed; connections that run go on.
    Forward,
    /// Carries datagrams; the connection goes on with [`Datagram`] both ways. When it ends, its
    /// flows end.
    Datagrams,
    /// Send what is at a path as an archive: [`ChunkWriter::end`](crate::archive::ChunkWriter::end)
    /// tells how that ended.
    Pack(Pack),
    /// Unpack the archive that follows in chunks; answered with [`FromUnpack`].
    Unpack(Unpack),
    /// Make these directories in the machine's root, those that are missing; answered with [`Done`].
    MakeDirectories(Vec<NewDirectory>),
    /// Tell the numbers of `NAME`, `UID`, `NAME:GROUP` or `UID:GID` in the machine's root; answered with
    /// [`Identified`].
    Identify {
        /// As in [`Exec::user`].
        user: String,
    },
    /// Mount a folder that the host serves; the connection goes on with [`ToMount`] and [`FromMount`].
    /// When it ends, the mount is taken away from whoever still uses it.
    Mount(Mount),
    /// Becomes one of a mount's connections: whole FUSE messages follow, each as long as its header says.
    MountStream {
        /// [`Mount::mount`].
        mount: u64,
        /// What it carries.
        kind: MountStream,
    },
}

/// Who somebody is in the guest, or one sentence that says why that is nobody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identified(pub Result<UserIds, String>);

/// A user of the guest in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserIds {
    /// The user's.
    pub uid: u32,
    /// Its group's.
    pub gid: u32,
}

/// Adds to the guest's CLOCK_REALTIME: a difference stays right however long the message takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShiftClock {
    /// Nanoseconds; 0 changes nothing.
    pub by_ns: i64,
}

/// The guest's CLOCK_REALTIME, once it is shifted: nanoseconds since 1970-01-01 UTC; or one sentence that says why
/// it was not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock(pub Result<u64, String>);

/// Something in the guest that takes connections or datagrams.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Target {
    /// This port of the guest's own loopback: 127.0.0.1, and ::1 where that refuses.
    Loopback(u16),
    /// A host by name or address, as the guest resolves and routes it. `localhost` is
    /// [`Target::Loopback`].
    Host {
        /// At most 255 bytes.
        host: String,
        /// Not 0.
        port: u16,
    },
    /// A stream socket at this absolute path of the machine's root.
    Unix(Vec<u8>),
}

/// From the host, on a connection that controls forwards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToForwarder {
    /// Report listening sockets from now on, or not any more: [`FromForwarder::Listeners`].
    Watch(bool),
    /// Connect to `target` and hold the connection until it is attached, or for 30 s; answered with
    /// [`FromForwarder::Dialed`]. Several may be under way at once.
    Dial {
        /// Chosen by the host at random, not in use.
        token: u64,
        /// Where to.
        target: Target,
    },
    /// Reset the connection held under this token, if there is one.
    Drop {
        /// Its token.
        token: u64,
    },
    /// Take connections in the guest; answered with [`FromForwarder::Bound`].
    Listen {
        /// Chosen by the host, not in use.
        id: u32,
        /// Where.
        at: Bind,
    },
    /// Take no more; connections that run go on. Not answered.
    Unlisten {
        /// That of [`ToForwarder::Listen`].
        id: u32,
    },
}

/// Where the agent listens for the host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Bind {
    /// A TCP port of this address; None is both loopback addresses. Port 0 is any free one.
    Tcp {
        /// The address.
        address: Option<std::net::IpAddr>,
        /// The port.
        port: u16,
    },
    /// A Unix socket at this absolute path of the machine's root, which everybody in the guest may use; a
    /// socket that nobody listens at is replaced, missing directories are made.
    Unix(Vec<u8>),
}

/// From the agent, on a connection that controls forwards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromForwarder {
    /// All listening TCP sockets of the machine's own network namespace, besides the agent's: sent when
    /// watching begins and after each change.
    Listeners(Vec<Listener>),
    /// How a [`ToForwarder::Dial`] ended.
    Dialed {
        /// Its token.
        token: u64,
        /// Whether the connection is held.
        result: Result<(), DialError>,
    },
    /// How a [`ToForwarder::Listen`] ended.
    Bound {
        /// Its number.
        id: u32,
        /// The port (0 for a path), or one sentence that says why not.
        result: Result<u16, String>,
    },
    /// Somebody in the guest connected; held until attached or dropped, or for 30 s.
    Accepted {
        /// What it connected to.
        id: u32,
        /// Names the connection; chosen by the agent, never one of the host's.
        token: u64,
    },
}

/// A listening TCP socket of the guest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Listener {
    /// Its port.
    pub port: u16,
    /// The address it is bound to.
    pub address: std::net::IpAddr,
    /// The user it belongs to.
    pub uid: u32,
}

/// Why the guest could not connect to a target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DialError {
    /// Nobody listens there.
    Refused,
    /// There is no way there.
    Unreachable,
    /// No answer in 10 s.
    TimedOut,
    /// The guest knows no such name.
    NoSuchHost,
    /// Anything else; one sentence.
    Other(String),
}

/// One datagram, or the end of its flow. A flow is a socket in the guest and has one peer on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Datagram {
    /// To the guest: send this from the socket of `flow`, which is made where it is new.
    Send {
        /// Chosen by the host.
        flow: u32,
        /// Where to: not [`Target::Unix`].
        to: Target,
        /// At most 65,507 bytes.
        payload: Vec<u8>,
    },
    /// From the guest: this arrived at the socket of `flow`.
    Received {
        /// That of [`Datagram::Send`].
        flow: u32,
        /// Who sent it.
        from: std::net::SocketAddr,
        /// At most 65,507 bytes.
        payload: Vec<u8>,
    },
    /// Either way: the flow is over, and its number free.
    Closed {
        /// Its number.
        flow: u32,
    },
}

/// The answer to a request that has no other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done(pub Result<(), String>);

/// One of a session's byte streams, seen from the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StreamKind {
    /// Host to guest; the host's half-close is the command's end of file.
    Stdin,
    /// Guest to host.
    Stdout,
    /// Guest to host.
    Stderr,
    /// Both ways: the master side of the session's pty.
    Terminal,
}

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// A random number that ties the session's streams to it.
    pub session: u64,
    /// Program and arguments; the program is looked up in the PATH of `env` where it has no slash.
    /// Empty: the user's login shell, interactive. Bytes, as Linux takes any.
    pub argv: Vec<Vec<u8>>,
    /// Set over the base environment (PATH, HOME, USER, LOGNAME, SHELL, and TERM with a terminal).
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Start with an empty environment rather than the base one.
    pub clear_env: bool,
    /// Absolute working directory; None is the user's home, or `/` where that is missing.
    pub cwd: Option<Vec<u8>>,
    /// Where `cwd` cannot be entered, take what None stands for instead.
    pub cwd_or_home: bool,
    /// `NAME`, `UID`, `NAME:GROUP` or `UID:GID`; None is root.
    pub user: Option<String>,
    /// Run on a new pty of this size, as its session leader.
    pub terminal: Option<WindowSize>,
    /// Whether a Stdin stream will be opened; else the command reads `/dev/null`.
    pub stdin: bool,
    /// Resolve everything in the filesystem the agent was started in rather than in the machine's root.
    pub in_initramfs: bool,
}

/// The size of a terminal in character cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// From the host, on a session's connection. Its end (EOF) hangs up: SIGHUP and SIGTERM to
/// the command's process group, SIGKILL 10 s later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSession {
    /// Send this signal to the command's process group (the terminal's foreground group, where it has one).
    Signal(i32),
    /// The terminal has a new size.
    Resize(WindowSize),
}

/// From the agent, on a session's connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromSession {
    /// The command runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// The command could not be started; nothing follows.
    Refused {
        /// What kind of failure, for the exit code.
        reason: Refusal,
        /// One sentence.
        message: String,
    },
    /// The command ended; its output streams end after what it had written.
    Exited(ExitStatus),
}

/// Why a command could not be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// No such program: exit code 127.
    NotFound,
    /// It is there and cannot be executed: exit code 126.
    NotExecutable,
    /// Anything else (user, working directory, memory): exit code 125.
    Other,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited with this code.
    Code(i32),
    /// A signal killed it.
    Signal(i32),
}

impl ExitStatus {
    /// The exit code a shell would report: the code itself, or 128 + the signal.
    pub fn shell_code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// Writes one framed message with a single `write` of the whole frame.
///
/// Fails with InvalidInput where the message is longer than [`MAX_FRAME`].
pub fn send<T: Serialize>(mut to: impl Write, message: &T) -> io::Result<()> {
    let mut frame = vec![0u8; 4];
    frame = postcard::to_extend(message, frame).map_err(io::Error::other)?;
    let len = frame.len() - 4;
    if len > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message of {len} bytes is longer than {MAX_FRAME}"),
        ));
    }
    frame[..4].copy_from_slice(&(len as u32).to_le_bytes());
    to.write_all(&frame)?;
    to.flush()
}

/// Reads one framed message; None at a clean end before its first byte.
///
/// Fails with InvalidData on a frame that is too long or is not a `T`, and with UnexpectedEof
/// on half a frame. Memory grows with the bytes that arrive, not with the length announced.
pub fn receive<T: DeserializeOwned>(mut from: impl Read) -> io::Result<Option<T>> {
    let mut len = [0u8; 4];
    let mut have = 0;
    while have < 4 {
        match from.read(&mut len[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => have += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame announces {len} bytes, more than {MAX_FRAME}"),
        ));
    }
    let mut body = Vec::with_capacity(len.min(64 << 10));
    from.take(len as u64).read_to_end(&mut body)?;
    if body.len() < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    postcard::from_bytes(&body)
        .map(Some)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_as_they_were_sent() {
        let sent = Open::Stream {
            session: 7,
            kind: StreamKind::Stdout,
        };
        let mut wire = Vec::new();
        send(&mut wire, &sent).unwrap();
        send(&mut wire, &sent).unwrap();
        let mut from = wire.as_slice();
        assert_eq!(receive::<Open>(&mut from).unwrap(), Some(sent.clone()));
        assert_eq!(receive::<Open>(&mut from).unwrap(), Some(sent));
        assert_eq!(receive::<Open>(&mut from).unwrap(), None);
    }

    #[test]
    fn half_a_frame_and_an_endless_frame_are_errors() {
        let mut wire = Vec::new();
        send(&mut wire, &Open::PowerOff { grace_ms: 1000 }).unwrap();
        for cut in 1..wire.len() {
            let error = receive::<Open>(&wire[..cut]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "cut at {cut}");
        }
        let error = receive::<Open>(&[0xff; 64][..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
