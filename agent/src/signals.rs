//! The signals by which a machine's own programs ask PID 1 to end it, and those that an agent beside PID 1 outlives.
//!
//! `poweroff` and `reboot` of busybox, sysvinit and systemd do no more than that where they are
//! not told to force it.

use std::io;
use std::ptr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::power::{self, Ending};
use crate::serve::Machine;

/// What commands have between SIGTERM and SIGKILL when the machine ends from within.
const GRACE: Duration = Duration::from_secs(5);

/// Which signal asks for what: busybox init's, then systemd's, then the kernel's (Ctrl-Alt-Delete).
fn requests() -> [(i32, Ending); 7] {
    [
        (libc::SIGUSR2, Ending::PowerOff),
        (libc::SIGUSR1, Ending::PowerOff),
        (libc::SIGTERM, Ending::Restart),
        (libc::SIGRTMIN() + 3, Ending::PowerOff),
        (libc::SIGRTMIN() + 4, Ending::PowerOff),
        (libc::SIGRTMIN() + 5, Ending::Restart),
        (libc::SIGINT, Ending::Restart),
    ]
}

/// Blocks the signals in this thread and all it starts from now on.
pub fn block() {
    // SAFETY: `set` is a valid set, which the call only reads.
    unsafe {
        let set = set();
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut());
    }
}

/// Starts the thread that waits for them; they must be [blocked](block) in all threads.
pub fn start(machine: &Arc<Machine>) -> io::Result<()> {
    let machine = Arc::clone(machine);
    start_waiting(move |signal| {
        let asked = requests()
            .into_iter()
            .find(|(request, _)| *request == signal);
        if let Some((_, ending)) = asked {
            power::end(&machine, GRACE, ending);
        }
    })
}

/// Starts the thread that does `brace` where an init asks all processes to end; the signals must be
/// [blocked](block) in all threads, and nothing else comes of them.
///
/// Whoever carries the root lives on until it is killed, so that those have their files who have something to do.
pub fn outlive(brace: fn()) -> io::Result<()> {
    start_waiting(move |signal| {
        if signal == libc::SIGTERM {
            brace();
        }
    })
}

/// Starts the thread that does `each` with every signal that comes.
fn start_waiting(each: impl Fn(libc::c_int) + Send + 'static) -> io::Result<()> {
    let forever = move || {
        loop {
            // SAFETY: `set` is a valid set, which sigwaitinfo only reads; it may leave no information.
            each(unsafe { libc::sigwaitinfo(&set(), ptr::null_mut()) });
        }
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .stack_size(64 << 10)
        .spawn(forever)?;
    Ok(())
}

fn set() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data for which zero is the empty set; sigaddset writes into it only.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        for (signal, _) in requests() {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}
