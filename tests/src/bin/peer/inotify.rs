//! A program that watches directories, as those do that build again whatever was changed.

use std::io;
use std::mem::MaybeUninit;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

/// Says which files appear in `dir` and when it hears of each, in seconds since 1970, until one of the name
/// `last` does.
pub fn watch_until(dir: &str, last: &str) -> io::Result<()> {
    let queue = inotify::init(CreateFlags::CLOEXEC)?;
    inotify::add_watch(&queue, dir, WatchFlags::CREATE)?;
    super::say("listening");
    let mut buffer = [MaybeUninit::uninit(); 16 << 10];
    let mut reader = inotify::Reader::new(&queue, &mut buffer);
    loop {
        let event = match reader.next() {
            Err(Errno::INTR) => continue,
            event => event?,
        };
        let now = UNIX_EPOCH.elapsed().map_err(io::Error::other)?;
        let name = event.file_name().map(|name| name.to_string_lossy());
        let name = name.unwrap_or_default();
        super::say(&format!("+ {name} {}", now.as_secs_f64()));
        if name == last {
            return Ok(());
        }
    }
}

/// Says what happens in `dirs`, an event a line: what, where, and which rename it belongs to.
pub fn watch(dirs: &[&str]) -> io::Result<()> {
    let queue = inotify::init(CreateFlags::CLOEXEC)?;
    let wanted = WatchFlags::CREATE
        | WatchFlags::MODIFY
        | WatchFlags::CLOSE_WRITE
        | WatchFlags::ATTRIB
        | WatchFlags::DELETE
        | WatchFlags::MOVE;
    let mut watched = Vec::new();
    for dir in dirs {
        watched.push((
            inotify::add_watch(&queue, *dir, wanted)?,
            PathBuf::from(dir),
        ));
    }
    super::say("listening");
    let mut buffer = [MaybeUninit::uninit(); 64 << 10];
    let mut reader = inotify::Reader::new(&queue, &mut buffer);
    let mut cookies = Vec::new();
    loop {
        let event = match reader.next() {
            Err(Errno::INTR) => continue,
            event => event?,
        };
        let what: Vec<_> = (event.events() - ReadFlags::ISDIR)
            .iter_names()
            .map(|(name, _)| name)
            .collect();
        let dir = watched.iter().find(|(number, _)| *number == event.wd());
        let mut path = dir.map(|(_, dir)| dir.clone()).unwrap_or_default();
        if let Some(name) = event.file_name() {
            path.push(name.to_string_lossy().as_ref());
        }
        let rename = match event.cookie() {
            0 => String::new(),
            cookie => {
                let known = cookies.iter().position(|known| *known == cookie);
                let index = known.unwrap_or_else(|| {
                    cookies.push(cookie);
                    cookies.len() - 1
                });
                format!(" #{index}")
            }
        };
        super::say(&format!("{} {}{rename}", what.join("|"), path.display()));
    }
}
