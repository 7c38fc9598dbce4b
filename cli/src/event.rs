//! What the main thread of a running command waits for: one channel, one loop.
//!
//! Every thread of the command line (signals, session, output, machine) ends in a sender of
//! [`Event`], so that the order of things is decided in one place.

use std::io;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Duration;

use agent::protocol::{FromSession, Hello};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

use crate::folder::FolderError;
use crate::instance::Ended;

/// Something happened.
#[derive(Debug)]
pub enum Event {
    /// mvm got this signal.
    Signal(i32),
    /// The agent reported.
    Hello(Hello),
    /// The declared folders are mounted in the guest, or cannot be.
    Folders(Result<(), FolderError>),
    /// The session's agent end said something; None when it is gone.
    Session(Option<FromSession>),
    /// One of the session's output streams ended and all of it was written.
    OutputDone,
    /// The control socket asks for an orderly end, by force after this time.
    Stop(Duration),
    /// The control socket asks for this signal to the command, or with SIGKILL for the machine's end.
    Kill(i32),
    /// The guest has lost the root that it had from the host.
    RootGone,
    /// The machine ended.
    Machine(Ended),
}

/// Turns the signals that concern a running command into events, for the rest of the process.
///
/// To be called before anything is started that has to be cleaned up.
pub fn watch_signals(events: Sender<Event>) -> io::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH])?;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if events.send(Event::Signal(signal)).is_err() {
                    break;
                }
            }
        })?;
    Ok(())
}
