//! Names as this host resolves them, on threads of their own: a name server may take its time.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Instant;

use agent::names::{self, Files};
use agent::protocol::DialError;

use super::Command;
use super::connect::{LookUp, PATIENCE};

/// Names looked up at once.
const MAX_LOOKUPS: usize = 16;

/// Looks names up; what is found goes out as [`Command::LookedUp`].
pub fn in_threads(commands: Sender<Command>, wake: OwnedFd) -> io::Result<LookUp> {
    let (running, wake) = (Arc::new(AtomicUsize::new(0)), Arc::new(wake));
    Ok(Box::new(move |id, name| {
        if running.fetch_add(1, Ordering::Relaxed) >= MAX_LOOKUPS {
            running.fetch_sub(1, Ordering::Relaxed);
            return Err(io::Error::other(format!(
                "{MAX_LOOKUPS} names are being looked up"
            )));
        }
        let (commands, wake, counter) = (commands.clone(), wake.clone(), running.clone());
        let thread = thread::Builder::new().name("resolve".into());
        let spawned = thread.spawn(move || {
            let found = resolve(&name);
            counter.fetch_sub(1, Ordering::Relaxed);
            // Where the forwarder has ended, nobody waits for it.
            if commands.send(Command::LookedUp(id, found)).is_ok() {
                let _ = rustix::io::write(&*wake, &1u64.to_ne_bytes());
            }
        });
        if spawned.is_err() {
            running.fetch_sub(1, Ordering::Relaxed);
        }
        spawned.map(drop)
    }))
}

fn resolve(name: &str) -> io::Result<Vec<IpAddr>> {
    let read = |path: &str| match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(io::Error::new(error.kind(), format!("{path}: {error}"))),
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
    };
    let files = Files {
        hosts: read("/etc/hosts")?,
        resolv_conf: read("/etc/resolv.conf")?,
    };
    let found = names::lookup(&files, name, Instant::now() + PATIENCE);
    found.map_err(|error| match error {
        DialError::NoSuchHost => {
            io::Error::new(io::ErrorKind::NotFound, "this host knows no such name")
        }
        DialError::Other(reason) => io::Error::other(reason),
        error => io::Error::other(format!("{error:?}")),
    })
}
