//! Files by the kernel's own names for them (open_by_handle_at(2)), and a mount's attributes: system calls that
//! rustix does not have.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

/// The longest handle, as the kernel has it: `MAX_HANDLE_SZ`.
const MAX_BYTES: usize = 128;

/// FUSE's handles: a node's number in two halves, the upper one first, and its generation.
const FUSE_BYTES: usize = 12;

/// Their kind: `FILEID_INO64_GEN` of the kernel's include/linux/exportfs.h.
const FUSE_KIND: i32 = 0x81;

/// What the kernel calls a file, whatever its path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Handle {
    kind: i32,
    bytes: Box<[u8]>,
}

/// The kernel's `struct file_handle`, with room.
#[repr(C)]
struct Raw {
    length: u32,
    kind: i32,
    bytes: [u8; MAX_BYTES],
}

impl Handle {
    /// From what fdinfo of an inotify instance shows of a file; None where that is no handle.
    pub fn parse(kind: &str, hex: &str) -> Option<Self> {
        let (pairs, rest) = hex.as_bytes().as_chunks::<2>();
        if pairs.is_empty() || pairs.len() > MAX_BYTES || !rest.is_empty() {
            return None;
        }
        let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        Some(Self {
            kind: i32::from_str_radix(kind, 16).ok()?,
            bytes: pairs.iter().map(byte).collect::<Option<_>>()?,
        })
    }

    /// The handle of a FUSE filesystem's node, whose generation is 0: the host does not use a number again.
    pub fn of_node(node: u64) -> Self {
        let [upper, lower] = [node >> 32, node & u64::from(u32::MAX)];
        let words = [upper, lower, 0].map(|word| (word as u32).to_ne_bytes());
        Self {
            kind: FUSE_KIND,
            bytes: words.concat().into(),
        }
    }

    /// The handle of what `file` has open.
    pub fn of(file: impl AsFd) -> Result<Self, Errno> {
        let mut raw = Raw {
            length: u32::try_from(MAX_BYTES).map_err(|_| Errno::INVAL)?,
            kind: 0,
            bytes: [0; MAX_BYTES],
        };
        let mut mount: libc::c_int = 0;
        let file = file.as_fd().as_raw_fd();
        // SAFETY: path and numbers outlive the call, and `raw` has room for as many bytes as it says.
        let outcome = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                file,
                c"".as_ptr(),
                &raw mut raw,
                &raw mut mount,
                libc::AT_EMPTY_PATH,
            )
        };
        checked(outcome)?;
        let length = usize::try_from(raw.length).map_err(|_| Errno::OVERFLOW)?;
        Ok(Self {
            kind: raw.kind,
            bytes: raw.bytes.get(..length).ok_or(Errno::OVERFLOW)?.into(),
        })
    }

    /// Opens the file, as a place only, on the mount that `on` is an open file of. Nobody is asked for it: the
    /// kernel either knows it or not.
    pub fn open(&self, on: impl AsFd) -> Result<OwnedFd, Errno> {
        let mut raw = Raw {
            length: u32::try_from(self.bytes.len()).map_err(|_| Errno::INVAL)?,
            kind: self.kind,
            bytes: [0; MAX_BYTES],
        };
        let bytes = raw.bytes.get_mut(..self.bytes.len()).ok_or(Errno::INVAL)?;
        bytes.copy_from_slice(&self.bytes);
        let on = on.as_fd().as_raw_fd();
        let flags = libc::O_PATH | libc::O_CLOEXEC;
        // SAFETY: `raw` outlives the call, and holds as many bytes as it says.
        let opened =
            unsafe { libc::syscall(libc::SYS_open_by_handle_at, on, &raw const raw, flags) };
        let opened = i32::try_from(checked(opened)?).map_err(|_| Errno::BADF)?;
        // SAFETY: the descriptor is new, and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(opened) })
    }

    /// The number that FUSE's messages have for it.
    pub fn node(&self) -> Option<u64> {
        let (upper, rest) = self.bytes.split_first_chunk::<4>()?;
        let (lower, _) = rest.split_first_chunk::<4>()?;
        let [upper, lower] = [upper, lower].map(|half| u64::from(u32::from_ne_bytes(*half)));
        (self.bytes.len() == FUSE_BYTES).then_some(upper << 32 | lower)
    }
}

/// Lets files be written through a mount that nobody else sees.
pub fn make_writable(mount: impl AsFd) -> Result<(), Errno> {
    /// The kernel's `struct mount_attr`.
    #[repr(C)]
    struct Attributes {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let attributes = Attributes {
        set: 0,
        clear: rustix::mount::MountAttrFlags::MOUNT_ATTR_RDONLY
            .bits()
            .into(),
        propagation: 0,
        user_namespace: 0,
    };
    let mount = mount.as_fd().as_raw_fd();
    // SAFETY: path and attributes outlive the call, which is told their size.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount,
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    checked(outcome).map(drop)
}

fn checked(outcome: libc::c_long) -> Result<libc::c_long, Errno> {
    match outcome {
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
        outcome => Ok(outcome),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_are_read_as_the_kernel_writes_them() {
        let handle = Handle::parse("81", "0100000002000000ffff0000").unwrap();
        assert_eq!(handle.kind, 0x81);
        assert_eq!(handle.node(), Some(1 << 32 | 2));
        let node = Handle::of_node(1 << 32 | 2);
        assert_eq!(
            node,
            Handle::parse("81", "010000000200000000000000").unwrap()
        );
        assert_eq!(Handle::parse("1", "a7c4030000000000").unwrap().node(), None);
        for (kind, hex) in [("81", ""), ("81", "0"), ("81", "0x"), ("x", "00")] {
            assert_eq!(Handle::parse(kind, hex), None, "{kind} {hex}");
        }
        assert_eq!(Handle::parse("81", &"00".repeat(129)), None);
    }
}
