//! A root's own init as PID 1, with the agent beside it.
//!
//! The agent steps beside PID 1 before it has threads, as only then a copy of it is a complete process. PID 1 waits
//! until there is a root, which may be one that the agent has to serve first, and then becomes what the root brings.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr;

use anyhow::{Context, Result, anyhow};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::power;
use crate::tree::Tree;

/// Where the kernel keeps the arguments of a process: a field of /proc/PID/stat, counted from its state.
const ARG_START: usize = 45;

/// How much of PID 1's memory is looked at at a time, bytes.
const PIECE: usize = 64 << 10;

/// PID 1 as it waits to become a root's own init.
#[derive(Debug)]
pub struct Successor {
    program: String,
    /// Takes the number of the agent's descriptor of the root.
    root: File,
    /// Says why it could not be executed; its end says that it is.
    report: File,
}

/// Lets PID 1 wait to become `program`; what returns is the agent in a new process.
///
/// To be called before the agent has threads.
pub fn step_beside(program: &str) -> Result<Successor> {
    let path = CString::new(program)?;
    let (root_read, root_write) = pipe_with(PipeFlags::CLOEXEC)?;
    let (report_read, report_write) = pipe_with(PipeFlags::CLOEXEC)?;
    // SAFETY: there is one thread, so the copy is a complete process.
    match unsafe { libc::fork() } {
        -1 => {
            Err(io::Error::last_os_error()).context("the agent cannot step beside the root's init")
        }
        0 => {
            drop((root_read, report_write));
            rustix::process::setsid().context("the agent cannot have a session of its own")?;
            Ok(Successor {
                program: program.to_owned(),
                root: root_write.into(),
                report: report_read.into(),
            })
        }
        agent => {
            drop((root_write, report_read));
            let error = await_root(agent, root_read.into())
                .and_then(|root| Err(become_init(&path, root.as_ref())));
            report_and_wait(report_write.into(), &error)
        }
    }
}

impl Successor {
    /// Has it become the init of `tree`, which is complete.
    pub fn take_over(&self, tree: &Tree) -> Result<()> {
        let program = &self.program;
        tree.open(program, OFlags::PATH)
            .with_context(|| format!("the root filesystem has no {program} to be its init"))?;
        let number = tree.new_root()?.map_or(-1, |root| root.as_raw_fd());
        (&self.root).write_all(&number.to_le_bytes())?;
        let mut errno = [0; 4];
        match (&self.report).read(&mut errno)? {
            0 => Ok(()),
            _ => {
                let error = io::Error::from_raw_os_error(i32::from_le_bytes(errno));
                Err(anyhow!(
                    "{program} cannot be executed as the root's init: {error}"
                ))
            }
        }
    }
}

/// Marks this process as one that a root filesystem needs: systemd leaves those alone until the very end that have an
/// `@` in front of their name (systemd.io/ROOT_STORAGE_DAEMONS).
pub fn carry_root() -> Result<()> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let name_end = stat.rfind(')').unwrap_or_default();
    let fields = stat.get(name_end + 1..).unwrap_or_default();
    let start = fields.split_ascii_whitespace().nth(ARG_START);
    let start = start.and_then(|start| start.parse().ok());
    let start: u64 = start.context("/proc/self/stat does not tell where the arguments are")?;
    let memory = File::options().write(true).open("/proc/self/mem")?;
    Ok(memory.write_all_at(b"@", start)?)
}

/// Brings all of PID 1's program into memory. An init that kills all processes on its way to the machine's end kills
/// this one too, and its root with it: from then on it has nothing but what it has in memory.
pub fn hold_in_memory() {
    // Where that fails, it may still have what it needs.
    let Ok(memory) = File::open("/proc/1/mem") else {
        return;
    };
    let maps = fs::read_to_string("/proc/1/maps").unwrap_or_default();
    let mut piece = vec![0; PIECE];
    for (mut at, end) in maps.lines().filter_map(parse_mapped_file) {
        while at < end {
            let length = PIECE.min(usize::try_from(end - at).unwrap_or(PIECE));
            let Some(piece) = piece.get_mut(..length) else {
                break;
            };
            match memory.read_at(piece, at) {
                Ok(read @ 1..) => at += read as u64,
                _ => break,
            }
        }
    }
}

/// From where to where a file is mapped, by a line of /proc/PID/maps; None for other memory.
fn parse_mapped_file(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let inode = fields.nth(2)?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    (permissions.starts_with('r') && inode != "0").then_some((number(start)?, number(end)?))
}

/// Waits for the root, as PID 1; None where that is the one it has.
fn await_root(agent: libc::pid_t, mut from: File) -> io::Result<Option<OwnedFd>> {
    let mut number = [0; 4];
    if from.read_exact(&mut number).is_err() {
        // The agent is gone, and nothing will ever come.
        power::cut();
    }
    match i32::from_le_bytes(number) {
        -1 => Ok(None),
        number => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let path = format!("/proc/{agent}/fd/{number}");
            Ok(Some(openat(CWD, path, flags, Mode::empty())?))
        }
    }
}

/// Comes back only with what failed.
fn become_init(path: &CString, root: Option<&OwnedFd>) -> io::Error {
    if let Some(root) = root {
        let entered = rustix::process::fchdir(root).and_then(|()| rustix::process::chroot(c"."));
        if let Err(error) = entered {
            return error.into();
        }
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
fn report_and_wait(mut report: File, error: &io::Result<()>) -> ! {
    let errno = error.as_ref().err().and_then(io::Error::raw_os_error);
    // An agent that is gone hears nothing.
    let _ = report.write_all(&errno.unwrap_or(libc::EIO).to_le_bytes());
    drop(report);
    loop {
        // SAFETY: pause(2) takes no memory.
        unsafe { libc::pause() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_that_can_be_read_are_brought_into_memory() {
        let file = "7f0010000000-7f0010021000 r-xp 00000000 fe:00 1573 /bin/a program";
        assert_eq!(
            parse_mapped_file(file),
            Some((0x7f00_1000_0000, 0x7f00_1002_1000))
        );
        for other in [
            "7f0010000000-7f0010021000 rw-p 00000000 00:00 0",
            "7f0010000000-7f0010021000 ---p 00000000 fe:00 1573 /bin/program",
            "7ffd3a5d1000-7ffd3a5f2000 rw-p 00000000 00:00 0 [stack]",
            "",
            "-",
        ] {
            assert_eq!(parse_mapped_file(other), None, "{other}");
        }
    }

    #[test]
    fn all_of_the_mark_is_seen_by_others() {
        let own = || fs::read("/proc/self/cmdline").unwrap();
        let before = own();
        carry_root().unwrap();
        let after = own();
        assert_eq!(after.first(), Some(&b'@'));
        assert_eq!(after.get(1..), before.get(1..));
    }
}
