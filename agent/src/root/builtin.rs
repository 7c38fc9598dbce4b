//! The small built-in root: the initramfs itself with busybox, made to look like a Linux system.

use std::ffi::c_char;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::ptr;

use crate::reap::{Child, Reaper};

/// Where the host puts busybox.
const BUSYBOX: &str = "/bin/busybox";

/// Directories with their modes. Busybox links its applets into the first four.
const DIRECTORIES: [(&str, u32); 9] = [
    ("/bin", 0o755),
    ("/sbin", 0o755),
    ("/usr/bin", 0o755),
    ("/usr/sbin", 0o755),
    ("/etc", 0o755),
    ("/root", 0o700),
    ("/run", 0o755),
    ("/tmp", 0o1777),
    ("/var/tmp", 0o1777),
];

/// Files that programs read.
const FILES: [(&str, &str); 5] = [
    (
        "/etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    ),
    ("/etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    ("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    ("/etc/resolv.conf", ""),
    ("/etc/shells", "/bin/sh\n"),
];

/// Makes the directories and files that are not there yet.
pub fn write_files() -> io::Result<()> {
    for (directory, mode) in DIRECTORIES {
        fs::create_dir_all(directory)?;
        fs::set_permissions(directory, Permissions::from_mode(mode))?;
    }
    for (path, content) in FILES {
        match fs::File::create_new(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            file => io::Write::write_all(&mut file?, content.as_bytes())?,
        }
    }
    Ok(())
}

/// Starts busybox to link its applets; None where the host brought no busybox.
///
/// Hundreds of links take a while in an emulated machine, so the rest of the start goes on meanwhile.
pub fn link_applets(reaper: &Reaper) -> io::Result<Option<Child>> {
    if !Path::new(BUSYBOX).exists() {
        return Ok(None);
    }
    // SAFETY: the child's side makes system calls on constants only.
    unsafe { reaper.fork(exec_install) }.map(Some)
}

fn exec_install() {
    let argv: [*const c_char; 4] = [
        c"busybox".as_ptr(),
        c"--install".as_ptr(),
        c"-s".as_ptr(),
        ptr::null(),
    ];
    // SAFETY: path and arguments are constant C strings, and both arrays end with null.
    unsafe {
        libc::execve(
            c"/bin/busybox".as_ptr(),
            argv.as_ptr(),
            argv.as_ptr().add(3),
        )
    };
}
