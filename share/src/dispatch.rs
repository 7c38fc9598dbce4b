//! From a request's bytes to an operation on the share, and from its outcome to a reply's bytes.
//!
//! The bytes are the guest's: any of them may be anything.

use rustix::io::Errno;

use crate::message::{Args, Reply};
use crate::owner::Ids;
use crate::passthrough::{Caller, Share};
use crate::prompt;
use crate::watch;
use crate::wire::{self, InHeader, Opcode};

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The reply is to be sent.
    Reply,
    /// Nobody waits for a reply.
    Silence,
    /// A lock is somebody else's: the request is to be dispatched again with [`again`], until that
    /// gives a reply.
    Later,
}

/// Does what `message` asks for; what is to be said to it is put into `reply`, header and all.
pub fn dispatch<'a>(share: &Share, message: &[u8], reply: &'a mut Reply) -> (Answer, &'a [u8]) {
    let (header, args) = match Args::parse(message) {
        Ok(parsed) => parsed,
        Err(_) => {
            tracing::debug!(bytes = message.len(), "a message that is no request");
            return (Answer::Silence, &[]);
        }
    };
    if !prompt::is_prompt() {
        share.learn_filesystems();
    }
    reply.begin(header.unique);
    tracing::trace!(opcode = header.opcode, node = header.nodeid, "asked");
    let outcome = match Opcode::from_number(header.opcode) {
        None => Err(Errno::NOSYS),
        Some(Opcode::Forget | Opcode::BatchForget) => {
            // There is no reply, so there is nobody to hear of an error.
            let _ = forget(share, &header, args);
            return (Answer::Silence, &[]);
        }
        Some(Opcode::Interrupt) => {
            interrupt(share, args);
            return (Answer::Silence, &[]);
        }
        Some(Opcode::Setlkw) => match wait_for_lock(share, &header, args) {
            Err(Errno::AGAIN) => return (Answer::Later, &[]),
            outcome => outcome,
        },
        Some(opcode) => match watch::answer(share, opcode, &header, args, reply) {
            Some(outcome) => outcome,
            None => run(share, opcode, &header, args, reply),
        },
    };
    if let Err(errno) = outcome {
        tracing::trace!(opcode = header.opcode, node = header.nodeid, %errno, "refused");
    }
    (Answer::Reply, reply.finish(outcome))
}

/// Does once more what a request asks for that was to be done [`Answer::Later`].
pub fn again<'a>(share: &Share, message: &[u8], reply: &'a mut Reply) -> (Answer, &'a [u8]) {
    let Ok((header, mut args)) = Args::parse(message) else {
        return (Answer::Silence, &[]);
    };
    reply.begin(header.unique);
    let outcome = match share.locks.is_interrupted(header.unique) {
        true => Err(Errno::INTR),
        false => args
            .take()
            .and_then(|asked| share.set_lock(header.nodeid, &asked)),
    };
    if outcome == Err(Errno::AGAIN) {
        return (Answer::Later, &[]);
    }
    share.locks.end_wait(header.unique);
    (Answer::Reply, reply.finish(outcome))
}

/// What was to be done [`Answer::Later`] is not done any more: `ENOLCK` is put into `reply`.
pub fn give_up<'a>(share: &Share, message: &[u8], reply: &'a mut Reply) -> &'a [u8] {
    let unique = Args::parse(message).map_or(0, |(header, _)| header.unique);
    share.locks.end_wait(unique);
    reply.begin(unique);
    reply.finish(Err(Errno::NOLCK))
}

/// Takes a lock; `EAGAIN` where that has to be tried again.
fn wait_for_lock(share: &Share, header: &InHeader, mut args: Args<'_>) -> Result<(), Errno> {
    let asked: wire::LkIn = args.take()?;
    let outcome = share.set_lock(header.nodeid, &asked);
    if outcome == Err(Errno::AGAIN) {
        share.locks.begin_wait(header.unique)?;
    }
    outcome
}

/// Whatever is to be interrupted is short, and answered as soon as it is done, but for who waits for a
/// lock.
fn interrupt(share: &Share, mut args: Args<'_>) {
    if let Ok(asked) = args.take::<wire::InterruptIn>()
        && share.has(wire::init::POSIX_LOCKS)
    {
        share.locks.interrupt(asked.unique);
    }
}

