//! The threads that serve a share.

use std::io::{self, IoSlice};

use crate::channel::Channel;
use crate::dispatch::{Answer, dispatch};
use crate::message::Reply;
use crate::passthrough::{MAX_TRANSFER, Share};

/// Room for what a message holds besides a file's data: headers, and two names.
const OVERHEAD: usize = 4096;

/// Serves `share` over `channel` until the channel ends. To be called on a thread of its own, and on
/// as many as are to work on one channel's requests at a time.
///
/// The calling thread's umask and working directory become its own, apart from the process's.
///
/// # Errors
/// Where the channel breaks.
pub fn serve(share: &Share, channel: &dyn Channel) -> io::Result<()> {
    own_umask()?;
    let mut request = vec![0; MAX_TRANSFER + OVERHEAD];
    let mut reply = Reply::with_capacity(MAX_TRANSFER);
    loop {
        let length = channel.receive(&mut request)?;
        if length == 0 {
            return Ok(());
        }
        let message = request.get(..length).unwrap_or_default();
        let _telling = share.telling(message);
        let (answer, bytes) = dispatch(share, message, &mut reply);
        if answer == Answer::Reply {
            match channel.send(&[IoSlice::new(bytes)]) {
                // The request was interrupted, and nobody waits for its reply any more.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                outcome => outcome?,
            }
        }
    }
}

/// Separates this thread's umask from that of the others, as every new file takes another, and leaves
/// the working directory, which it would keep from being unmounted.
fn own_umask() -> io::Result<()> {
    // SAFETY: only what this thread shares with the others of root, working directory and umask is
    // given up; no memory and no descriptor is touched.
    match unsafe { libc::unshare(libc::CLONE_FS) } {
        0 => Ok(rustix::process::chdir("/")?),
        _ => Err(io::Error::last_os_error()),
    }
}
