//! The messages of a machine's control socket. `docs/control.md` is their description for others.
//!
//! A message is its length (u32, little endian, at most [`MAX_FRAME`]) and that many bytes of JSON. The client
//! sends a [`Request`] and reads one [`Reply`]; then it may send another one, unless the request was
//! [`Op::Connect`] and succeeded: the connection belongs to the guest from then on.
//!
//! [`VERSION`] changes only where something that was understood would be misunderstood: new operations and new
//! fields come without a new number, an operation that a server does not know gets [`ErrorKind::UnknownOp`], and
//! fields that a reader does not know are skipped.

mod inspection;

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::store::{Bytes, Ending, Name};

pub use self::inspection::{Disk, Inspection, Mount};

/// The version of this protocol.
pub const VERSION: u32 = 1;

/// The longest message, in bytes.
pub const MAX_FRAME: usize = 1 << 20;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// What to do.
    #[serde(flatten)]
    pub op: Op,
}

impl From<Op> for Request {
    fn from(op: Op) -> Self {
        Self {
            version: VERSION,
            op,
        }
    }
}

/// The operations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Op {
    /// Answered with [`Answer::Inspection`].
    Inspect,
    /// Answered with [`Answer::Stats`].
    Stats,
    /// End the machine in an orderly way, by force after `timeout` seconds. Answered with [`Answer::Ended`] when
    /// it has ended.
    Stop {
        /// In seconds.
        timeout: u32,
    },
    /// Send a signal to the machine's command; SIGKILL ends the machine itself. Answered with [`Answer::Done`].
    Kill {
        /// Its number on Linux.
        signal: i32,
    },
    /// Stop the machine's CPUs. Answered with [`Answer::Done`] when they stand still.
    Pause,
    /// Let them go on, and set the guest's clock. Answered with [`Answer::Done`].
    Resume,
    /// Give the machine another name. Answered with [`Answer::Done`].
    Rename {
        /// The name.
        to: Name,
    },
    /// Answered with [`Answer::Ended`] when the machine has ended.
    Wait,
    /// Answered with [`Answer::Connected`]; then the connection is one to this vsock port of the guest, or is
    /// closed where the guest refuses.
    Connect {
        /// The port.
        port: u32,
    },
    /// Publish ports of the guest on the host. Answered with [`Answer::Forwards`]: those that were added.
    PortAdd {
        /// In the syntax of `-p`, with paths of the host made absolute.
        publish: Vec<Bytes>,
    },
    /// Publish them no longer. Answered with [`Answer::Forwards`]: those that were removed.
    PortRm {
        /// In the syntax of `-p`, or its host side alone.
        publish: Vec<Bytes>,
        /// Whether connections that run are reset too.
        #[serde(default)]
        reset: bool,
    },
    /// Answered with [`Answer::Forwards`]: all, either way.
    PortLs,
    /// Publish ports as programs in the guest begin to listen. Answered with [`Answer::Auto`].
    PortAuto {
        /// Whether to; None leaves it as it is.
        #[serde(default)]
        on: Option<bool>,
        /// Ports that are left alone; None leaves the list as it is.
        #[serde(default)]
        exclude: Option<Vec<u16>>,
    },
    /// Offer services of the host in the guest. Answered with [`Answer::Forwards`]: those that were added.
    ReverseAdd {
        /// In the syntax of `-R`, with paths of the host made absolute.
        reverse: Vec<Bytes>,
    },
    /// Offer them no longer. Answered with [`Answer::Forwards`]: those that were removed.
    ReverseRm {
        /// In the syntax of `-R`, or its guest side alone.
        reverse: Vec<Bytes>,
    },
    /// Share folders with the guest. Answered with [`Answer::Mounts`]: those that were added.
    MountAdd {
        /// In the syntax of `-v`, with paths of the host made absolute.
        mounts: Vec<Bytes>,
    },
    /// Share them no longer. Answered with [`Answer::Mounts`]: those that were removed.
    MountRm {
        /// Where the guest has them.
        guest: Vec<Bytes>,
        /// Whether they are taken away from programs that use them.
        #[serde(default)]
        force: bool,
    },
    /// Answered with [`Answer::Mounts`]: all.
    MountLs,
    /// Where the caller's SSH agent is, for those that use it in the guest from now on. Answered with
    /// [`Answer::Done`].
    SshAgent {
        /// A Unix socket's absolute path; None is no agent.
        path: Option<Bytes>,
    },
}

/// What a server answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// [`VERSION`] of the server.
    pub version: u32,
    /// How it went.
    #[serde(flatten)]
    pub outcome: Outcome,
}

impl From<Result<Answer, ControlError>> for Reply {
    fn from(result: Result<Answer, ControlError>) -> Self {
        Self {
            version: VERSION,
            outcome: match result {
                Ok(answer) => Outcome::Ok(answer),
                Err(error) => Outcome::Error(error),
            },
        }
    }
}

/// How a request went: `{"ok": …}` or `{"error": …}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was done.
    Ok(Answer),
    /// It was not.
    Error(ControlError),
}

/// What comes of an operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// There is nothing to tell.
    Done,
    /// Of [`Op::Inspect`].
    Inspection(Box<Inspection>),
    /// Of [`Op::Stats`].
    Stats(Box<Stats>),
    /// Of [`Op::Stop`] and [`Op::Wait`].
    Ended(Ending),
    /// Of [`Op::Connect`].
    Connected {
        /// The version of the agent's protocol (`agent/src/protocol.rs`).
        agent: u32,
    },
    /// Of the operations on forwards.
    Forwards(Vec<Forward>),
    /// Of the operations on folders.
    Mounts(Vec<Mount>),
    /// Of [`Op::PortAuto`].
    Auto {
        /// Whether ports are published as they appear.
        on: bool,
        /// Those that are not.
        exclude: Vec<u16>,
    },
}