fn forget(share: &Share, header: &InHeader, mut args: Args<'_>) -> Result<(), Errno> {
    if header.opcode == Opcode::Forget as u32 {
        let one: wire::ForgetIn = args.take()?;
        share.forget(header.nodeid, one.nlookup);
        return Ok(());
    }
    let many: wire::BatchForgetIn = args.take()?;
    for _ in 0..many.count {
        // Ends with the message, whatever the count.
        let one: wire::ForgetOne = args.take()?;
        share.forget(one.nodeid, one.nlookup);
    }
    Ok(())
}

fn run(
    share: &Share,
    opcode: Opcode,
    header: &InHeader,
    args: Args<'_>,
    reply: &mut Reply,
) -> Result<(), Errno> {
    use Opcode::{
        Access, BatchForget, CopyFileRange, Create, Destroy, Fallocate, Flush, Forget, Fsync,
        Fsyncdir, Getattr, Getlk, Getxattr, Init, Interrupt, Link, Listxattr, Lookup, Lseek, Mkdir,
        Mknod, Open, Opendir, Read, Readdir, Readdirplus, Readlink, Release, Releasedir,
        Removexattr, Rename, Rename2, Rmdir, Setattr, Setlk, Setlkw, Setxattr, Statfs, Statx,
        Symlink, Syncfs, Tmpfile, Unlink, Write,
    };
    match opcode {
        Init | Destroy | Statfs | Syncfs => session(share, opcode, header, args, reply),
        Lookup | Unlink | Rmdir | Rename | Rename2 | Link => {
            names(share, opcode, header, args, reply)
        }
        Symlink | Mknod | Mkdir | Create | Tmpfile => making(share, opcode, header, args, reply),
        Getattr | Setattr | Statx | Readlink | Access => {
            attributes(share, opcode, header, args, reply)
        }
        Setxattr | Getxattr | Listxattr | Removexattr => xattrs(share, opcode, header, args, reply),
        Open | Opendir | Release | Releasedir | Readdir | Readdirplus | Fsync | Fsyncdir => {
            handles(share, opcode, header, args, reply)
        }
        Read | Write | Fallocate | Lseek | CopyFileRange => {
            data(share, opcode, header, args, reply)
        }
        Flush | Getlk | Setlk => locks(share, opcode, header, args, reply),
        Forget | BatchForget | Interrupt | Setlkw => Err(Errno::INVAL),
    }
}

fn session(
    share: &Share,
    opcode: Opcode,
    header: &InHeader,
    mut args: Args<'_>,
    reply: &mut Reply,
) -> Result<(), Errno> {
    match opcode {
        Opcode::Init => {
            let asked: wire::InitIn = args.take()?;
            // Absent from kernels that are too old anyway.
            let more: wire::InitExt = args.take().unwrap_or_default();
            reply.push(&share.init(&asked, more.flags2)?)
        }
        Opcode::Statfs => reply.push(&share.statfs(header.nodeid)?),
        Opcode::Syncfs => share.syncfs(header.nodeid),
        _ => {
            share.forget_all();
            Ok(())
        }
    }
}

fn names(
    share: &Share,
    opcode: Opcode,
    header: &InHeader,
    mut args: Args<'_>,
    reply: &mut Reply,
) -> Result<(), Errno> {
    let dir = header.nodeid;
    match opcode {
        Opcode::Lookup => reply.push(&share.lookup(dir, args.name()?)?),
        Opcode::Unlink => share.unlink(dir, args.name()?),
        Opcode::Rmdir => share.rmdir(dir, args.name()?),
        Opcode::Link => {
            let asked: wire::LinkIn = args.take()?;
            reply.push(&share.link(asked.oldnodeid, dir, args.name()?)?)
        }
        _ => {
            let (newdir, flags) = if opcode == Opcode::Rename2 {
                let asked: wire::Rename2In = args.take()?;
                (asked.newdir, asked.flags)
            } else {
                (args.take::<wire::RenameIn>()?.newdir, 0)
            };
            let from = args.name()?;
            share.rename((dir, from), (newdir, args.name()?), flags)
        }
    }
}

fn caller(header: &InHeader, umask: u32) -> Caller {
    Caller {
        ids: Ids {
            uid: header.uid,
            gid: header.gid,
        },
        umask,
    }
}

