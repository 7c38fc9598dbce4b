//! The kernel's console: where the agent speaks when the host cannot be reached otherwise.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic;

use crate::power;

/// Makes /dev/console standard input, output and error, or /dev/null where the kernel has no console.
///
/// After this the numbers 0, 1 and 2 are taken, so no descriptor opened later has one of them.
pub fn attach() -> io::Result<()> {
    let open = |path| File::options().read(true).write(true).open(path);
    let console = OwnedFd::from(open("/dev/console").or_else(|_| open("/dev/null"))?);
    for target in 0..=2 {
        if console.as_raw_fd() == target {
            continue;
        }
        // SAFETY: takes no memory; nothing owns 0, 1 and 2 of a fresh PID 1 but the console itself.
        if unsafe { libc::dup2(console.as_raw_fd(), target) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    if console.as_raw_fd() <= 2 {
        // It is one of the three itself, and stays open as such.
        std::mem::forget(console);
    }
    Ok(())
}

/// A panic is reported and ends the machine: the kernel would only hang after its init aborted.
pub fn power_off_on_panic() {
    panic::set_hook(Box::new(|panic| {
        eprintln!("mvm-agent: this is a bug in the agent, the machine ends: {panic}");
        power::cut();
    }));
}
