//! Listing directories ahead of who looks up their entries one by one.
//!
//! A listing brings the attributes of all that it lists, some twenty entries with one request. A program that goes
//! through files whose names it has from elsewhere (git from its index, a build from its manifest) asks for each by
//! itself. The host sees that, and says which directory is better listed, and how much of it. Git asks with up to twenty
//! threads, each in directories of its own, which one thread that lists would not keep up with.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, RawDir, openat};
use rustix::io::Errno;

use super::handle::Handle;
use super::pump::STACK;
use super::view::{Lookout, View};

/// How many directories wait to be listed, and of how many it is kept in mind how far that is.
const DIRECTORIES: usize = 16;

/// How many threads help to list while directories wait.
const HELPERS: usize = 7;

/// For how long the folder is held for the next one, and a thread that helps is there for it.
const LINGER: Duration = Duration::from_millis(100);

/// How much is read at a time, bytes: as many entries as one reply of the host has.
const BUFFER: usize = 16 << 10;

/// A directory, and up to how many of its entries are wanted.
type Wanted = (u64, u64);

/// What is to be listed.
#[derive(Debug, Default)]
pub struct Ahead {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    wanted: VecDeque<Wanted>,
    /// How many threads help.
    helpers: usize,
    ended: bool,
}

impl Ahead {
    /// Asks for a directory, by its node, to be listed up to so many entries.
    pub fn want(&self, directory: u64, entries: u64) {
        let mut state = self.lock();
        if let Some((_, wanted)) = state.wanted.iter_mut().find(|(node, _)| *node == directory) {
            *wanted = entries.max(*wanted);
            return;
        }
        if state.wanted.len() >= DIRECTORIES {
            state.wanted.pop_front();
        }
        state.wanted.push_back((directory, entries));
        self.changed.notify_one();
    }

    /// Nobody will ask any more.
    pub fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Lists what is asked for in the folder, until the end.
    pub fn attend(&self, lookout: Lookout) {
        let mut listings = Listings::new(lookout);
        thread::scope(|scope| {
            loop {
                match self.next(listings.lookout.is_open()) {
                    Next::List(wanted) => {
                        if self.wants_help() {
                            self.start_helper(scope, &listings.lookout);
                        }
                        listings.attempt(wanted);
                    }
                    Next::Nothing => listings.close(),
                    Next::End => return,
                }
            }
        });
    }