fn making(
    share: &Share,
    opcode: Opcode,
    header: &InHeader,
    mut args: Args<'_>,
    reply: &mut Reply,
) -> Result<(), Errno> {
    let dir = header.nodeid;
    match opcode {
        Opcode::Symlink => {
            let name = args.name()?;
            let target = args.text()?;
            reply.push(&share.symlink(&caller(header, 0), dir, name, target)?)
        }
        Opcode::Mknod => {
            let asked: wire::MknodIn = args.take()?;
            let caller = caller(header, asked.umask);
            reply.push(&share.mknod(&caller, dir, args.name()?, &asked)?)
        }
        Opcode::Mkdir => {
            let asked: wire::MkdirIn = args.take()?;
            let caller = caller(header, asked.umask);
            reply.push(&share.mkdir(&caller, dir, args.name()?, asked.mode)?)
        }
        _ => {
            let asked: wire::CreateIn = args.take()?;
            let caller = caller(header, asked.umask);
            let (entry, open) = if opcode == Opcode::Create {
                share.create(&caller, dir, args.name()?, &asked)?
            } else {
                share.create_nameless(&caller, dir, &asked)?
            };
            reply.push(&entry)?;
            reply.push(&open)
        }
    }
}

fn attributes(
    share: &Share,
    opcode: Opcode,
    header: &InHeader,
    mut args: Args<'_>,
    reply: &mut Reply,
) -> Result<(), Errno> {
    let id = header.nodeid;
    match opcode {
        Opcode::Getattr => reply.push(&share.getattr(id)?),
        Opcode::Setattr => reply.push(&share.setattr(id, &args.take()?)?),
        Opcode::Statx => reply.push(&share.statx(id)?),
        Opcode::Readlink => share.readlink(id, reply),
        _ => {
            let asked: wire::AccessIn = args.take()?;
            share.access(id, caller(header, 0).ids, asked.mask)
        }
    }
}

fn xattrs(
    share: &Share,
    opcode: Opcode,
    header: &InHeader,
    mut args: Args<'_>,
    reply: &mut Reply,
) -> Result<(), Errno> {
    let id = header.nodeid;
    match opcode {
        Opcode::Setxattr => {
            let asked: wire::SetxattrIn = args.take()?;
            let name = args.text()?;
            share.setxattr(id, &asked, name, args.rest())
        }
        Opcode::Getxattr => {
            let asked: wire::GetxattrIn = args.take()?;
            share.getxattr(id, args.text()?, asked.size, reply)
        }
        Opcode::Listxattr => {
            let asked: wire::GetxattrIn = args.take()?;
            share.listxattr(id, asked.size, reply)
        }
        _ => share.removexattr(id, args.text()?),
    }
}

fn handles(
    share: &Share,
    opcode: Opcode,
    header: &InHeader,
    mut args: Args<'_>,
    reply: &mut Reply,
) -> Result<(), Errno> {
    let id = header.nodeid;
    match opcode {
        Opcode::Open => reply.push(&share.open_file(id, &args.take()?)?),
        Opcode::Opendir => reply.push(&share.open_dir(id)?),
        Opcode::Readdir | Opcode::Readdirplus => {
            let plus = opcode == Opcode::Readdirplus;
            share.readdir(id, &args.take()?, plus, reply)
        }
        Opcode::Fsync | Opcode::Fsyncdir => {
            let asked: wire::FsyncIn = args.take()?;
            share.fsync(id, asked.fh, asked.fsync_flags)
        }
        _ => {
            share.release(args.take::<wire::ReleaseIn>()?.fh);
            Ok(())
        }
    }
}

fn locks(
    share: &Share,
    opcode: Opcode,
    header: &InHeader,
    mut args: Args<'_>,
    reply: &mut Reply,
) -> Result<(), Errno> {
    let id = header.nodeid;
    match opcode {
        Opcode::Flush => share.flush(id, &args.take()?),
        Opcode::Setlk => share.set_lock(id, &args.take()?),
        _ => {
            let lk = share.test_lock(id, &args.take()?)?;
            reply.push(&wire::LkOut { lk })
        }
    }
}

fn data(
    share: &Share,
    opcode: Opcode,
    header: &InHeader,
    mut args: Args<'_>,
    reply: &mut Reply,
) -> Result<(), Errno> {
    let id = header.nodeid;
    let written = |size| wire::WriteOut { size, padding: 0 };
    match opcode {
        Opcode::Read => share.read(id, &args.take()?, reply),
        Opcode::Write => {
            let asked: wire::WriteIn = args.take()?;
            reply.push(&written(share.write(id, &asked, args.rest())?))
        }
        Opcode::Fallocate => share.fallocate(id, &args.take()?),
        Opcode::Lseek => {
            let offset = share.lseek(id, &args.take()?)?;
            reply.push(&wire::LseekOut { offset })
        }
        _ => reply.push(&written(share.copy(id, &args.take()?)?)),
    }
}
