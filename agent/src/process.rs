//! The processes of the machine, as proc(5) lists them.

use std::fs;
use std::io;
use std::os::unix::fs::DirEntryExt;

/// PF_KTHREAD of the kernel's include/linux/sched.h, in the flags field of /proc/PID/stat.
const PF_KTHREAD: u64 = 0x0020_0000;

/// One process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: libc::pid_t,
    /// Its state letter: `Z` is a zombie.
    pub state: u8,
    /// The number of its session.
    pub session: libc::pid_t,
    /// Whether it is a thread of the kernel.
    pub is_kernel: bool,
}

/// A process by its directory in /proc.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry {
    /// Its number.
    pub pid: libc::pid_t,
    /// The directory's inode, which the next process of that number does not have.
    pub inode: u64,
}

/// What runs now; processes that come or go meanwhile may or may not be there.
pub fn entries() -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        if let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            let inode = entry.ino();
            entries.push(Entry { pid, inode });
        }
    }
    Ok(entries)
}

/// Lists what runs now, as [`entries`] does.
pub fn list() -> io::Result<Vec<Process>> {
    let entries = entries()?.into_iter();
    Ok(entries.filter_map(|entry| find(entry.pid)).collect())
}

/// The process of this number; None where it has ended.
pub fn find(pid: libc::pid_t) -> Option<Process> {
    parse_stat(pid, &fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// The living processes of a session.
pub fn session_members(session: libc::pid_t) -> io::Result<Vec<libc::pid_t>> {
    let is_member = |process: &Process| process.session == session && process.state != b'Z';
    Ok(list()?
        .into_iter()
        .filter(is_member)
        .map(|process| process.pid)
        .collect())
}

/// The command's name, in parentheses, may hold spaces and parentheses itself: fields count from the last one.
fn parse_stat(pid: libc::pid_t, stat: &[u8]) -> Option<Process> {
    let name_end = stat.iter().rposition(|&b| b == b')')?;
    let fields = std::str::from_utf8(stat.get(name_end + 1..)?).ok()?;
    let mut fields = fields.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let session = fields.nth(2)?.parse().ok()?;
    let flags: u64 = fields.nth(2)?.parse().ok()?;
    Some(Process {
        pid,
        state,
        session,
        is_kernel: flags & PF_KTHREAD != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let stat = b"42 (a) S (b) R 1 40 39 0 -1 2129984 0 0 0 0";
        let process = parse_stat(42, stat).unwrap();
        assert_eq!(
            (process.state, process.session, process.is_kernel),
            (b'R', 39, true)
        );
        assert_eq!(parse_stat(42, b"42 (half) S 1"), None);
    }

    #[test]
    fn this_process_is_listed_in_its_own_session() {
        let own = std::process::id() as libc::pid_t;
        // The session's leader may be outside of this pid namespace, which proc(5) shows as session 0.
        let process = list().unwrap().into_iter().find(|p| p.pid == own).unwrap();
        assert!(session_members(process.session).unwrap().contains(&own));
    }
}
