//! Takes back what the guest was told, as soon as it is not true any more.

use std::ffi::{CStr, CString, OsString};
use std::io::{self, IoSlice};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use super::event::{Change, HostEvent, Kind};
use super::fanotify::{Entry, Raised};
use super::{Watcher, overlap};
use crate::channel::Channel;
use crate::host::Key;
use crate::inode::{Inode, lock};
use crate::message::notification;
use crate::passthrough::Share;
use crate::wire::{NotifyCode, NotifyInvalEntryOut, NotifyInvalInodeOut, ROOT_ID, init};

/// How much is read of the kernel's queue at a time, bytes.
const BUFFER: usize = 64 << 10;
/// For how long nobody looks again after events of the guest's own work, which come one by one as it goes on: at first, and
/// where there was nothing else for a while.
const OWN_WORK: Duration = Duration::from_millis(5);
const LONG_OWN_WORK: Duration = Duration::from_millis(15);
/// Names are looked up again when they are used next, instead of being dropped with all below them:
/// of [`NotifyInvalEntryOut::flags`].
const EXPIRE_ONLY: u32 = 1 << 0;

/// Watches the share until [`Share::stop`], tells the guest by `channel` what to forget, and `tell`
/// what has happened, some changes at a time in their order. Returns at once where nothing is watched.
///
/// A notification has to reach the guest's kernel after every reply that was sent before it, over
/// whatever channel, and must not keep replies waiting while the kernel deals with it: that takes a
/// thread of its own at the other end.
///
/// # Errors
/// Where the channel breaks, or events cannot be read.
pub fn watch(
    share: &Share,
    channel: &dyn Channel,
    tell: &mut dyn FnMut(&[HostEvent]),
) -> io::Result<()> {
    let Some(watcher) = share.watcher() else {
        return Ok(());
    };
    let notifier = Notifier { share, channel };
    let mut buffer = vec![0; BUFFER];
    let mut pause = OWN_WORK;
    loop {
        notifier.wait(watcher)?;
        if watcher.stopping.load(Ordering::Relaxed) {
            return Ok(());
        }
        notifier.watch_wanted(watcher);
        let mut news = watcher.group.read(&mut buffer)?;
        let is_own_work = !news.is_empty();
        news.retain(|event| notifier.is_news(watcher, event));
        if news.is_empty() {
            if is_own_work {
                thread::sleep(pause);
                pause = (pause * 2).min(LONG_OWN_WORK);
            }
            continue;
        }
        pause = OWN_WORK;
        watcher.all_told();
        let mut events = Vec::new();
        for event in news {
            match event.own {
                false => notifier.apply(watcher, &event, &mut events)?,
                // The guest's own doing by one way or another: its programs have heard of it.
                true => notifier.apply(watcher, &event, &mut Vec::new())?,
            }
        }
        if !events.is_empty() {
            tell(&events);
        }
    }
}

struct Notifier<'a> {
    share: &'a Share,
    channel: &'a dyn Channel,
}

/// An entry in a directory that the guest knows.
struct Known<'a> {
    dir: u64,
    name: &'a CStr,
}

