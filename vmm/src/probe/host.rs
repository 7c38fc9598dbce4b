//! Facilities of the host besides KVM, for `mvm doctor`: each is tried, not guessed at.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::Check;

/// The emulator that machines fall back to.
const QEMU: &str = "qemu-system-x86_64";
/// What the smallest useful machine takes, with the process around it.
const SMALLEST_MACHINE_KIB: u64 = 160 << 10;

/// TAP interfaces: whether `/dev/net/tun` opens.
pub fn tap() -> Check {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    match rustix::fs::open(c"/dev/net/tun", flags, Mode::empty()) {
        Ok(_) => Check::ok("/dev/net/tun opens"),
        Err(Errno::ACCESS | Errno::PERM) => Check::missing(
            "/dev/net/tun may not be opened",
            "run `sudo chmod 666 /dev/net/tun`; an interface still belongs to whom it was made for",
        ),
        Err(error) => Check::missing(
            format!("/dev/net/tun does not open ({})", io::Error::from(error)),
            "load it with `sudo modprobe tun`",
        ),
    }
}

/// io_uring: whether a ring can be set up. Without it disks are served by threads.
pub fn io_uring() -> Check {
    // struct io_uring_params; all zero asks for nothing special.
    let mut params = [0_u64; 15];
    // SAFETY: the kernel reads and writes the 120 bytes of `params`, which live through the call.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    if ring >= 0 {
        close(ring);
        return Check::ok("rings can be set up");
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENOSYS) => Check::slow(
            "this kernel has no io_uring: disks are served by threads",
            "use a kernel with CONFIG_IO_URING",
        ),
        error if error.raw_os_error() == Some(libc::EPERM) => Check::slow(
            "io_uring is not permitted: disks are served by threads",
            "run `sudo sysctl kernel.io_uring_disabled=0`, or allow it in the container's seccomp profile",
        ),
        error => Check::slow(
            format!("io_uring fails ({error}): disks are served by threads"),
            "raise the locked-memory limit (`ulimit -l`)",
        ),
    }
}

/// Landlock: which version of its ABI the kernel speaks.
pub fn landlock() -> Check {
    const LANDLOCK_CREATE_RULESET_VERSION: libc::c_long = 1;
    // SAFETY: with this flag the kernel takes no attribute, so a null pointer of length 0, and only
    // returns a number.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0_usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    if version > 0 {
        return Check::ok(format!("ABI version {version}"));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => Check::missing(
            "landlock is off in this kernel",
            "add landlock to the kernel's lsm= list",
        ),
        _ => Check::missing(
            format!("this kernel has no landlock ({error})"),
            "use Linux 5.13 or newer with CONFIG_SECURITY_LANDLOCK",
        ),
    }
}

/// User namespaces: whether this user can make one.
pub fn user_namespaces() -> Check {
    match try_user_namespace() {
        Ok(()) => Check::ok("this user can make user namespaces"),
        Err(error) => Check::missing(
            format!("this user cannot make user namespaces ({error})"),
            namespace_mend(),
        ),
    }
}

fn namespace_mend() -> &'static str {
    let is = |path, value: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == value);
    if is(
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
    ) {
        "run `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
    } else if is("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        "run `sudo sysctl kernel.unprivileged_userns_clone=1`"
    } else {
        "run `sudo sysctl user.max_user_namespaces=10000`, or allow it in the container's seccomp profile"
    }
}

