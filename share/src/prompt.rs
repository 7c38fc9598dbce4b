//! Requests that are answered on the very thread that brings them, which must not wait: a vCPU stands still meanwhile, and
//! whatever else the guest has running on it.
//!
//! So nothing is done here that may take the time of somebody else, least of all of this guest, whose own files may be
//! mounted on the host: nothing on filesystems but those of this host's memory and disks, no data that has to be read from
//! a disk first, no locks of other threads that wait for the guest. What cannot be answered so has changed nothing, and is to
//! be asked for over a [`Channel`](crate::Channel), which waits as long as it takes.

use std::cell::Cell;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::FsWord;
use rustix::io::{Errno, ReadWriteFlags};
use zerocopy::FromBytes;

use crate::channel::Advice;
use crate::dispatch::{Answer, dispatch};
use crate::host::Stat;
use crate::message::{Args, Reply};
use crate::passthrough::Share;
use crate::serve::{is_release, own_umask};
use crate::wire::{Opcode, ReadIn};

/// `TMPFS_MAGIC`.
const TMPFS: FsWord = 0x0102_1994;

thread_local! {
    static IS_PROMPT: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread must not wait.
pub(crate) fn is_prompt() -> bool {
    IS_PROMPT.get()
}

/// Answers the request `message` where that takes no time, and has `send` take the reply and what is to come before it;
/// returns false where nothing was done. Once called, the thread must not wait any more, whatever it does with a share, and
/// its umask and working directory are its own. A closed file has no reply.
///
/// # Errors
/// Where the thread cannot have an umask of its own.
pub fn answer_promptly(
    share: &Share,
    message: &[u8],
    reply: &mut Reply<'_>,
    send: impl FnOnce(&[u8], &[Advice]),
) -> io::Result<bool> {
    if !is_prompt() {
        own_umask()?;
        IS_PROMPT.set(true);
    }
    if !is_brief(message, reply) || !share.is_near(message) {
        return Ok(false);
    }
    let Ok(_telling) = share.telling_promptly(message) else {
        return Ok(false);
    };
    let (answer, bytes) = dispatch(share, message, reply);
    match answer {
        Answer::Silence => {}
        Answer::Reply if is_later(bytes) => return Ok(false),
        Answer::Reply if is_release(message) => {}
        Answer::Reply => send(bytes, &share.advice(message, bytes)),
        Answer::Later => return Ok(false),
    }
    Ok(true)
}

/// Whether a request is one that takes no time, most often, and whose reply there is room for.
fn is_brief(message: &[u8], reply: &Reply<'_>) -> bool {
    let Ok((header, args)) = Args::parse(message) else {
        return false;
    };
    match Opcode::from_number(header.opcode) {
        Some(Opcode::Read | Opcode::Readdir | Opcode::Readdirplus) => {
            let asked = ReadIn::read_from_prefix(args.rest());
            asked.is_ok_and(|(asked, _)| asked.size as usize <= reply.capacity())
        }
        // A refused lock would look like a request that has to wait. The others are about requests that went elsewhere.
        Some(Opcode::Setlk | Opcode::Setlkw | Opcode::Interrupt) => false,
        Some(Opcode::Init | Opcode::Destroy) => false,
        Some(opcode) => opcode.is_brief(),
        None => false,
    }
}

/// Whether a reply says that the request has to wait, or needs more room: nothing was done then.
fn is_later(reply: &[u8]) -> bool {
    let error = reply.get(4..8).and_then(|bytes| bytes.first_chunk());
    let error = error.map(|bytes| -i32::from_ne_bytes(*bytes));
    [Errno::AGAIN, Errno::NOBUFS]
        .map(Errno::raw_os_error)
        .map(Some)
        .contains(&error)
}

/// Reads from `file`, as pread(2) does, what of it is in memory.
///
/// # Errors
/// `EAGAIN` where not all of it is, or the filesystem does not tell.
pub(crate) fn read(file: BorrowedFd<'_>, room: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let wanted = room.len();
    let mut rooms = [io::IoSliceMut::new(room)];
    let read = match rustix::io::preadv2(file, &mut rooms, offset, ReadWriteFlags::NOWAIT) {
        // Data in memory is all that there is there.
        Err(Errno::OPNOTSUPP) if rustix::fs::fstatfs(file)?.f_type == TMPFS => {
            return rustix::io::pread(file, room, offset);
        }
        Err(Errno::OPNOTSUPP) => return Err(Errno::AGAIN),
        outcome => outcome?,
    };
    // Fewer bytes mean the end of the file, or of what is in memory.
    if read < wanted && offset.saturating_add(read as u64) < Stat::fd(file)?.size {
        return Err(Errno::AGAIN);
    }
    Ok(read)
}
