//! TAP interfaces: where the frames of a guest enter the host's network stack.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use thiserror::Error;

const DEVICE: &str = "/dev/net/tun";
/// The length of the header before each frame: struct virtio_net_hdr_v1.
pub const HEADER_LEN: usize = 12;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;

const IFF_TAP: libc::c_short = 0x0002;
const IFF_ATTACH_QUEUE: libc::c_short = 0x0200;
const IFF_DETACH_QUEUE: libc::c_short = 0x0400;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;
const IFF_MULTI_QUEUE: libc::c_short = 0x0100;

/// Offloads that the guest's side accepts (TUNSETOFFLOAD).
pub(super) const TUN_F_CSUM: u32 = 0x01;
pub(super) const TUN_F_TSO4: u32 = 0x02;
pub(super) const TUN_F_TSO6: u32 = 0x04;

/// Why a TAP interface could not be opened.
#[derive(Debug, Error)]
pub enum TapError {
    /// The name is no interface name.
    #[error("{0:?} is no name for an interface: it has 1 to 15 bytes without '/', '%' and spaces")]
    BadName(String),
    /// There is no such interface.
    #[error(
        "there is no interface {name}: make it with `sudo ip tuntap add dev {name} mode tap user $USER{multi_queue} && sudo ip link set {name} up`"
    )]
    NoSuchInterface {
        /// Its name.
        name: String,
        /// The option that several queues need, or nothing.
        multi_queue: &'static str,
    },
    /// It belongs to someone else.
    #[error(
        "interface {name} is not this user's: make it again with `sudo ip tuntap del dev {name} mode tap; sudo ip tuntap add dev {name} mode tap user $USER{multi_queue}`"
    )]
    NotPermitted {
        /// Its name.
        name: String,
        /// The option that several queues need, or nothing.
        multi_queue: &'static str,
    },
    /// Another process has it open.
    #[error("interface {0} is in use by another process")]
    Busy(String),
    /// It is not a TAP interface.
    #[error("interface {0} is not a TAP interface")]
    NotATap(String),
    /// It was made for one queue, and more were asked for.
    #[error(
        "interface {0} is not a TAP interface with several queues: make it again with `multi_queue` at the end of `ip tuntap add`"
    )]
    NotMultiQueue(String),
    /// There is no TUN driver, or this process may not use it.
    #[error(
        "{DEVICE} cannot be opened: load it with `sudo modprobe tun`, or allow it for this process"
    )]
    NoDriver(#[source] io::Error),
    /// The driver refused something that it should not.
    #[error("interface {name} cannot be set up ({what})")]
    SetUp {
        /// Its name.
        name: String,
        /// The ioctl that failed.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An open TAP interface: one descriptor per queue, non-blocking, each frame after a virtio-net
/// header of 12 bytes.
///
/// Sockets that keep the bounds of frames can stand in for it where the interface is elsewhere.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<File>,
    kind: Kind,
}

/// What the descriptors are.
#[derive(Debug)]
enum Kind {
    /// Queues of the TUN driver.
    Interface,
    /// Sockets, which know none of its ioctls.
    Sockets {
        /// That of the interface for which they stand.
        mtu: Option<u16>,
    },
}

impl Tap {
    /// Opens `queues` queues (at least 1) of the interface `name`, which must exist.
    pub fn open(name: &str, queues: u16) -> Result<Self, TapError> {
        let bad = |c: u8| c.is_ascii_whitespace() || c == b'/' || c == b'%' || c == 0;
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(bad) {
            return Err(TapError::BadName(name.to_owned()));
        }
        let several = queues > 1;
        if !exists(name) {
            return Err(TapError::NoSuchInterface {
                name: name.to_owned(),
                multi_queue: if several { " multi_queue" } else { "" },
            });
        }
        let mut tap = Self {
            name: name.to_owned(),
            queues: Vec::new(),
            kind: Kind::Interface,
        };
        for _ in 0..queues.max(1) {
            let queue = tap.open_queue(several)?;
            tap.queues.push(queue);
        }
        Ok(tap)
    }

    /// A stand-in whose frames pass through `queues`: non-blocking sockets of a type that keeps the
    /// bounds of messages, each message a virtio-net header of 12 bytes and a frame.
    ///
    /// What is received from them must be finished frames, as offloads cannot be switched. `mtu` is
    /// what the guest is told, in bytes.
    pub fn from_sockets(queues: Vec<OwnedFd>, mtu: Option<u16>) -> Self {
        Self {
            name: "socket".to_owned(),
            queues: queues.into_iter().map(File::from).collect(),
            kind: Kind::Sockets { mtu },
        }
    }

    fn open_queue(&self, several: bool) -> Result<File, TapError> {
        let queue = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(DEVICE)
            .map_err(TapError::NoDriver)?;
        let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        let mut joined = self.set_flags(&queue, TUNSETIFF, flags | multi_queue_flag(several));
        if !several && is_errno(&joined, libc::EINVAL) {
            // One queue of an interface that could have several.
            joined = self.set_flags(&queue, TUNSETIFF, flags | IFF_MULTI_QUEUE);
        }
        joined.map_err(|error| self.explain(error, several))?;
        let len = HEADER_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int through the pointer, which is valid for the call.
        let set = unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETVNETHDRSZ, &len) };
        if set < 0 {
            return Err(self.set_up("TUNSETVNETHDRSZ", io::Error::last_os_error()));
        }
        Ok(queue)
    }

    fn explain(&self, error: io::Error, several: bool) -> TapError {
        let name = self.name.clone();
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => TapError::NotPermitted {
                name,
                multi_queue: if several { " multi_queue" } else { "" },
            },
            Some(libc::EBUSY | libc::E2BIG) => TapError::Busy(name),
            Some(libc::EINVAL) if several => TapError::NotMultiQueue(name),
            Some(libc::EINVAL) => TapError::NotATap(name),
            _ => self.set_up("TUNSETIFF", error),
        }
    }

    fn set_up(&self, what: &'static str, source: io::Error) -> TapError {
        TapError::SetUp {
            name: self.name.clone(),
            what,
            source,
        }
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many queues were opened.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// The queues alone, for a reader that is no device. They keep the interface open.
    pub fn into_queues(self) -> Vec<OwnedFd> {
        self.queues.into_iter().map(OwnedFd::from).collect()
    }

    /// Queue `index`; None past the last.
    pub(super) fn queue(&self, index: usize) -> Option<&File> {
        self.queues.get(index)
    }

    /// Says which offloads (`TUN_F_*`) frames from the host may leave to their receiver; 0 asks for
    /// finished frames.
    pub fn set_offload(&self, offload: u32) -> io::Result<()> {
        if let Kind::Sockets { .. } = self.kind {
            return Ok(());
        }
        let Some(first) = self.queues.first() else {
            return Ok(());
        };
        let offload = libc::c_ulong::from(offload);
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        match unsafe { libc::ioctl(first.as_raw_fd(), TUNSETOFFLOAD, offload) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Lets the host send on the first `count` queues only.
    pub(super) fn attach_queues(&self, count: usize) -> io::Result<()> {
        if let Kind::Sockets { .. } = self.kind {
            return Ok(());
        }
        // An interface of one queue has nothing to attach.
        if self.queues.len() == 1 {
            return Ok(());
        }
        for (index, queue) in self.queues.iter().enumerate() {
            let flags = match index < count {
                true => IFF_ATTACH_QUEUE,
                false => IFF_DETACH_QUEUE,
            };
            match self.set_flags(queue, TUNSETQUEUE, flags) {
                // It is so already.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                done => done?,
            }
        }
        Ok(())
    }

    /// The interface's MTU in bytes; None where it cannot be had.
    pub fn mtu(&self) -> Option<u16> {
        if let Kind::Sockets { mtu } = self.kind {
            return mtu;
        }
        // SAFETY: no memory is involved.
        let socket =
            unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if socket < 0 {
            return None;
        }
        // SAFETY: the socket was just made and nothing else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let mut request = self.request();
        // SAFETY: SIOCGIFMTU reads and writes the ifreq, which lives through the call.
        let got = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, &mut request) };
        if got < 0 {
            return None;
        }
        // SAFETY: the kernel has filled the union as an MTU, and every bit pattern is an int.
        u16::try_from(unsafe { request.ifr_ifru.ifru_mtu }).ok()
    }

    fn set_flags(&self, queue: &File, what: libc::c_ulong, flags: libc::c_short) -> io::Result<()> {
        let mut request = self.request();
        request.ifr_ifru.ifru_flags = flags;
        // SAFETY: both requests read (TUNSETIFF also writes) an ifreq, which lives through the
        // call.
        match unsafe { libc::ioctl(queue.as_raw_fd(), what, &mut request) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// A request about this interface, with the rest zero.
    fn request(&self) -> libc::ifreq {
        // SAFETY: an ifreq is plain old data, for which all zeros are valid.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(self.name.bytes()) {
            *to = from as libc::c_char;
        }
        request
    }
}

fn multi_queue_flag(several: bool) -> libc::c_short {
    if several { IFF_MULTI_QUEUE } else { 0 }
}

fn is_errno(result: &io::Result<()>, errno: i32) -> bool {
    matches!(result, Err(error) if error.raw_os_error() == Some(errno))
}

fn exists(name: &str) -> bool {
    CString::new(name).is_ok_and(|name| {
        // SAFETY: the name is a NUL-terminated string that lives through the call.
        unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
    })
}