/// Why an operation was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    /// What kind of failure.
    pub kind: ErrorKind,
    /// One sentence.
    pub message: String,
}

impl ControlError {
    /// An operation that failed, with one sentence that says why.
    pub fn failed(message: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::Failed,
            message: message.into(),
        }
    }
}

impl From<anyhow::Error> for ControlError {
    fn from(error: anyhow::Error) -> Self {
        Self::failed(format!("{error:#}"))
    }
}

/// The kinds of failure that a program may want to tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request is of a version that the server does not speak.
    Version,
    /// The server does not know the operation, or it lacks something.
    UnknownOp,
    /// What was sent is no message; the server closes the connection.
    Malformed,
    /// The server has as many connections as it serves; it closes the connection.
    Busy,
    /// It was tried and failed, or does not apply to the machine as it is.
    Failed,
    /// A kind that this reader does not know.
    #[serde(other)]
    Other,
}

/// What a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its guest is not up yet.
    Starting,
    /// It runs.
    Running,
    /// It is paused.
    Paused,
    /// It was asked to end.
    Stopping,
    /// One that this reader does not know.
    #[serde(other)]
    Other,
}

/// A forward of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// Which way connections are made.
    pub direction: Direction,
    /// `tcp`, `udp` or `unix`.
    pub protocol: String,
    /// The end on the host, such as `127.0.0.1:8080` or a path.
    pub host: Bytes,
    /// The end in the guest, such as `8000` or a path.
    pub guest: Bytes,
    /// Whether it appeared by itself.
    #[serde(default)]
    pub auto: bool,
    /// Connections that run over it.
    #[serde(default)]
    pub connections: u64,
}

/// Which way a forward's connections are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// `-p`: from the host into the guest.
    ToGuest,
    /// `-R`: from the guest to the host.
    ToHost,
}

/// What a machine has used since it was started. All counters only grow.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// When this was read: nanoseconds of the host's monotonic clock.
    pub at_ns: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Time that the virtual CPUs ran, together, in nanoseconds.
    pub cpu_ns: u64,
    /// Bytes of memory the guest may use.
    pub memory: u64,
    /// Bytes of it that the host has given.
    pub memory_resident: u64,
    /// What its disks did, in the order of [`Inspection::disks`].
    #[serde(default)]
    pub disks: Vec<DiskStats>,
    /// What its network cards did.
    #[serde(default)]
    pub nets: Vec<NetStats>,
    /// What its vsock connections carried.
    #[serde(default)]
    pub vsock: VsockStats,
    /// Forwarded connections so far.
    #[serde(default)]
    pub forwarded_total: u64,
}

/// What a disk did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStats {
    /// How it is called.
    pub name: String,
    /// Requests.
    pub reads: u64,
    /// Requests.
    pub writes: u64,
    /// Bytes.
    pub read_bytes: u64,
    /// Bytes.
    pub written_bytes: u64,
}

/// What a network card did, seen from the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStats {
    /// How it is called.
    pub name: String,
    /// Bytes.
    pub received_bytes: u64,
    /// Frames.
    pub received_packets: u64,
    /// Bytes.
    pub sent_bytes: u64,
    /// Frames.
    pub sent_packets: u64,
}

/// What the vsock device did, seen from the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockStats {
    /// Connections that run.
    pub connections: u64,
    /// Bytes.
    pub received_bytes: u64,
    /// Bytes.
    pub sent_bytes: u64,
}

/// The whole message with its length before it.
///
/// Fails with InvalidInput where it is longer than [`MAX_FRAME`].
pub fn frame(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut frame = vec![0u8; 4];
    serde_json::to_writer(&mut frame, message)?;
    let len = frame.len() - 4;
    if len > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message of {len} bytes is longer than {MAX_FRAME}"),
        ));
    }
    frame[..4].copy_from_slice(&(len as u32).to_le_bytes());
    Ok(frame)
}

/// Writes one message.
pub fn send(mut to: impl Write, message: &impl Serialize) -> io::Result<()> {
    to.write_all(&frame(message)?)?;
    to.flush()
}

/// Reads one message, and not a byte more; None at a clean end before its first byte.
///
/// Fails with InvalidData on one that is too long or is not a `T`, and with UnexpectedEof on half of one.
pub fn receive<T: DeserializeOwned>(mut from: impl Read) -> io::Result<Option<T>> {
    let mut prefix = [0u8; 4];
    let mut have = 0;
    while let Some(rest) = prefix.get_mut(have..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => have += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let body = read_body(prefix, from)?;
    serde_json::from_slice(&body)
        .map(Some)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Reads what follows the length `prefix`. Memory grows with the bytes that arrive, not with those announced.
pub fn read_body(prefix: [u8; 4], from: impl Read) -> io::Result<Vec<u8>> {
    let len = u32::from_le_bytes(prefix) as usize;
    if len > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message announces {len} bytes, more than {MAX_FRAME}"),
        ));
    }
    let mut body = Vec::with_capacity(len.min(16 << 10));
    from.take(len as u64).read_to_end(&mut body)?;
    if body.len() < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(body)
}
