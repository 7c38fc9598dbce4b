//! Unix sockets by their paths in the machine's root.
//!
//! The agent runs in another tree, and a socket's address has room for 108 bytes; so a path is
//! resolved inside the root first, and the socket named through a descriptor of the agent.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Instant;

use agent::protocol::DialError;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use super::dial;
use super::listen::BACKLOG;
use crate::tree::{Tree, path_of};

/// Everybody in the guest may use a socket of the host's.
const SOCKET_MODE: Mode = Mode::from_raw_mode(0o666);

/// What directories that are missing get.
const DIRECTORY_MODE: u32 = 0o755;

/// A socket that listens at a path.
#[derive(Debug)]
pub struct Bound {
    /// Non-blocking.
    pub socket: OwnedFd,
    /// What has to go with it.
    pub name: Name,
}

/// The name of a socket in its directory.
#[derive(Debug)]
pub struct Name {
    directory: OwnedFd,
    name: Vec<u8>,
    inode: u64,
}

impl Name {
    /// Removes it, unless it has become another file's name.
    pub fn remove(&self) {
        let is_ours = rustix::fs::statat(&self.directory, &*self.name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| stat.st_ino == self.inode);
        if is_ours
            && let Err(error) = rustix::fs::unlinkat(&self.directory, &*self.name, AtFlags::empty())
        {
            let name = String::from_utf8_lossy(&self.name);
            eprintln!("mvm-agent: the socket {name} cannot be removed: {error}");
        }
    }
}

/// Connects to the socket at `path` of `root`; what comes back is non-blocking.
pub fn connect(root: &Tree, path: &[u8], deadline: Instant) -> Result<OwnedFd, DialError> {
    let shown = String::from_utf8_lossy(path);
    if !path.starts_with(b"/") {
        return Err(DialError::Other(format!("{shown} is no absolute path")));
    }
    let node = root.open(path, OFlags::PATH).map_err(|error| {
        DialError::Other(format!("the guest's {shown} cannot be opened: {error}"))
    })?;
    connect_to(&node, Some(deadline)).map_err(dial::dial_error)
}

/// Connects to the socket that `node` is, waiting for room in its queue until `deadline`.
fn connect_to(node: &OwnedFd, deadline: Option<Instant>) -> rustix::io::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    match deadline {
        Some(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Errno::TIMEDOUT);
            }
            set_socket_timeout(&socket, Timeout::Send, Some(left))?;
        }
        None => rustix::io::ioctl_fionbio(&socket, true)?,
    }
    let address = SocketAddrUnix::new(path_of(node))?;
    match rustix::net::connect(&socket, &address) {
        // The queue of connections stayed full.
        Err(Errno::AGAIN) if deadline.is_some() => return Err(Errno::TIMEDOUT),
        connected => connected?,
    }
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(socket)
}

/// Listens at `path` of `root`; fails with a sentence.
pub fn listen(root: &Tree, path: &[u8]) -> Result<Bound, String> {
    let shown = String::from_utf8_lossy(path);
    listen_at(root, path)
        .map_err(|error| format!("{shown} of the guest cannot be listened at: {error}"))
}

fn listen_at(root: &Tree, path: &[u8]) -> io::Result<Bound> {
    let path = Path::new(OsStr::from_bytes(path));
    let (true, Some(parent), Some(name)) = (path.is_absolute(), path.parent(), path.file_name())
    else {
        let reason = "it is no absolute path of a file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    };
    let directory = root.make_directory(parent.as_os_str().as_bytes(), DIRECTORY_MODE)?;
    let name = name.as_bytes();
    make_way(&directory, name)?;

    // The name may be longer than an address has room for, and must not be seen before the socket
    // can be used: it is made under another one.
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let temporary = format!(".mvm-{:016x}", u64::from_ne_bytes(random));
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let address = SocketAddrUnix::new(format!("{}/{temporary}", path_of(&directory)))?;
    rustix::net::bind(&socket, &address)?;
    let renamed = finish(&socket, &directory, &temporary, name);
    match renamed {
        Ok(inode) => Ok(Bound {
            socket,
            name: Name {
                directory,
                name: name.to_vec(),
                inode,
            },
        }),
        Err(error) => {
            // What failed first is what is told.
            let _ = rustix::fs::unlinkat(&directory, &*temporary, AtFlags::empty());
            Err(error.into())
        }
    }
}

/// Has the socket listen, and gives it its own name; its inode comes back.
fn finish(
    socket: &OwnedFd,
    directory: &OwnedFd,
    temporary: &str,
    name: &[u8],
) -> rustix::io::Result<u64> {
    rustix::fs::chmodat(directory, temporary, SOCKET_MODE, AtFlags::empty())?;
    rustix::net::listen(socket, BACKLOG)?;
    let inode = rustix::fs::statat(directory, temporary, AtFlags::SYMLINK_NOFOLLOW)?.st_ino;
    rustix::fs::renameat(directory, temporary, directory, name)?;
    Ok(inode)
}

/// Makes sure that nothing is lost where a socket takes the place of `name`.
fn make_way(directory: &OwnedFd, name: &[u8]) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let node = match rustix::fs::openat(directory, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        node => node?,
    };
    let stat = rustix::fs::fstat(node.as_fd())?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        let reason = "there is a file already that is no socket";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, reason));
    }
    match connect_to(&node, None) {
        Err(Errno::CONNREFUSED) => Ok(()),
        Ok(_) | Err(Errno::AGAIN) => {
            let reason = "somebody listens there already";
            Err(io::Error::new(io::ErrorKind::AddrInUse, reason))
        }
        Err(error) => Err(error.into()),
    }
}
