//! Word of TCP sockets that begin or stop to listen, at the moment they do: the kernel's tracepoint
//! `sock:inet_sock_set_state`, in a trace instance of the agent's own.
//!
//! The trace filesystem is mounted where nobody else sees it. What is traced is not looked at: that
//! something was is the word.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, openat, unlinkat};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// `TCP_LISTEN` is 10.
const FILTER: &str = "newstate==10||oldstate==10";

/// How often the trace is read before others get their turn.
const READS: usize = 64;

/// A trace of sockets that begin or stop to listen.
#[derive(Debug)]
pub struct Tracepoint {
    /// None only while it is being dropped.
    pipe: Option<OwnedFd>,
    instances: OwnedFd,
    name: String,
    // Where both are.
    _mount: OwnedFd,
}

impl Tracepoint {
    /// Starts the trace; fails where the kernel has none, or does not let us.
    pub fn new(name: String) -> io::Result<Self> {
        let filesystem = fsopen("tracefs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&filesystem)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let mount = fsmount(&filesystem, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        let instances = open(&mount, "instances", OFlags::PATH | OFlags::DIRECTORY)?;
        mkdirat(&instances, &*name, Mode::RWXU)?;
        // From here on the instance is removed with the value.
        let mut tracepoint = Self {
            pipe: None,
            instances,
            name,
            _mount: mount,
        };
        let pipe = tracepoint.start()?;
        tracepoint.pipe = Some(pipe);
        Ok(tracepoint)
    }

    fn start(&self) -> io::Result<OwnedFd> {
        let instance = open(
            &self.instances,
            &self.name,
            OFlags::PATH | OFlags::DIRECTORY,
        )?;
        // Before an event is enabled, or buffers of a megabyte per CPU are made.
        write(&instance, "buffer_size_kb", "4")?;
        // Readers are woken by the first event rather than by a buffer that is half full.
        write(&instance, "buffer_percent", "0")?;
        let event = "events/sock/inet_sock_set_state";
        write(&instance, &format!("{event}/filter"), FILTER)?;
        write(&instance, &format!("{event}/enable"), "1")?;
        open(&instance, "trace_pipe", OFlags::RDONLY | OFlags::NONBLOCK)
    }

    /// Takes what was traced, so that what comes after it is a new event.
    pub fn drain(&self) {
        let mut buffer = [0; 4096];
        for _ in 0..READS {
            match self
                .pipe
                .as_ref()
                .map(|pipe| rustix::io::read(pipe, &mut buffer))
            {
                Some(Ok(1..) | Err(Errno::INTR)) => {}
                _ => return,
            }
        }
    }

    /// Readable when there is word.
    pub fn pipe(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }
}

impl Drop for Tracepoint {
    fn drop(&mut self) {
        // An instance with open files cannot be removed.
        self.pipe = None;
        if let Err(error) = unlinkat(&self.instances, &*self.name, AtFlags::REMOVEDIR) {
            eprintln!("mvm-agent: the trace of listening sockets cannot be ended: {error}");
        }
    }
}

fn open(directory: &OwnedFd, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC;
    Ok(openat(directory, path, flags, Mode::empty())?)
}

fn write(directory: &OwnedFd, path: &str, value: &str) -> io::Result<()> {
    let file = open(directory, path, OFlags::WRONLY)?;
    match rustix::io::write(&file, value.as_bytes())? {
        length if length == value.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn is_readable(tracepoint: &Tracepoint, seconds: i64) -> bool {
        let timeout = Timespec {
            tv_sec: seconds,
            tv_nsec: 0,
        };
        let pipe = tracepoint.pipe().unwrap();
        poll(
            &mut [PollFd::from_borrowed_fd(pipe, PollFlags::IN)],
            Some(&timeout),
        )
        .unwrap()
            > 0
    }

    #[test]
    fn word_comes_of_a_socket_that_begins_to_listen_and_of_its_end() {
        let name = format!("mvm-agent-test-{}", std::process::id());
        let tracepoint = match Tracepoint::new(name) {
            Ok(tracepoint) => tracepoint,
            Err(error) => {
                eprintln!("no tracepoints here ({error}): nothing to test");
                return;
            }
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(is_readable(&tracepoint, 60));
        tracepoint.drain();
        drop(listener);
        assert!(is_readable(&tracepoint, 60));
    }
}
