//! The machine's end: processes first, then filesystems, then the power.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use rustix::process::getpid;
use rustix::system::{RebootCommand, reboot};

use crate::process;
use crate::serve::Machine;

/// How long killed processes have to vanish: one that is stuck in the kernel holds nothing up.
const KILL_PATIENCE: Duration = Duration::from_secs(2);

/// How often an own init is looked at while it shuts the machine down.
const STEP: Duration = Duration::from_millis(50);

/// How a machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The power goes off.
    PowerOff,
    /// It starts again.
    Restart,
}

/// Ends all processes (SIGTERM, then SIGKILL after `grace`) and powers off.
pub fn off(machine: &Machine, grace: Duration) {
    end(machine, grace, Ending::PowerOff);
}

/// Ends all processes, makes the disks clean, and ends the machine. Only the first call does anything.
pub fn end(machine: &Machine, grace: Duration, ending: Ending) {
    static ENDING: AtomicBool = AtomicBool::new(false);
    if ENDING.swap(true, Ordering::Relaxed) {
        return;
    }
    if getpid().is_init() {
        signal_all(libc::SIGTERM);
        signal_all(libc::SIGCONT);
        if !machine.reaper.wait_until_childless(grace) {
            signal_all(libc::SIGKILL);
            machine.reaper.wait_until_childless(KILL_PATIENCE);
        }
    } else {
        // A working init takes the machine down, and the agent with it, before this returns.
        ask_init(ending);
        wait_for_processes(grace);
        signal_all(libc::SIGKILL);
        wait_for_processes(KILL_PATIENCE);
    }
    rustix::fs::sync();
    close_filesystems(machine);
    finish(ending);
}

/// Cuts the power after writing back what can be: for a machine that cannot go on.
pub fn cut() {
    rustix::fs::sync();
    finish(Ending::PowerOff);
}

fn finish(ending: Ending) {
    // What was said last is still in the console's buffer; without a console there is nothing to wait for.
    let _ = rustix::termios::tcdrain(std::io::stderr());
    let command = match ending {
        Ending::PowerOff => RebootCommand::PowerOff,
        Ending::Restart => RebootCommand::Restart,
    };
    let failed = reboot(command);
    eprintln!("mvm-agent: the kernel does not end the machine: {failed:?}");
}

/// Signals every process but this one and PID 1.
fn signal_all(signal: i32) {
    // SAFETY: kill(2) takes no memory. It fails only where there is nothing to signal.
    unsafe { libc::kill(-1, signal) };
}

/// Asks the root's own init in the way that its kind understands.
fn ask_init(ending: Ending) {
    let is_systemd = fs::exists("/proc/1/root/run/systemd/system").unwrap_or(false);
    let signal = match (is_systemd, ending) {
        // systemd(1): start poweroff.target, reboot.target.
        (true, Ending::PowerOff) => libc::SIGRTMIN() + 4,
        (true, Ending::Restart) => libc::SIGRTMIN() + 5,
        // busybox init and others of its kind.
        (false, Ending::PowerOff) => libc::SIGUSR2,
        (false, Ending::Restart) => libc::SIGTERM,
    };
    // SAFETY: kill(2) takes no memory.
    unsafe { libc::kill(1, signal) };
}

/// Waits until no process is left but PID 1 and this one.
fn wait_for_processes(patience: Duration) {
    let own = getpid().as_raw_pid();
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        let is_other = |process: &process::Process| {
            !process.is_kernel && process.state != b'Z' && process.pid != 1 && process.pid != own
        };
        match process::list() {
            Ok(processes) if processes.iter().any(is_other) => thread::sleep(STEP),
            _ => return,
        }
    }
}

/// Unmounts what can be unmounted and makes the rest read-only, the last mounted first.
///
/// A mount that refuses is in use or has no other state to be in; its data is written back already.
fn close_filesystems(machine: &Machine) {
    if let Ok(Some(root)) = machine.root.new_root() {
        // This is the end: no thread needs the initramfs any more.
        let entered = rustix::process::fchdir(root).and_then(|()| rustix::process::chroot(c"."));
        if let Err(error) = entered {
            eprintln!("mvm-agent: the root cannot be entered for unmounting: {error}");
            return;
        }
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for (target, filesystem) in mounts.lines().rev().filter_map(parse_mount) {
        let is_virtual = matches!(
            filesystem,
            "proc" | "sysfs" | "devtmpfs" | "devpts" | "tmpfs" | "cgroup2" | "rootfs" | "9p"
        );
        if is_virtual {
            continue;
        }
        if unmount(target.as_str(), UnmountFlags::empty()).is_err() {
            let _ = mount_remount(target.as_str(), MountFlags::RDONLY, c"");
        }
    }
    rustix::fs::sync();
}

/// Mount point and filesystem of a line of /proc/self/mounts (fstab(5), with its octal escapes).
fn parse_mount(line: &str) -> Option<(String, &str)> {
    let mut fields = line.split(' ').skip(1);
    let target = unescape(fields.next()?);
    Some((target, fields.next()?))
}

fn unescape(field: &str) -> String {
    let escapes = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ];
    escapes
        .iter()
        .fold(field.to_owned(), |text, (escape, character)| {
            text.replace(escape, character)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_a_space_is_read_as_it_is() {
        let line = "/dev/vdb /media/my\\040disk ext4 rw,relatime 0 0";
        assert_eq!(
            parse_mount(line),
            Some(("/media/my disk".to_owned(), "ext4"))
        );
        assert_eq!(parse_mount("half"), None);
    }
}
