//! Starting a command: fork, become what was asked for, execve.
//!
//! The child's side runs between fork and execve in a copy of a process that has other threads, so
//! it makes system calls on what was prepared before and nothing else: no allocation, no lock.
//! What fails there is reported through a close-on-exec pipe, whose end means that execve worked.

use std::ffi::{CStr, CString, c_char};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;

use agent::protocol::Refusal;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Resource, Rlimit};

use crate::command::{Command, Refused};
use crate::reap::{Child, Reaper};
use crate::tree::Tree;

/// The descriptors that become a command's 0, 1 and 2.
#[derive(Debug)]
pub struct Stdio {
    /// Standard input.
    pub stdin: OwnedFd,
    /// Standard output.
    pub stdout: OwnedFd,
    /// Standard error.
    pub stderr: OwnedFd,
    /// Whether they are a terminal, which then becomes the controlling one.
    pub is_terminal: bool,
}

/// The soft limit of open files that Linux itself gives to init; programs that use select(2) rely on it.
const SOFT_OPEN_FILES: u64 = 1024;

/// Where the child's side got to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Prepare,
    ChangeRoot,
    ChangeUser,
    ChangeDirectory,
    /// No candidate exists.
    Find,
    Execute,
}

impl Step {
    fn from_u8(step: u8) -> Self {
        match step {
            1 => Self::ChangeRoot,
            2 => Self::ChangeUser,
            3 => Self::ChangeDirectory,
            4 => Self::Find,
            5 => Self::Execute,
            _ => Self::Prepare,
        }
    }
}

type Failure = (Step, Errno);

/// Runs `command` in `tree` as the leader of a new session and process group.
pub fn spawn(
    reaper: &Reaper,
    tree: &Tree,
    command: &Command,
    stdio: Stdio,
) -> Result<Child, Refused> {
    let setup = |error: io::Error| {
        Refused::other(format!("no process could be made for the command: {error}"))
    };
    let (report_read, report_write) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|error| setup(error.into()))?;
    let image = Image {
        command,
        argv: pointers(&command.argv),
        envp: pointers(&command.envp),
        stdio: &stdio,
        new_root: tree.new_root().map_err(setup)?,
    };
    let report = report_write.as_raw_fd();
    // SAFETY: `become_command` and `report_failure` only make system calls, on memory that is there already.
    let child = unsafe {
        reaper.fork(|| {
            let failure = image.become_command();
            report_failure(report, failure)
        })
    }
    .map_err(setup)?;
    drop(report_write);
    drop(stdio);
    let mut report = [0u8; 5];
    match std::fs::File::from(report_read).read(&mut report) {
        Ok(0) => Ok(child),
        Ok(5) => {
            let [step, errno @ ..] = report;
            let errno = Errno::from_raw_os_error(i32::from_le_bytes(errno));
            Err(refusal(command, Step::from_u8(step), errno))
        }
        Ok(_) => Err(setup(io::ErrorKind::UnexpectedEof.into())),
        Err(error) => Err(setup(error)),
    }
}

/// All that the child needs, made before the fork.
struct Image<'a> {
    command: &'a Command,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    stdio: &'a Stdio,
    new_root: Option<BorrowedFd<'a>>,
}

