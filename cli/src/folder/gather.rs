//! The host's changes on their way into the guest: they gather while the agent does earlier ones again.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use agent::protocol::{ChangeKind, HostChange};
use share::wire::ROOT_ID;
use share::{Change, HostEvent, Kind, PATH_MAX};

/// How many changes may wait. More are told as one: that there were more than could be told.
const MAX_WAITING: usize = 4096;

/// How many changes the agent is given at a time.
const BATCH: usize = 256;

/// Changes that the agent has not been told of.
#[derive(Debug, Default)]
pub struct Gathered {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<HostEvent>,
    /// What waits of each entry since it was made, removed or renamed, as [`bit`] has it.
    done: HashMap<(u64, CString), u8>,
    /// The only one that waits says that there were too many.
    overflowed: bool,
    ended: bool,
}

impl Gathered {
    /// Adds what was done, in its order.
    pub fn add(&self, events: &[HostEvent]) {
        let mut waiting = self.waiting();
        for event in events {
            waiting.add(event);
        }
        self.changed.notify_one();
    }

    /// Waits for changes and takes the first of them; None once this has ended.
    pub fn take(&self) -> Option<Vec<HostEvent>> {
        let waiting = self.waiting();
        let waited = self.changed.wait_while(waiting, |waiting| {
            waiting.events.is_empty() && !waiting.ended
        });
        let mut waiting = waited.unwrap_or_else(PoisonError::into_inner);
        if waiting.ended {
            return None;
        }
        Some(waiting.take())
    }

