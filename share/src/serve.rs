//! The threads that serve a share.

use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::channel::Channel;
use crate::dispatch::{Answer, again, dispatch, give_up};
use crate::message::{Args, Reply};
use crate::passthrough::{MAX_TRANSFER, Share};
use crate::wire::Opcode;

/// Room for what a message holds besides a file's data: headers, and two names.
const OVERHEAD: usize = 4096;

/// How long it takes until somebody who waits for a lock asks for it again: at first, and after a while.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(32);

/// Serves `share` over `channel` until the channel ends. To be called on a thread of its own, and on
/// as many as are to work on one channel's requests at a time.
///
/// The calling thread's umask and working directory become its own, apart from the process's.
///
/// # Errors
/// Where the channel breaks.
pub fn serve(share: &Share, channel: &dyn Channel) -> io::Result<()> {
    own_umask()?;
    let ended = AtomicBool::new(false);
    thread::scope(|waiting| {
        let outcome = attend(share, channel, |message| {
            let message = message.to_vec();
            thread::Builder::new()
                .name("share-lock".into())
                .spawn_scoped(waiting, || wait(share, channel, message, &ended))
                .map(drop)
        });
        ended.store(true, Ordering::Relaxed);
        outcome
    })
}

/// Answers requests until there are no more; those that have to wait go to `later`.
fn attend(
    share: &Share,
    channel: &dyn Channel,
    mut later: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut request = vec![0; MAX_TRANSFER + OVERHEAD];
    let mut reply = Reply::on(channel, MAX_TRANSFER);
    loop {
        let length = channel.receive(&mut request)?;
        if length == 0 {
            return Ok(());
        }
        let message = request.get(..length).unwrap_or_default();
        let _telling = share.telling(message);
        let (answer, bytes) = dispatch(share, message, &mut reply);
        match answer {
            Answer::Reply if channel.answers_releases() && is_release(message) => {}
            Answer::Reply if channel.takes_advice() => {
                let advice = share.advice(message, bytes);
                allow_interrupted(channel.send_with_advice(&[IoSlice::new(bytes)], &advice))?;
            }
            Answer::Reply => send(channel, bytes)?,
            Answer::Later => {
                if let Err(error) = later(message) {
                    tracing::warn!("a program of the guest cannot wait for a lock: {error}");
                    send(channel, give_up(share, message, &mut reply))?;
                }
            }
            Answer::Silence => {}
        }
    }
}

/// Whether it closes a file or a directory.
pub(crate) fn is_release(message: &[u8]) -> bool {
    let opcode = Args::parse(message).map(|(header, _)| Opcode::from_number(header.opcode));
    matches!(opcode, Ok(Some(Opcode::Release | Opcode::Releasedir)))
}

fn send(channel: &dyn Channel, bytes: &[u8]) -> io::Result<()> {
    allow_interrupted(channel.send(&[IoSlice::new(bytes)]))
}

fn allow_interrupted(sent: io::Result<()>) -> io::Result<()> {
    match sent {
        // The request was interrupted, and nobody waits for its reply any more.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

/// Tries again what has to wait, until it is done or nobody wants it any more.
fn wait(share: &Share, channel: &dyn Channel, message: Vec<u8>, ended: &AtomicBool) {
    let mut reply = Reply::with_capacity(0);
    let mut pause = FIRST_PAUSE;
    while !ended.load(Ordering::Relaxed) {
        let (answer, bytes) = again(share, &message, &mut reply);
        if answer != Answer::Later {
            // Where the channel is broken, whoever receives from it hears of that.
            let _ = send(channel, bytes);
            return;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    give_up(share, &message, &mut reply);
}

/// Separates this thread's umask from that of the others, as every new file takes another, and leaves
/// the working directory, which it would keep from being unmounted.
pub(crate) fn own_umask() -> io::Result<()> {
    // SAFETY: only what this thread shares with the others of root, working directory and umask is
    // given up; no memory and no descriptor is touched.
    match unsafe { libc::unshare(libc::CLONE_FS) } {
        0 => Ok(rustix::process::chdir("/")?),
        _ => Err(io::Error::last_os_error()),
    }
}
