//! `/dev/fuse`: the kernel's end of a folder that is served elsewhere.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat, open};
use rustix::io::Errno;
use rustix::ioctl::{self, Setter, ioctl};

const PATH: &str = "/dev/fuse";

/// Where the kernel shows the device's number, as `MAJOR:MINOR`.
const NUMBER: &str = "/sys/class/misc/fuse/dev";

/// `FUSE_DEV_IOC_CLONE` of the kernel's include/uapi/linux/fuse.h.
const CLONE: ioctl::Opcode = ioctl::opcode::read::<u32>(229, 0);

/// Opens the device for a mount of its own; fails with a sentence.
pub fn open_new() -> Result<OwnedFd, String> {
    let opened = match open_device() {
        Err(Errno::NOENT) => make_node().and_then(|()| open_device()),
        opened => opened,
    };
    opened.map_err(|errno| match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => no_fuse(),
        errno => format!("{PATH} cannot be opened in the machine: {errno}"),
    })
}

/// Why a kernel without FUSE mounts nothing.
pub fn no_fuse() -> String {
    "the machine's kernel has no FUSE, which shared folders need (CONFIG_FUSE_FS, or the module fuse)"
        .to_owned()
}

/// One more queue of the mount that `device` belongs to: requests are read from any of them, and answered
/// where they were read.
pub fn clone(device: &OwnedFd) -> io::Result<OwnedFd> {
    let queue = open_device()?;
    let number = device.as_raw_fd().cast_unsigned();
    // SAFETY: FUSE_DEV_IOC_CLONE reads one u32, which is what the setter passes a pointer to.
    unsafe { ioctl(&queue, Setter::<CLONE, u32>::new(number)) }?;
    Ok(queue)
}

fn open_device() -> rustix::io::Result<OwnedFd> {
    open(PATH, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

/// Makes the node that devtmpfs should have: the number is 10:229 wherever there is one.
fn make_node() -> rustix::io::Result<()> {
    let text = fs::read_to_string(NUMBER).map_err(|_| Errno::NOENT)?;
    let (major, minor) = text.trim().split_once(':').ok_or(Errno::NOENT)?;
    let parse = |number: &str| number.parse().map_err(|_| Errno::NOENT);
    let number = makedev(parse(major)?, parse(minor)?);
    let mode = Mode::from_raw_mode(0o666);
    match mknodat(CWD, PATH, FileType::CharacterDevice, mode, number) {
        Err(Errno::EXIST) => Ok(()),
        made => made,
    }
}