    /// Lets go of whoever waits.
    pub fn end(&self) {
        self.waiting().ended = true;
        self.changed.notify_all();
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn add(&mut self, event: &HostEvent) {
        if self.overflowed || self.repeats(event) {
            return;
        }
        let is_too_much = self.events.len() >= MAX_WAITING
            || event.change == Change::Overflow
            || !is_reachable(event);
        if !is_too_much {
            return self.events.push_back(event.clone());
        }
        self.events.clear();
        self.done.clear();
        self.overflowed = true;
        self.events.push_back(HostEvent {
            dir: ROOT_ID,
            path: OsString::new(),
            name: CString::default(),
            change: Change::Overflow,
        });
    }

    fn take(&mut self) -> Vec<HostEvent> {
        let count = self.events.len().min(BATCH);
        let batch: Vec<_> = self.events.drain(..count).collect();
        if self.events.is_empty() {
            self.done.clear();
            self.overflowed = false;
            return batch;
        }
        for event in &batch {
            if let Some(done) = self.done.get_mut(&entry(event)) {
                *done &= !bit(&event.change);
            }
        }
        batch
    }

    /// Whether the same waits already: whoever hears of that finds what there is now.
    fn repeats(&mut self, event: &HostEvent) -> bool {
        let bit = bit(&event.change);
        if bit == 0 {
            if let Change::Moved { dir, name, .. } = &event.change {
                self.done.remove(&(*dir, name.clone()));
            }
            self.done.remove(&entry(event));
            return false;
        }
        let done = self.done.entry(entry(event)).or_default();
        let repeats = *done & bit != 0;
        *done |= bit;
        repeats
    }
}

fn entry(event: &HostEvent) -> (u64, CString) {
    (event.dir, event.name.clone())
}

/// What is done to an entry that stays; zero for what makes it another one.
fn bit(change: &Change) -> u8 {
    match change {
        Change::Modified => 1,
        Change::CloseWrite => 2,
        Change::Attrib => 4,
        Change::Moved { .. }
        | Change::Created { .. }
        | Change::Deleted { .. }
        | Change::Overflow => 0,
    }
}

/// Whether the agent can get there by the path.
fn is_reachable(event: &HostEvent) -> bool {
    let fits = |path: &OsStr, name: &CString| path.len() + name.count_bytes() < PATH_MAX;
    let new = match &event.change {
        Change::Moved { path, name, .. } => fits(path, name),
        _ => true,
    };
    new && fits(&event.path, &event.name)
}

/// The same for the agent.
pub fn told(event: HostEvent) -> HostChange {
    HostChange {
        dir: event.path.into_vec(),
        name: event.name.into_bytes(),
        what: match event.change {
            Change::Created { kind } => match kind {
                Kind::File => ChangeKind::CreatedFile,
                Kind::Directory => ChangeKind::CreatedDirectory,
                Kind::Symlink => ChangeKind::CreatedSymlink,
                Kind::Special => ChangeKind::CreatedSpecial,
            },
            Change::Modified => ChangeKind::Modified,
            Change::CloseWrite => ChangeKind::CloseWrite,
            Change::Attrib => ChangeKind::Attributes,
            Change::Deleted { is_dir } => ChangeKind::Deleted { is_dir },
            Change::Moved { path, name, .. } => ChangeKind::Moved {
                dir: path.as_bytes().to_vec(),
                name: name.into_bytes(),
            },
            Change::Overflow => ChangeKind::Overflow,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, change: Change) -> HostEvent {
        HostEvent {
            dir: 7,
            path: "dir".into(),
            name: CString::new(name).unwrap(),
            change,
        }
    }

    fn moved(from: &str, to: &str) -> HostEvent {
        let change = Change::Moved {
            dir: 7,
            path: "dir".into(),
            name: CString::new(to).unwrap(),
        };
        event(from, change)
    }

    const CREATED: Change = Change::Created { kind: Kind::File };
    const DELETED: Change = Change::Deleted { is_dir: false };

    #[test]
    fn what_repeats_what_waits_is_told_once() {
        let gathered = Gathered::default();
        for _ in 0..1000 {
            gathered.add(&[event("a", Change::Modified), event("b", Change::Attrib)]);
            gathered.add(&[event("a", Change::CloseWrite)]);
        }
        let expected = [
            event("a", Change::Modified),
            event("b", Change::Attrib),
            event("a", Change::CloseWrite),
        ];
        assert_eq!(gathered.take().unwrap(), expected);
        gathered.add(&expected);
        assert_eq!(
            gathered.take().unwrap(),
            expected,
            "told before, not waiting"
        );
    }

    #[test]
    fn what_was_done_to_another_file_of_that_name_is_told_too() {
        let gathered = Gathered::default();
        let events = [
            event("a", CREATED),
            event("a", Change::Modified),
            event("a", DELETED),
            event("a", CREATED),
            event("a", Change::Modified),
            moved("a", "b"),
            event("b", Change::Modified),
            event("a", Change::Modified),
        ];
        gathered.add(&events);
        assert_eq!(gathered.take().unwrap(), events);
    }

    #[test]
    fn many_changes_come_in_batches_and_in_order() {
        let gathered = Gathered::default();
        let events: Vec<_> = (0..MAX_WAITING)
            .map(|number| event(&number.to_string(), CREATED))
            .collect();
        gathered.add(&events);
        let mut taken = Vec::new();
        while taken.len() < MAX_WAITING {
            let batch = gathered.take().unwrap();
            assert!(batch.len() <= BATCH);
            taken.extend(batch);
        }
        assert_eq!(taken, events);
    }

    #[test]
    fn what_happens_while_the_same_is_told_is_told_again() {
        let gathered = Gathered::default();
        gathered.add(&[event("a", Change::Modified)]);
        for number in 0..BATCH {
            gathered.add(&[event(&number.to_string(), CREATED)]);
        }
        assert_eq!(gathered.take().unwrap()[0], event("a", Change::Modified));
        gathered.add(&[event("a", Change::Modified)]);
        assert_eq!(gathered.take().unwrap()[1], event("a", Change::Modified));
    }

    #[test]
    fn more_than_can_wait_are_told_as_one() {
        let gathered = Gathered::default();
        for number in 0..2 * MAX_WAITING {
            gathered.add(&[event(&number.to_string(), CREATED)]);
        }
        let taken = gathered.take().unwrap();
        assert_eq!(taken.len(), 1);
        assert_eq!(taken[0].change, Change::Overflow);
        assert!(taken[0].path.is_empty() && taken[0].name.is_empty());
        gathered.add(&[event("later", CREATED)]);
        assert_eq!(gathered.take().unwrap(), [event("later", CREATED)]);
    }

    #[test]
    fn what_no_path_leads_to_is_told_as_too_much() {
        let gathered = Gathered::default();
        let deep = HostEvent {
            path: "name/".repeat(1000).into(),
            ..event("a", CREATED)
        };
        gathered.add(&[event("b", CREATED), deep]);
        let taken = gathered.take().unwrap();
        assert_eq!(taken.len(), 1);
        assert_eq!(taken[0].change, Change::Overflow);
    }

    #[test]
    fn whoever_waits_is_let_go_at_the_end() {
        let gathered = Gathered::default();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| gathered.take());
            gathered.end();
            assert_eq!(waiting.join().unwrap(), None);
        });
    }
}
