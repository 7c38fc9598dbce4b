//! What the mvm on the host and the runner in the outer Linux, which owns the machine's VMM, say to
//! each other.
//!
//! Requests come on the runner's standard input, everything else goes out on its standard output, both
//! framed as in [`agent::protocol`]. Streams to the guest are vsock connections from the host to
//! [`Up::agent_port`] of the outer Linux, or to [`Up::port`], each beginning with one framed [`Relay`]. Both
//! ends are always of one build.

use agent::protocol::Hello;
use serde::{Deserialize, Serialize};
use vmm::Stats;

use super::{Ended, SetUp};

/// To the runner. Each request but [`ToRunner::Stop`] is answered, in order, with [`FromRunner::Done`]
/// where nothing else is said.
/// The end of the input stops the machine.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToRunner {
    /// Let the vCPUs run.
    Resume,
    /// Take the vCPUs out of the guest.
    Pause,
    /// Tell what the machine has used; answered with [`FromRunner::Stats`].
    Stats,
    /// End the machine now.
    Stop,
}

/// From the runner.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromRunner {
    /// The machine was made; the first message, unless it is [`FromRunner::Failed`].
    Up(Up),
    /// The machine could not be made; the last message. One sentence.
    Failed(String),
    /// The guest's agent reported.
    Hello(Hello),
    /// The guest connects to this port of the host (`--vsock-uds`), under a number of its own: answered with
    /// [`Relay::Accept`] or [`Relay::Refuse`].
    Asked {
        /// The host's port.
        port: u32,
        /// Names the connection; used once.
        number: u64,
    },
    /// The serial console printed this.
    Console(Vec<u8>),
    /// A request was carried out, or why not.
    Done(Result<(), String>),
    /// The answer to [`ToRunner::Stats`].
    Stats(Stats),
    /// The machine ended; the last message.
    Ended(Ended),
}

/// A machine that was made.
#[derive(Debug, Serialize, Deserialize)]
pub struct Up {
    /// The vsock port of the outer Linux at which the runner takes [`Relay`] connections from the host.
    pub port: u32,
    /// The one whose connections are the host's to the guest's agent: raw bytes from the first on, and reset
    /// where the guest refuses.
    pub agent_port: u32,
    /// Where the time went.
    pub set_up: SetUp,
    /// Whether it has a disk that its guest may write to.
    pub writes: bool,
}

/// What a connection to [`Up::port`] is to be.
#[derive(Debug, Serialize, Deserialize)]
pub enum Relay {
    /// A connection to this vsock port of the guest: raw bytes follow. Reset where the guest refuses.
    Dial(u32),
    /// The same, after a line `OK <port of the host>` to whoever connected.
    DialWithLine(u32),
    /// Input for the serial console: raw bytes follow.
    ConsoleInput,
    /// The connection with this number ([`FromRunner::Asked`]): raw bytes follow. Reset where it waits no
    /// more.
    Accept(u64),
    /// The connection with this number is refused; nothing follows.
    Refuse(u64),
}
