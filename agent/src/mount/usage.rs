//! Who keeps a folder mounted, as far as /proc tells: for whoever wants to unmount it.

use std::fs;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::attach::device_of;
use crate::process::{self, Entry};

/// So many are named.
const MAX_NAMED: usize = 5;

/// One sentence that says who uses the filesystem with this device number.
pub fn sentence(device: u64) -> String {
    let mut users = Vec::new();
    for Entry { pid, .. } in process::entries().unwrap_or_default() {
        if let Some(how) = usage(pid, device) {
            users.push(format!("{} (pid {pid}, {how})", name(pid)));
        }
    }
    let more = users.len().saturating_sub(MAX_NAMED);
    users.truncate(MAX_NAMED);
    match (users.is_empty(), more) {
        (true, _) => {
            "it is in use, by something that is mounted below it or by the kernel itself".to_owned()
        }
        (false, 0) => format!("it is in use by {}", users.join(", ")),
        (false, more) => format!("it is in use by {} and {more} more", users.join(", ")),
    }
}

/// What a process has of the filesystem: the first thing that is found.
fn usage(process: libc::pid_t, device: u64) -> Option<&'static str> {
    let is_there = |path: &str| {
        // Nobody is asked: the kernel knows what a file is on.
        let seen = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::empty());
        seen.is_ok_and(|seen| device_of(&seen) == device)
    };
    let links = [
        ("cwd", "its working directory"),
        ("root", "its root directory"),
        ("exe", "the program it runs"),
    ];
    for (link, how) in links {
        if is_there(&format!("/proc/{process}/{link}")) {
            return Some(how);
        }
    }
    let open = fs::read_dir(format!("/proc/{process}/fd"))
        .into_iter()
        .flatten();
    let mut open = open.flatten().map(|entry| entry.path());
    if open.any(|path| path.to_str().is_some_and(is_there)) {
        return Some("an open file");
    }
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
    maps.lines()
        .any(|line| mapped(line) == Some(device))
        .then_some("a mapped file")
}

/// The device of the file in a line of proc_pid_maps(5).
fn mapped(line: &str) -> Option<u64> {
    let (major, minor) = line.split_ascii_whitespace().nth(3)?.split_once(':')?;
    let parse = |number| u64::from_str_radix(number, 16).ok();
    Some(parse(major)? << 20 | parse(minor)?)
}

fn name(process: libc::pid_t) -> String {
    let name = fs::read_to_string(format!("/proc/{process}/comm"));
    name.map_or_else(
        |_| "a process".to_owned(),
        |name| name.trim_end().to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_of_a_mapped_file_is_read_as_the_kernel_numbers_it() {
        let line = "7f0000000000-7f0000001000 r-xp 00001000 fe:02 1234  /bin/a program";
        assert_eq!(mapped(line), Some(0xfe << 20 | 2));
        assert_eq!(mapped("7f00-7f01 rw-p 0 00:00 0"), Some(0));
        assert_eq!(mapped("half"), None);
    }
}