impl Image<'_> {
    /// The child's side; comes back only with what failed.
    fn become_command(&self) -> Failure {
        match self.prepare() {
            Ok(()) => self.execute(),
            Err(failure) => failure,
        }
    }

    fn prepare(&self) -> Result<(), Failure> {
        let at = |step| move |errno| (step, errno);
        rustix::process::setsid().map_err(at(Step::Prepare))?;
        restore_signals();
        let limit = rustix::process::getrlimit(Resource::Nofile);
        let soft = Some(
            limit
                .maximum
                .unwrap_or(SOFT_OPEN_FILES)
                .min(SOFT_OPEN_FILES),
        );
        let limit = Rlimit {
            current: soft,
            ..limit
        };
        rustix::process::setrlimit(Resource::Nofile, limit).map_err(at(Step::Prepare))?;
        if self.stdio.is_terminal {
            rustix::process::ioctl_tiocsctty(&self.stdio.stdin).map_err(at(Step::Prepare))?;
        }
        self.install_stdio().map_err(at(Step::Prepare))?;
        if let Some(root) = self.new_root {
            rustix::process::fchdir(root).map_err(at(Step::ChangeRoot))?;
            rustix::process::chroot(c".").map_err(at(Step::ChangeRoot))?;
        }
        self.change_user().map_err(at(Step::ChangeUser))?;
        // As the user, so that a directory which only root can enter is refused.
        let mut entered = Err(Errno::NOENT);
        for directory in &self.command.directories {
            if entered.is_err() {
                entered = rustix::process::chdir(directory.as_c_str());
            }
        }
        entered.map_err(at(Step::ChangeDirectory))
    }

    /// Sources are above 2 (the agent keeps 0, 1 and 2 open), so no copy overwrites a later source.
    fn install_stdio(&self) -> Result<(), Errno> {
        let sources = [&self.stdio.stdin, &self.stdio.stdout, &self.stdio.stderr];
        for (target, source) in sources.into_iter().enumerate() {
            // SAFETY: dup2 takes no memory; replacing 0, 1 and 2 of this process is its purpose.
            if unsafe { libc::dup2(source.as_fd().as_raw_fd(), target as RawFd) } < 0 {
                return Err(last_errno());
            }
        }
        Ok(())
    }

    fn change_user(&self) -> Result<(), Errno> {
        let user = &self.command.user;
        let (own_uid, own_gid) = (rustix::process::geteuid(), rustix::process::getegid());
        if !own_uid.is_root() && (own_uid.as_raw(), own_gid.as_raw()) == (user.uid, user.gid) {
            // Nobody but root may set groups. This is how the tests run without being root.
            return Ok(());
        }
        // The raw system calls: the C library's wrappers would signal all other threads, of which a
        // forked process has none, and take a lock for it.
        // SAFETY: `groups` is valid for its length, and gid_t is u32.
        let set =
            unsafe { libc::syscall(libc::SYS_setgroups, user.groups.len(), user.groups.as_ptr()) };
        if set != 0 {
            return Err(last_errno());
        }
        let (gid, uid) = (user.gid, user.uid);
        // SAFETY: takes no memory.
        if unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) } != 0 {
            return Err(last_errno());
        }
        // SAFETY: takes no memory.
        if unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) } != 0 {
            return Err(last_errno());
        }
        Ok(())
    }

    /// As execvp(3): a candidate that is missing or forbidden gives way to the next one.
    fn execute(&self) -> Failure {
        let mut failure = (Step::Find, Errno::NOENT);
        for candidate in &self.command.candidates {
            let errno = self.execve(candidate);
            match errno {
                Errno::NOENT | Errno::NOTDIR if !exists(candidate) => {}
                Errno::ACCESS if !exists(candidate) => {}
                Errno::ACCESS => failure = (Step::Execute, errno),
                _ => return (Step::Execute, errno),
            }
        }
        failure
    }

    fn execve(&self, path: &CStr) -> Errno {
        // SAFETY: `argv` and `envp` are null-terminated arrays of pointers to C strings that `command` owns.
        unsafe { libc::execve(path.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
        last_errno()
    }
}

/// Gives every signal its default action and unblocks it: the agent's own settings (SIGPIPE
/// ignored, the power signals blocked) survive execve otherwise.
///
/// The raw system call, because the C library refuses the two signals that it uses itself.
fn restore_signals() {
    /// The kernel's `struct sigaction` of 64-bit machines, all zero: SIG_DFL, no flags, no mask.
    const DEFAULT: [u64; 4] = [0; 4];
    /// Bytes of the kernel's `sigset_t`.
    const SET_SIZE: usize = 8;
    for signal in 1..=64 {
        // SAFETY: the kernel reads one `struct sigaction`. It refuses SIGKILL and SIGSTOP, which is right.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT.as_ptr(),
                ptr::null::<u64>(),
                SET_SIZE,
            );
        }
    }
    // SAFETY: sigset_t is plain data for which zero is the empty set; the call reads it only.
    unsafe {
        let empty: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &empty, ptr::null_mut());
    }
}

fn exists(path: &CStr) -> bool {
    rustix::fs::stat(path).is_ok()
}

fn report_failure(report: RawFd, (step, errno): Failure) {
    let [a, b, c, d] = errno.raw_os_error().to_le_bytes();
    let message = [step as u8, a, b, c, d];
    // SAFETY: `message` is valid for its length. Where the write fails the agent is gone.
    unsafe { libc::write(report, message.as_ptr().cast(), message.len()) };
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    let all = strings.iter().map(|string| string.as_ptr());
    all.chain([ptr::null()]).collect()
}

/// Puts what the child's side reported into words.
fn refusal(command: &Command, step: Step, errno: Errno) -> Refused {
    let program = &command.program;
    let error = io::Error::from(errno);
    let (reason, message) = match (step, errno) {
        (Step::Find, _) => (
            Refusal::NotFound,
            format!("{program}: no such program in the machine"),
        ),
        (Step::Execute, Errno::NOENT) => (
            Refusal::NotExecutable,
            format!("{program}: it is there, but the interpreter or loader it names is not"),
        ),
        (Step::Execute, Errno::NOEXEC) => (
            Refusal::NotExecutable,
            format!(
                "{program}: it is neither a program for this machine nor a script that starts with #!"
            ),
        ),
        (Step::Execute, Errno::TOOBIG) => (
            Refusal::Other,
            format!("{program}: its arguments and environment are longer than Linux takes"),
        ),
        (Step::Execute, Errno::NOMEM | Errno::AGAIN) => (
            Refusal::Other,
            format!("{program} could not be started: {error}"),
        ),
        (Step::Execute, _) => (
            Refusal::NotExecutable,
            format!("{program} cannot be executed: {error}"),
        ),
        (Step::ChangeDirectory, _) => {
            let directory = command
                .directories
                .first()
                .map(|path| path.to_string_lossy());
            let directory = directory.unwrap_or_default();
            (
                Refusal::Other,
                format!("the working directory {directory} cannot be entered: {error}"),
            )
        }
        (Step::ChangeUser, _) => {
            let uid = command.user.uid;
            (
                Refusal::Other,
                format!("the command cannot become user {uid}: {error}"),
            )
        }
        (Step::ChangeRoot, _) => (
            Refusal::Other,
            format!("the machine's root cannot be entered: {error}"),
        ),
        (Step::Prepare, _) => (
            Refusal::Other,
            format!("the command's process could not be set up: {error}"),
        ),
    };
    Refused { reason, message }
}
