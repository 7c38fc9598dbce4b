//! Who in the machine watches a folder with inotify(7), as proc_pid_fdinfo(5) shows it.
//!
//! The kernel tells nobody of new watches, so all descriptors of all processes are looked at: when the host
//! has changed something where nobody is known to watch, and never more than a twentieth of the time. Whoever
//! begins to watch before the host changes something is seen, as a look follows that.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Dir, Mode, OFlags, openat, readlinkat};

use super::handle::Handle;
use super::replay;
use super::view::{Lookout, View};
use crate::process::{self, Entry};

/// What an inotify instance's descriptor links to.
const INOTIFY: &[u8] = b"anon_inode:inotify";

/// How many times as long as a look takes is nobody looked for again, and within which bounds.
const PAUSE_FACTOR: u32 = 20;
const MIN_PAUSE: Duration = Duration::from_millis(20);
const MAX_PAUSE: Duration = Duration::from_millis(250);

/// So many watched files are told apart. Where there are more, everything counts as watched.
const MAX_WATCHED: usize = 65_536;

/// A line of fdinfo that is longer is not one of inotify.
const MAX_LINE: u64 = 1024;

/// What is watched of a folder.
#[derive(Debug, Default)]
pub struct Watched {
    /// By path from the folder's top on, which itself is the empty one.
    pub files: HashMap<Vec<u8>, Handle>,
    /// Whether there is more than that.
    everything: bool,
}

impl Watched {
    /// Whether a path is watched.
    pub fn has(&self, path: &[u8]) -> bool {
        self.everything || self.files.contains_key(path)
    }

    /// Whether nobody watches anything.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && !self.everything
    }
}

/// Looks for those who watch one folder.
#[derive(Debug)]
pub struct Watchers {
    /// The folder's device, as the kernel numbers it.
    device: u64,
    /// What was seen last.
    pub watched: Watched,
    /// Threads of the kernel, which watch nothing.
    kernel: HashSet<Entry>,
    next: Option<Instant>,
}

impl Watchers {
    /// For the folder with this device number.
    pub fn new(device: u64) -> Self {
        Self {
            device,
            watched: Watched::default(),
            kernel: HashSet::new(),
            next: None,
        }
    }