    /// Starts a thread that helps; without it the others take longer.
    fn start_helper<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, lookout: &Lookout) {
        let listings = Listings::new(lookout.another());
        let helper = thread::Builder::new().name("fuse-ahead".to_owned());
        let helper = helper.stack_size(STACK);
        if helper.spawn_scoped(scope, || self.help(listings)).is_err() {
            self.lock().helpers -= 1;
        }
    }

    /// Whether more directories wait than there are threads for; one more is counted then.
    fn wants_help(&self) -> bool {
        let mut state = self.lock();
        let wants = state.helpers < HELPERS && !state.wanted.is_empty();
        state.helpers += usize::from(wants);
        wants
    }

    /// Lists what is asked for, until nothing is.
    fn help(&self, mut listings: Listings) {
        while let Next::List(wanted) = self.next(true) {
            listings.attempt(wanted);
        }
        self.lock().helpers -= 1;
    }

    /// Waits; not for ever where something `is_open`.
    fn next(&self, is_open: bool) -> Next {
        let idle = |state: &mut State| !state.ended && state.wanted.is_empty();
        let state = self.lock();
        let mut state = match is_open {
            true => {
                let waited = self.changed.wait_timeout_while(state, LINGER, idle);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            false => {
                let waited = self.changed.wait_while(state, idle);
                waited.unwrap_or_else(PoisonError::into_inner)
            }
        };
        match (state.ended, state.wanted.pop_front()) {
            (true, _) => Next::End,
            (false, Some(wanted)) => Next::List(wanted),
            (false, None) => Next::Nothing,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Next {
    List(Wanted),
    Nothing,
    End,
}

/// Directories of a folder, each as far as it was listed.
struct Listings {
    lookout: Lookout,
    directories: VecDeque<Listing>,
    buffer: Box<[MaybeUninit<u8>]>,
}

struct Listing {
    node: u64,
    directory: OwnedFd,
    listed: u64,
    is_whole: bool,
}

impl Listings {
    fn new(lookout: Lookout) -> Self {
        Self {
            lookout,
            directories: VecDeque::new(),
            buffer: vec![MaybeUninit::uninit(); BUFFER].into(),
        }
    }

    /// Lists a directory as far as that goes: whoever needs what it would have brought asks for it, and hears of errors
    /// then.
    fn attempt(&mut self, wanted: Wanted) {
        let _ = self.list(wanted);
    }

    /// Lists a directory from where that was left off.
    fn list(&mut self, (node, wanted): Wanted) -> io::Result<()> {
        // Where the folder is not at its place any more, nobody looks anything up.
        let Some(view) = self.lookout.view()? else {
            return Ok(());
        };
        let known = self.directories.iter().position(|known| known.node == node);
        let mut listing = match known.and_then(|at| self.directories.remove(at)) {
            Some(listing) => listing,
            None => Listing::open(view, node)?,
        };
        listing.go_on(wanted, &mut self.buffer)?;
        if self.directories.len() >= DIRECTORIES {
            self.directories.pop_front();
        }
        self.directories.push_back(listing);
        Ok(())
    }

    /// Lets go of the folder.
    fn close(&mut self) {
        self.directories.clear();
        self.lookout.close();
    }
}

impl Listing {
    fn open(view: &View, node: u64) -> Result<Self, Errno> {
        let place = view.open_handle(&Handle::of_node(node))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            node,
            directory: openat(place, ".", flags, Mode::empty())?,
            listed: 0,
            is_whole: false,
        })
    }

    /// Reads on until so many entries were listed, and to the end of what has been read.
    fn go_on(&mut self, wanted: u64, buffer: &mut [MaybeUninit<u8>]) -> Result<(), Errno> {
        let mut entries = RawDir::new(&self.directory, buffer);
        while !self.is_whole && (self.listed < wanted || !entries.is_buffer_empty()) {
            match entries.next() {
                Some(entry) => {
                    entry?;
                    self.listed += 1;
                }
                None => self.is_whole = true,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_waits_once_and_few_of_them_do() {
        let ahead = Ahead::default();
        ahead.want(1, 24);
        ahead.want(1, 48);
        ahead.want(1, 24);
        assert!(matches!(ahead.next(true), Next::List((1, 48))));
        assert!(matches!(ahead.next(true), Next::Nothing));
        (0..1000).for_each(|node| ahead.want(node, 24));
        assert_eq!(ahead.lock().wanted.len(), DIRECTORIES);
        ahead.end();
        assert!(matches!(ahead.next(false), Next::End));
    }

    #[test]
    fn a_listing_goes_on_where_it_was_left_off() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..2000 {
            std::fs::write(dir.path().join(number.to_string()), "").unwrap();
        }
        let mut listing = Listing {
            node: 1,
            directory: std::fs::File::open(dir.path()).unwrap().into(),
            listed: 0,
            is_whole: false,
        };
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        listing.go_on(24, &mut buffer).unwrap();
        let first = listing.listed;
        assert!((24..1000).contains(&first), "{first}");
        listing.go_on(24, &mut buffer).unwrap();
        assert_eq!(listing.listed, first);
        listing.go_on(first + 1, &mut buffer).unwrap();
        assert!((first + 1..1500).contains(&listing.listed));
        for _ in 0..2 {
            listing.go_on(u64::MAX, &mut buffer).unwrap();
            // With the directory itself and the one above it.
            assert_eq!((listing.listed, listing.is_whole), (2002, true));
        }
    }
}
