//! The random bytes of the host, credited to the kernel's pool so that nothing waits for entropy.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `RNDADDENTROPY` of linux/random.h: `_IOW('R', 0x03, int[2])`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;

/// More than the pool holds (256 bits) is of no use.
const MAX_BYTES: usize = 512;

/// `struct rand_pool_info` of linux/random.h with room for the bytes.
#[repr(C)]
struct PoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; MAX_BYTES],
}

/// Adds `bytes` to the pool, counting each as eight bits of entropy.
pub fn add(bytes: &[u8]) -> io::Result<()> {
    let mut info = PoolInfo {
        entropy_count: 0,
        buf_size: 0,
        buf: [0; MAX_BYTES],
    };
    for (to, from) in info.buf.iter_mut().zip(bytes) {
        *to = *from;
        info.buf_size += 1;
        info.entropy_count += 8;
    }
    let pool = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: RNDADDENTROPY reads a rand_pool_info with `buf_size` bytes behind its two integers;
    // `info` has room for MAX_BYTES, and `buf_size` counts at most those.
    match unsafe { libc::ioctl(pool.as_raw_fd(), RNDADDENTROPY, &info) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