    /// Looks again, after a while where somebody was looked for just now.
    pub fn look(&mut self, lookout: &mut Lookout) {
        if let Some(next) = self.next {
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        let start = Instant::now();
        let (handles, everything) = self.handles();
        let files = match handles.is_empty() {
            true => HashMap::new(),
            false => {
                let view = replay::watched(lookout);
                view.map_or_else(HashMap::new, |view| with_paths(handles, view))
            }
        };
        self.watched = Watched { files, everything };
        let pause = (start.elapsed() * PAUSE_FACTOR).clamp(MIN_PAUSE, MAX_PAUSE);
        self.next = Some(Instant::now() + pause);
    }

    /// All files of the device that somebody watches, and whether there are more than are told apart.
    fn handles(&mut self) -> (Vec<Handle>, bool) {
        let mut found = Vec::new();
        for Entry { pid, .. } in self.processes() {
            for descriptor in inotify_descriptors(pid) {
                // A process may have ended since.
                let Ok(info) = File::open(format!("/proc/{pid}/fdinfo/{descriptor}")) else {
                    continue;
                };
                for handle in handles_in(BufReader::new(info), self.device) {
                    found.push(handle);
                    if found.len() >= MAX_WATCHED {
                        return (found, true);
                    }
                }
            }
        }
        (found, false)
    }

    /// All processes that may watch something. Most of a small machine are threads of the kernel, and looked at once.
    fn processes(&mut self) -> Vec<Entry> {
        let known = std::mem::take(&mut self.kernel);
        let is_kernel = |entry: &Entry| known.contains(entry) || is_kernel(entry.pid);
        let entries = process::entries().unwrap_or_default().into_iter();
        let (kernel, others): (Vec<_>, _) = entries.partition(is_kernel);
        self.kernel = kernel.into_iter().collect();
        others
    }
}

fn is_kernel(pid: libc::pid_t) -> bool {
    process::find(pid).is_some_and(|process| process.is_kernel)
}

/// The paths of those that still have one.
fn with_paths(handles: Vec<Handle>, view: &View) -> HashMap<Vec<u8>, Handle> {
    let found = handles.into_iter().filter_map(|handle| {
        let file = view.open_handle(&handle).ok()?;
        Some((view.path_below(&file)?, handle))
    });
    found.collect()
}

fn inotify_descriptors(process: libc::pid_t) -> Vec<u64> {
    let path = format!("/proc/{process}/fd");
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(directory) = openat(CWD, path, flags, Mode::empty()) else {
        return Vec::new();
    };
    let is_inotify = |number: &u64| {
        let link = readlinkat(&directory, number.to_string(), Vec::new());
        link.is_ok_and(|link| link.as_bytes() == INOTIFY)
    };
    numbers(&directory).filter(is_inotify).collect()
}

/// The watches of one instance on a device.
fn handles_in(info: impl BufRead, device: u64) -> impl Iterator<Item = Handle> {
    let mut info = info;
    let mut line = String::new();
    std::iter::from_fn(move || {
        loop {
            line.clear();
            // An instance that is closed meanwhile has no more of them.
            let read = (&mut info).take(MAX_LINE).read_line(&mut line).ok()?;
            if read == 0 {
                return None;
            }
            if let Some(handle) = parse(&line, device) {
                return Some(handle);
            }
        }
    })
}

fn parse(line: &str, device: u64) -> Option<Handle> {
    let fields = line.trim_end().strip_prefix("inotify ")?;
    let value = |name: &str| {
        let mut fields = fields.split(' ');
        fields.find_map(|field| field.strip_prefix(name)?.strip_prefix(':'))
    };
    match u64::from_str_radix(value("sdev")?, 16) == Ok(device) {
        true => Handle::parse(value("fhandle-type")?, value("f_handle")?),
        false => None,
    }
}

/// The entries of a directory that are numbers.
fn numbers(directory: &OwnedFd) -> impl Iterator<Item = u64> + use<> {
    let entries = Dir::read_from(directory).ok();
    entries.into_iter().flatten().filter_map(|entry| {
        let entry = entry.ok()?;
        entry.file_name().to_str().ok()?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_of_one_device_are_told_from_all_else() {
        let info = "pos:\t0\nflags:\t00\nmnt_id:\t17\n\
            inotify wd:2 ino:9 sdev:33 mask:fff ignored_mask:0 fhandle-bytes:c fhandle-type:81 f_handle:000000000900000001000000 \n\
            inotify wd:1 ino:3c4a7 sdev:fe00000 mask:fff ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:a7c4030000000000 \n\
            inotify wd:3 ino:9 sdev:33 mask:fff\n";
        let found: Vec<_> = handles_in(info.as_bytes(), 0x33).collect();
        let nodes: Vec<_> = found.iter().map(Handle::node).collect();
        assert_eq!(nodes, [Some(9)]);
    }

    #[test]
    fn a_thread_of_the_kernel_is_not_looked_at_until_its_number_is_anothers() {
        let mut watchers = Watchers::new(0);
        let own = |watchers: &mut Watchers| {
            let mut processes = watchers.processes().into_iter();
            processes.find(|process| process.pid.cast_unsigned() == std::process::id())
        };
        let found = own(&mut watchers).unwrap();
        let gone = Entry {
            inode: found.inode + 1,
            ..found
        };
        watchers.kernel.insert(gone);
        assert_eq!(own(&mut watchers), Some(found));
        assert!(!watchers.kernel.contains(&gone));
        watchers.kernel.insert(found);
        for _ in 0..2 {
            assert_eq!(own(&mut watchers), None);
        }
    }

    #[test]
    fn threads_of_the_kernel_are_told_from_others() {
        assert!(!is_kernel(std::process::id().cast_signed()));
        // A container may not show it.
        let name = std::fs::read_to_string("/proc/2/comm").unwrap_or_default();
        assert!(name != "kthreadd\n" || is_kernel(2));
    }

    #[test]
    fn a_line_without_end_is_no_watch() {
        let endless = "inotify ".repeat(1 << 17);
        assert_eq!(handles_in(endless.as_bytes(), 1).count(), 0);
    }
}
