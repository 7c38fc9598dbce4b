//! Unix sockets at paths of any length: `sun_path` holds 107 bytes, and runtime directories can be longer.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The longest path that fits, in bytes.
const MAX_PATH: usize = 107;

/// How often a listener that is busy is tried again.
const BUSY: Duration = Duration::from_millis(10);

/// A path that fits, for as long as this lives.
struct Address {
    path: PathBuf,
    _dir: Option<File>,
}

impl Address {
    fn of(path: &Path) -> io::Result<Self> {
        if path.as_os_str().as_bytes().len() <= MAX_PATH {
            return Ok(Self {
                path: path.to_owned(),
                _dir: None,
            });
        }
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = File::from(rustix::fs::open(dir, flags, Mode::empty())?);
        let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
        Ok(Self {
            path,
            _dir: Some(dir),
        })
    }
}

/// Listens at `path`, which must not exist.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let address = Address::of(path)?;
    let listener = UnixListener::bind(&address.path)?;
    let mode = Mode::RUSR | Mode::WUSR;
    // Nobody else gets into the directory, so there is no moment in which the mode is too wide.
    rustix::fs::chmod(&address.path, mode)?;
    Ok(listener)
}

/// Connects to the socket at `path`; TimedOut where its listener takes nobody for `patience`.
pub fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let deadline = Instant::now() + patience;
    let address = Address::of(path)?;
    let address = SocketAddrUnix::new(&address.path).map(|name| (name, address))?;
    // Blocking, this would wait for as long as a listener that has been stopped has a full queue.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match rustix::net::connect(&socket, &address.0) {
            Ok(()) => return blocking(socket),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if Instant::now() < deadline => thread::sleep(BUSY),
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn blocking(socket: OwnedFd) -> io::Result<UnixStream> {
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_path_longer_than_an_address_is_bound_and_reached() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("d".repeat(200));
        std::fs::create_dir(&dir).unwrap();
        let path = dir.join("machine.sock");
        let listener = bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut near = connect(&path, Duration::from_secs(10)).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        near.write_all(b"here").unwrap();
        drop(near);
        let mut said = String::new();
        far.read_to_string(&mut said).unwrap();
        assert_eq!(said, "here");
    }

    #[test]
    fn a_listener_that_takes_nobody_is_given_up() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("full.sock");
        let _listener = bind(&path).unwrap();
        let mut waiting = Vec::new();
        let error = loop {
            match connect(&path, Duration::from_millis(50)) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
            assert!(
                waiting.len() < 100_000,
                "the queue of a listener is endless"
            );
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_socket_without_a_listener_refuses() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("gone.sock");
        drop(bind(&path).unwrap());
        let error = connect(&path, Duration::from_secs(10)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
