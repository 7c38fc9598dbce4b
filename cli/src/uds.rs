//! `--vsock-uds` of a machine in the outer Linux: the guest's vsock ports at a Unix socket of the host.
//!
//! A client writes `CONNECT <port>` and a newline; its socket is then handed on and joined to the port where
//! the machine is, from where it gets its `OK <port>`. What the guest opens to a port of the host goes the
//! other way: see [`crate::instance`].

use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::accel::tap;
use crate::link::Relayed;

/// How long a client may take over its line.
const PATIENCE: Duration = Duration::from_secs(10);

/// The longest line.
const MAX_LINE: u64 = 32;

/// How long to wait after a client could not be accepted, so that a lasting failure does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket that is served, and removed when this is dropped; connections that were made go on.
#[derive(Debug)]
pub struct Uds {
    path: PathBuf,
    over: Arc<AtomicBool>,
}

impl Uds {
    /// Serves the ports behind `relayed` at `path`, where nothing may be yet, to this user only.
    pub fn serve(path: &Path, relayed: Arc<Relayed>) -> Result<Self> {
        let listener = tap::listen(path)
            .with_context(|| format!("the vsock socket {} cannot be made", path.display()))?;
        let over = Arc::new(AtomicBool::new(false));
        let served = Self {
            path: path.to_owned(),
            over: over.clone(),
        };
        thread::Builder::new()
            .name("vsock-uds".into())
            .spawn(move || accept(&listener, &relayed, &over))?;
        Ok(served)
    }
}

impl Drop for Uds {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        // Whoever waits in accept wakes up by this; where it fails there is nobody to wake up.
        let _ = UnixStream::connect(&self.path);
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("{} is left behind: {error}", self.path.display());
        }
    }
}

fn accept(listener: &UnixListener, relayed: &Arc<Relayed>, over: &AtomicBool) {
    while !over.load(Ordering::Acquire) {
        let client = match listener.accept() {
            Ok((client, _)) => client,
            Err(error) => {
                tracing::warn!("a client of the vsock socket cannot be accepted: {error}");
                thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        let relayed = relayed.clone();
        let serve = move || {
            if let Err(error) = hand_on(client, &relayed) {
                tracing::debug!("a client of the vsock socket was sent away: {error}");
            }
        };
        if let Err(error) = thread::Builder::new().spawn(serve) {
            tracing::warn!("no thread for a client of the vsock socket: {error}");
        }
    }
}

fn hand_on(client: UnixStream, relayed: &Relayed) -> io::Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    // Unbuffered: what follows the line is for the guest.
    BufReader::with_capacity(1, Read::take(&client, MAX_LINE)).read_line(&mut line)?;
    let port = line
        .strip_prefix("CONNECT ")
        .and_then(|rest| rest.strip_suffix('\n'))
        .and_then(|port| port.trim_end_matches('\r').parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it did not name a port"))?;
    client.set_read_timeout(None)?;
    relayed.join_with_line(port, client.into())
}