impl Notifier<'_> {
    /// Whether the guest may not know of it.
    fn is_news(&self, watcher: &Watcher, event: &Raised) -> bool {
        if let Some(file) = watcher.file {
            return !event.own || is_by_others(watcher, file, event);
        }
        let by_others = |entry: &Entry| {
            let path = || {
                let path = self.share.path(watcher.dir(&entry.dir)?)?;
                Some(watcher.root().join(path))
            };
            let stat = || self.share.stat(watcher.dir(&entry.dir)?, &entry.name);
            overlap::is_watched_by_several(&entry.dir)
                || overlap::is_changed_unseen(path)
                || overlap::is_changed_by_itself(stat)
        };
        let entries = [&event.entry, &event.to].into_iter().flatten();
        !event.own || entries.into_iter().any(by_others)
    }

    /// Watches what the guest has got to know.
    fn watch_wanted(&self, watcher: &Watcher) {
        for id in watcher.take_wanted() {
            let Ok((dir, held)) = self.share.dir(id) else {
                continue;
            };
            watcher.add_wanted(&dir, &held);
            // The guest may have forgotten it meanwhile.
            if self.share.dir(id).is_err() {
                watcher.remove(&dir, Some(&held));
            }
        }
    }

    /// Waits until there is something to do, and has what cannot be watched listed anew.
    fn wait(&self, watcher: &Watcher) -> io::Result<()> {
        let mut woken = [0; 8];
        loop {
            let briefly = Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            let any_unwatched = !lock(&watcher.unwatched).is_empty();
            let mut ready = [
                PollFd::new(&watcher.group, PollFlags::IN),
                PollFd::new(&watcher.wake, PollFlags::IN),
            ];
            match poll(&mut ready, any_unwatched.then_some(&briefly)) {
                Err(Errno::INTR) => {}
                Ok(0) => {
                    let listed = std::mem::take(&mut *lock(&watcher.unwatched));
                    watcher.all_told();
                    for dir in listed {
                        self.forget_attributes_and_data(dir)?;
                    }
                }
                outcome => {
                    outcome?;
                    if ready[1].revents().contains(PollFlags::IN) {
                        // Nothing is lost where it was read already.
                        let _ = rustix::io::read(&watcher.wake, &mut woken);
                    }
                    return Ok(());
                }
            }
        }
    }

    fn apply(
        &self,
        watcher: &Watcher,
        event: &Raised,
        events: &mut Vec<HostEvent>,
    ) -> io::Result<()> {
        if event.mask & libc::FAN_Q_OVERFLOW != 0 {
            return self.overflow(events);
        }
        if watcher.file.is_some() {
            return self.file_changed(event.mask, events);
        }
        fn known<'a>(watcher: &Watcher, entry: Option<&'a Entry>) -> Option<Known<'a>> {
            let entry = entry?;
            Some(Known {
                dir: watcher.dir(&entry.dir)?,
                name: &entry.name,
            })
        }
        let from = known(watcher, event.entry.as_ref());
        let to = known(watcher, event.to.as_ref());
        let is_dir = event.mask & libc::FAN_ONDIR != 0;
        if event.mask & libc::FAN_RENAME != 0 {
            return self.moved(from, to, is_dir, events);
        }
        match from {
            Some(known) if known.name == c"." => self.dir_changed(&known, event.mask, events),
            Some(known) => self.changed(&known, event.mask, is_dir, events),
            None => Ok(()),
        }
    }

    fn event(&self, known: &Known<'_>, change: Change) -> HostEvent {
        HostEvent {
            dir: known.dir,
            path: self.share.path(known.dir).unwrap_or_default(),
            name: known.name.to_owned(),
            change,
        }
    }

    /// Something else has happened to an entry than that it was renamed.
    fn changed(
        &self,
        known: &Known<'_>,
        mask: u64,
        is_dir: bool,
        events: &mut Vec<HostEvent>,
    ) -> io::Result<()> {
        let appeared = mask & (libc::FAN_CREATE | libc::FAN_MOVED_TO) != 0;
        let vanished = mask & (libc::FAN_DELETE | libc::FAN_MOVED_FROM) != 0;
        if !self.share.is_name_shown(known.dir, known.name) {
            return Ok(());
        }
        // What happens to one name in a row is one event: what there is now tells what was last.
        let now = self.share.stat(known.dir, known.name);
        let reshown = mask & libc::FAN_ATTRIB != 0 && self.share.has_view();
        if appeared || vanished || reshown {
            self.forget_entry(known)?;
        }
        if vanished {
            // What the guest has open lives on, with one name less.
            if let Some(inode) = self.share.lost(known.dir, known.name, now.as_ref()) {
                self.forget_attributes(inode.id)?;
            }
            events.push(self.event(known, Change::Deleted { is_dir }));
        }
        let Some(stat) = now else {
            return Ok(());
        };
        if appeared {
            let kind = Kind::of(stat.kind());
            events.push(self.event(known, Change::Created { kind }));
        }
        let written = mask & (libc::FAN_MODIFY | libc::FAN_CLOSE_WRITE) != 0;
        if let Some(inode) = self.share.known(&stat)
            && (written || mask & libc::FAN_ATTRIB != 0)
        {
            self.forget_inode(&inode, mask & libc::FAN_MODIFY != 0)?;
        }
        events.extend(changes_in(mask).map(|change| self.event(known, change)));
        Ok(())
    }

    /// The file that is shared by itself was changed, under whatever name.
    fn file_changed(&self, mask: u64, events: &mut Vec<HostEvent>) -> io::Result<()> {
        match mask & libc::FAN_MODIFY {
            0 => self.forget_attributes(ROOT_ID)?,
            _ => self.forget_attributes_and_data(ROOT_ID)?,
        }
        let itself = Known {
            dir: ROOT_ID,
            name: c"",
        };
        events.extend(changes_in(mask).map(|change| self.event(&itself, change)));
        Ok(())
    }

    /// The attributes of a directory itself were changed.
    fn dir_changed(
        &self,
        known: &Known<'_>,
        mask: u64,
        events: &mut Vec<HostEvent>,
    ) -> io::Result<()> {
        self.forget_attributes(known.dir)?;
        if mask & libc::FAN_ATTRIB != 0 {
            let itself = Known {
                dir: known.dir,
                name: c"",
            };
            events.push(self.event(&itself, Change::Attrib));
        }
        Ok(())
    }

    /// An entry was renamed; either end may be where the guest does not look.
    fn moved(
        &self,
        from: Option<Known<'_>>,
        to: Option<Known<'_>>,
        is_dir: bool,
        events: &mut Vec<HostEvent>,
    ) -> io::Result<()> {
        let told = |known: &Known<'_>| self.share.is_name_shown(known.dir, known.name);
        let (from, to) = (from.filter(told), to.filter(told));
        for known in [&from, &to].into_iter().flatten() {
            self.forget_entry(known)?;
        }
        match (from, to) {
            (Some(from), Some(to)) => {
                self.share
                    .was_moved((from.dir, from.name), (to.dir, to.name));
                let change = Change::Moved {
                    dir: to.dir,
                    path: self.share.path(to.dir).unwrap_or_default(),
                    name: to.name.to_owned(),
                };
                events.push(self.event(&from, change));
            }
            (Some(from), None) => events.push(self.event(&from, Change::Deleted { is_dir })),
            (None, Some(to)) => {
                if let Some(stat) = self.share.stat(to.dir, to.name) {
                    let kind = Kind::of(stat.kind());
                    events.push(self.event(&to, Change::Created { kind }));
                }
            }
            (None, None) => {}
        }
        Ok(())
    }

    /// Everything may have changed.
    fn overflow(&self, events: &mut Vec<HostEvent>) -> io::Result<()> {
        tracing::warn!(
            "more changed in the shared directory at once than could be followed: the guest looks at \
             all of it anew"
        );
        for inode in self.share.all_known() {
            if let Some(place) = inode.place() {
                self.forget_entry(&Known {
                    dir: place.parent,
                    name: &place.name,
                })?;
            }
            self.forget_inode(&inode, true)?;
        }
        events.push(HostEvent {
            dir: ROOT_ID,
            path: OsString::new(),
            name: CString::default(),
            change: Change::Overflow,
        });
        Ok(())
    }

    /// The guest is to look the name up again, and to list the directory again.
    fn forget_entry(&self, known: &Known<'_>) -> io::Result<()> {
        let head = NotifyInvalEntryOut {
            parent: known.dir,
            namelen: u32::try_from(known.name.count_bytes()).unwrap_or(u32::MAX),
            flags: match self.share.has(init::HAS_EXPIRE_ONLY) {
                true => EXPIRE_ONLY,
                false => 0,
            },
        };
        self.send(NotifyCode::InvalEntry, &head, Some(known.name))?;
        self.forget_attributes_and_data(known.dir)
    }

    fn forget_inode(&self, inode: &Inode, data: bool) -> io::Result<()> {
        match data {
            true => self.forget_attributes_and_data(inode.id),
            false => self.forget_attributes(inode.id),
        }
    }

    fn forget_attributes_and_data(&self, ino: u64) -> io::Result<()> {
        self.share.recall_anew(ino);
        let head = NotifyInvalInodeOut {
            ino,
            off: 0,
            len: 0,
        };
        self.send(NotifyCode::InvalInode, &head, None)
    }

    fn forget_attributes(&self, ino: u64) -> io::Result<()> {
        self.share.recall_anew(ino);
        let head = NotifyInvalInodeOut {
            ino,
            off: -1,
            len: 0,
        };
        self.send(NotifyCode::InvalInode, &head, None)
    }

    fn send<T: IntoBytes + Immutable>(
        &self,
        code: NotifyCode,
        head: &T,
        name: Option<&CStr>,
    ) -> io::Result<()> {
        let send = |parts: &[IoSlice<'_>]| self.channel.send(parts);
        match notification(code, head, name, send) {
            // The guest does not know it any more, or a directory has become something else.
            Err(error)
                if matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::NOENT | Errno::NOTDIR | Errno::NOTEMPTY | Errno::BUSY)
                ) =>
            {
                Ok(())
            }
            outcome => outcome,
        }
    }
}

/// Whether what this process has done to a file that is shared by itself may be the doing of another share.
fn is_by_others(watcher: &Watcher, file: Key, event: &Raised) -> bool {
    let own = usize::from(watcher.is_writable);
    overlap::changers_of(file) > own
        || event
            .entry
            .as_ref()
            .is_some_and(|entry| overlap::is_watched(&entry.dir))
        || overlap::is_changed_unseen(|| Some(watcher.root().to_owned()))
}

/// What was done to a file that stays where it is, in the order in which it happens most often.
fn changes_in(mask: u64) -> impl Iterator<Item = Change> {
    let changes = [
        (libc::FAN_MODIFY, Change::Modified),
        (libc::FAN_CLOSE_WRITE, Change::CloseWrite),
        (libc::FAN_ATTRIB, Change::Attrib),
    ];
    let done = move |(bit, change): (u64, Change)| (mask & bit != 0).then_some(change);
    changes.into_iter().filter_map(done)
}