/// A child that tries: a process with threads cannot try for itself.
fn try_user_namespace() -> io::Result<()> {
    // SAFETY: the child calls nothing but unshare and _exit, which are async-signal-safe and touch
    // no memory of the parent's.
    let child = unsafe {
        match libc::fork() {
            0 => {
                let failed = libc::unshare(libc::CLONE_NEWUSER) != 0;
                libc::_exit(if failed { *libc::__errno_location() } else { 0 })
            }
            child => child,
        }
    };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut status = 0;
    loop {
        // SAFETY: `status` lives through the call.
        let waited = unsafe { libc::waitpid(child, &mut status, 0) };
        if waited == child {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
        (true, 0) => Ok(()),
        (true, errno) => Err(io::Error::from_raw_os_error(errno)),
        (false, _) => Err(io::Error::other("the trial was killed")),
    }
}

/// Memory: how much there is for machines, and whether it comes in huge pages.
pub fn memory() -> Check {
    let text = match fs::read_to_string("/proc/meminfo") {
        Ok(text) => text,
        Err(error) => {
            return Check::missing(
                format!("/proc/meminfo cannot be read ({error})"),
                "mount /proc",
            );
        }
    };
    let huge = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
        .ok()
        .and_then(|text| selected(&text).map(str::to_owned));
    judge_memory(&text, huge.as_deref())
}

fn judge_memory(meminfo: &str, shared_huge_pages: Option<&str>) -> Check {
    let total = meminfo_kib(meminfo, "MemTotal").unwrap_or(0);
    let available = meminfo_kib(meminfo, "MemAvailable").unwrap_or(0);
    let reserved = meminfo_kib(meminfo, "HugePages_Free").unwrap_or(0);
    let detail = format!(
        "{} MiB of {} MiB available; huge pages: {reserved} reserved, transparent for shared memory: {}",
        available >> 10,
        total >> 10,
        shared_huge_pages.unwrap_or("unknown"),
    );
    if available < SMALLEST_MACHINE_KIB {
        Check::missing(detail, "end something that takes memory")
    } else if reserved == 0 && matches!(shared_huge_pages, None | Some("never" | "deny")) {
        Check::slow(
            detail,
            "`echo advise | sudo tee /sys/kernel/mm/transparent_hugepage/shmem_enabled` makes guest memory faster",
        )
    } else {
        Check::ok(detail)
    }
}

/// A field of /proc/meminfo, in KiB (or a count, where it is one).
fn meminfo_kib(meminfo: &str, field: &str) -> Option<u64> {
    meminfo.lines().find_map(|line| {
        let value = line.strip_prefix(field)?.strip_prefix(':')?;
        value.split_ascii_whitespace().next()?.parse().ok()
    })
}

/// The choice in brackets of a sysfs file such as `always [madvise] never`.
fn selected(choices: &str) -> Option<&str> {
    choices
        .split_ascii_whitespace()
        .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

/// QEMU, which machines run in where KVM cannot: where it is and its version.
pub fn qemu() -> Check {
    let Some(path) = find_program(QEMU, std::env::var_os("PATH").as_deref()) else {
        return Check::missing(format!("{QEMU} is not installed"), qemu_install_command());
    };
    let shown = path.display();
    let output = Command::new(&path)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => {
            match qemu_version(&String::from_utf8_lossy(&output.stdout)) {
                Some(version) => Check::ok(format!("{shown}, version {version}")),
                None => Check::missing(format!("{shown} is not QEMU"), qemu_install_command()),
            }
        }
        Ok(output) => Check::missing(
            format!("{shown} does not run ({})", output.status),
            qemu_install_command(),
        ),
        Err(error) => Check::missing(
            format!("{shown} does not run ({error})"),
            qemu_install_command(),
        ),
    }
}

/// The first executable file called `name` in the directories of `path`, a value of PATH.
pub fn find_program(name: &str, path: Option<&OsStr>) -> Option<PathBuf> {
    std::env::split_paths(path?)
        .map(|directory| directory.join(name))
        .find(|file| {
            fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        })
}

/// The version in what QEMU prints when it is asked for its version.
pub fn qemu_version(output: &str) -> Option<&str> {
    output
        .strip_prefix("QEMU emulator version ")?
        .split_ascii_whitespace()
        .next()
}

fn qemu_install_command() -> &'static str {
    const COMMANDS: [(&str, &str); 5] = [
        ("/usr/bin/apt-get", "sudo apt-get install qemu-system-x86"),
        ("/usr/bin/dnf", "sudo dnf install qemu-system-x86-core"),
        ("/usr/bin/pacman", "sudo pacman -S qemu-system-x86"),
        ("/usr/bin/zypper", "sudo zypper install qemu-x86"),
        ("/sbin/apk", "sudo apk add qemu-system-x86_64"),
    ];
    COMMANDS
        .iter()
        .find(|(client, _)| Path::new(client).exists())
        .map_or(
            "install QEMU with the system's package client",
            |(_, command)| command,
        )
}

fn close(fd: libc::c_long) {
    use std::os::fd::{FromRawFd, OwnedFd};
    if let Ok(fd) = i32::try_from(fd) {
        // SAFETY: the descriptor was just made by the kernel for us and nothing else owns it.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Status;

    const MEMINFO: &str = "MemTotal:        8000000 kB\nMemFree:  1 kB\n\
                           MemAvailable:    4096000 kB\nHugePages_Free:        0\n";

    #[test]
    fn memory_is_judged_by_what_is_available_and_by_huge_pages() {
        let plenty = judge_memory(MEMINFO, Some("advise"));
        assert_eq!(plenty.status, Status::Ok);
        assert!(plenty.detail.starts_with("4000 MiB of 7812 MiB available"));
        assert_eq!(judge_memory(MEMINFO, Some("never")).status, Status::Slow);
        let little = MEMINFO.replace("4096000", "40960");
        assert_eq!(judge_memory(&little, None).status, Status::Missing);
        assert_eq!(judge_memory("", None).status, Status::Missing);
    }

    #[test]
    fn fields_and_choices_are_read_exactly() {
        assert_eq!(meminfo_kib(MEMINFO, "MemTotal"), Some(8_000_000));
        assert_eq!(meminfo_kib(MEMINFO, "Mem"), None);
        assert_eq!(
            selected("always within_size [advise] never\n"),
            Some("advise")
        );
        assert_eq!(selected("never"), None);
    }

    #[test]
    fn a_program_is_found_where_it_can_be_executed() {
        let (empty, full) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let program = full.path().join("tool");
        fs::write(&program, "").unwrap();
        let path = std::env::join_paths([empty.path(), full.path()]).unwrap();
        assert_eq!(find_program("tool", Some(&path)), None, "not executable");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find_program("tool", Some(&path)), Some(program));
        assert_eq!(find_program("other", Some(&path)), None);
        assert_eq!(find_program("tool", None), None);
    }

    #[test]
    fn qemus_version_is_read_from_what_it_prints() {
        let printed = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright";
        assert_eq!(qemu_version(printed), Some("7.2.22"));
        assert_eq!(qemu_version("something else"), None);
    }

    /// What they find depends on the host; that a fault comes with its mend does not.
    #[test]
    fn every_check_says_what_it_found_and_how_to_mend_it() {
        let checks: [(&str, Check); 6] = [
            ("tap", tap()),
            ("io_uring", io_uring()),
            ("landlock", landlock()),
            ("user namespaces", user_namespaces()),
            ("memory", memory()),
            ("qemu", qemu()),
        ];
        for (name, check) in checks {
            println!("{name}: {check:?}");
            assert!(!check.detail.is_empty(), "{name}");
            assert_eq!(check.mend.is_none(), check.status == Status::Ok, "{name}");
        }
    }
}
