//! A distribution's own init as PID 1, with the agent beside it.

use std::convert::Infallible;
use std::ffi::CString;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;

use anyhow::{Context, Result, anyhow};
use rustix::fs::OFlags;
use rustix::pipe::{PipeFlags, pipe_with};

use crate::tree::Tree;

/// Hands PID 1 to `program` of `tree`; what returns, once that runs, is the agent in a new process.
///
/// To be called before the agent has threads.
pub fn hand_over(program: &str, tree: &Tree) -> Result<()> {
    let path = CString::new(program)?;
    tree.open(program, OFlags::PATH)
        .with_context(|| format!("the root filesystem has no {program} to be its init"))?;
    let (report_read, report_write) = pipe_with(PipeFlags::CLOEXEC)?;
    // SAFETY: there is one thread, so the copy is a complete process.
    match unsafe { libc::fork() } {
        -1 => {
            Err(io::Error::last_os_error()).context("the agent cannot step beside the root's init")
        }
        0 => {
            drop(report_write);
            rustix::process::setsid().context("the agent cannot have a session of its own")?;
            let mut errno = [0; 4];
            match std::fs::File::from(report_read).read(&mut errno)? {
                0 => Ok(()),
                _ => {
                    let error = io::Error::from_raw_os_error(i32::from_le_bytes(errno));
                    Err(anyhow!(
                        "{program} cannot be executed as the root's init: {error}"
                    ))
                }
            }
        }
        _agent => {
            let error = become_init(&path, tree);
            report_and_wait(report_write.as_raw_fd(), error)
        }
    }
}

/// Comes back only with what failed.
fn become_init(path: &CString, tree: &Tree) -> io::Error {
    match tree.new_root() {
        Ok(None) => {}
        Ok(Some(root)) => {
            let entered =
                rustix::process::fchdir(root).and_then(|()| rustix::process::chroot(c"."));
            if let Err(error) = entered {
                return error.into();
            }
        }
        Err(error) => return error,
    }
    let argv = [path.as_ptr(), ptr::null()];
    // What the kernel gives an init itself.
    let envp = [
        c"HOME=/".as_ptr(),
        c"TERM=linux".as_ptr(),
        c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".as_ptr(),
        ptr::null(),
    ];
    // std ignores SIGPIPE, and an ignored signal stays ignored through execve.
    // SAFETY: SIG_DFL needs no handler memory; path, arguments and environment are C strings in
    // arrays that end with null.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr());
    }
    io::Error::last_os_error()
}

/// PID 1 must not end: the agent, its child, reports the failure and powers off.
fn report_and_wait(report: RawFd, error: io::Error) -> ! {
    let errno = error.raw_os_error().unwrap_or(libc::EIO).to_le_bytes();
    // SAFETY: `errno` is valid for its length; close and pause take no memory.
    let _: Infallible = unsafe {
        libc::write(report, errno.as_ptr().cast(), errno.len());
        libc::close(report);
        loop {
            libc::pause();
        }
    };
}
