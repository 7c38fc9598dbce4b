//! Notifications that have to come after replies.
//!
//! They travel on different connections, so the host says between notifications how many replies the kernel
//! has to have been given of each queue before it is told more.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use super::message::{self, OUT_HEADER};
use agent::protocol::{AFTER_REPLIES, ATTRIBUTES, EMPTY, LIST, NEW, PLACED};

/// How many replies the kernel has been given.
#[derive(Debug)]
pub struct Replies {
    /// Of each way.
    given: Box<[AtomicU64]>,
    /// Whether somebody waits for more: nobody is woken else.
    awaited: AtomicBool,
    /// Whether there will be no more.
    ended: Mutex<bool>,
    changed: Condvar,
}

impl Replies {
    /// For so many ways, none of which has had a reply: the stream of each queue, and then the calls of each.
    pub fn new(ways: u32) -> Self {
        Self {
            given: (0..ways).map(|_| AtomicU64::new(0)).collect(),
            awaited: AtomicBool::new(false),
            ended: Mutex::new(false),
            changed: Condvar::new(),
        }
    }

    /// One more was given that came by this way.
    pub fn count(&self, way: u32) {
        let index = usize::try_from(way).unwrap_or(usize::MAX);
        if let Some(given) = self.given.get(index) {
            // Either this sees who waits, or who waits sees this: both are sequentially consistent.
            given.fetch_add(1, Ordering::SeqCst);
        }
        if self.awaited.load(Ordering::SeqCst) {
            drop(self.lock());
            self.changed.notify_all();
        }
    }

    /// Waits until there were so many of each queue; false where there will be no more. One waits at a time.
    pub fn wait(&self, counts: impl Iterator<Item = u64> + Clone) -> bool {
        let enough = || {
            let mut both = self.given.iter().zip(counts.clone());
            both.all(|(given, needed)| given.load(Ordering::SeqCst) >= needed)
        };
        if enough() {
            return true;
        }
        let mut ended = self.lock();
        self.awaited.store(true, Ordering::SeqCst);
        while !*ended && !enough() {
            ended = self
                .changed
                .wait(ended)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.awaited.store(false, Ordering::SeqCst);
        !*ended
    }

    /// There will be no more.
    pub fn end(&self) {
        *self.lock() = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, bool> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What has to be waited for, where `message` says so and is nothing for the kernel.
pub fn counts(message: &[u8]) -> Option<impl Iterator<Item = u64> + Clone> {
    numbers(message, AFTER_REPLIES)
}

/// What a message among replies tells the agent.
#[derive(Debug, PartialEq, Eq)]
pub enum Advice<'a> {
    /// So many entries of a directory are to be listed.
    List { directory: u64, entries: u64 },
    /// A file was made just now.
    New { node: u64 },
    /// A directory was made just now and is empty; that a name is not there is believed for so many seconds.
    Empty { node: u64, validity: u64 },
    /// The attributes of a directory that was changed, and the number of this message.
    Attributes {
        node: u64,
        number: u64,
        attributes: &'a [u8],
    },
}

/// What the host advises, where `message` says so and is nothing for the kernel.
pub fn advice(message: &[u8]) -> Option<Advice<'_>> {
    let is_reply = message::kind(message)? <= 0;
    if is_reply {
        return None;
    }
    if let Some(mut numbers) = numbers(message, LIST) {
        let (directory, entries) = (numbers.next()?, numbers.next()?);
        return Some(Advice::List { directory, entries });
    }
    if let Some(mut numbers) = numbers(message, ATTRIBUTES) {
        let (node, number) = (numbers.next()?, numbers.next()?);
        let attributes = message.get(OUT_HEADER + 2 * size_of::<u64>()..)?;
        return Some(Advice::Attributes {
            node,
            number,
            attributes,
        });
    }
    if let Some(mut numbers) = numbers(message, EMPTY) {
        let (node, validity) = (numbers.next()?, numbers.next()?);
        return Some(Advice::Empty { node, validity });
    }
    let node = numbers(message, NEW)?.next()?;
    Some(Advice::New { node })
}

/// To which request a reply lies in its slot, and the reply's length, where `message` says so.
pub fn placed(message: &[u8]) -> Option<(u64, usize)> {
    let mut numbers = numbers(message, PLACED)?;
    let (unique, length) = (numbers.next()?, numbers.next()?);
    Some((unique, usize::try_from(length).ok()?))
}

/// The numbers of a message for the agent of this kind.
fn numbers(message: &[u8], kind: i32) -> Option<impl Iterator<Item = u64> + Clone> {
    let (header, rest) = message.split_at_checked(OUT_HEADER)?;
    if message::kind(header)? != kind || message::unique(header)? != 0 {
        return None;
    }
    let (numbers, _) = rest.as_chunks::<8>();
    Some(numbers.iter().map(|number| u64::from_le_bytes(*number)))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use agent::protocol::for_agent;

    use super::*;

    fn message(counts: &[u64]) -> Vec<u8> {
        for_agent(AFTER_REPLIES, counts, &[])
    }

    #[test]
    fn what_is_for_the_agent_is_told_from_what_is_for_the_kernel() {
        let counted: Vec<u64> = counts(&message(&[3, 1 << 40])).unwrap().collect();
        assert_eq!(counted, [3, 1 << 40]);
        let mut other = message(&[1]);
        other[4] = 2;
        assert!(counts(&other).is_none());
        let mut reply = message(&[1]);
        reply[8] = 1;
        assert!(counts(&reply).is_none());
        assert!(counts(&[0; 15]).is_none());
    }

    #[test]
    fn advice_is_told_from_replies_and_notifications() {
        let told = |kind: i32, numbers: &[u64]| {
            let message = for_agent(kind, numbers, &[]);
            advice(&message).map(|advice| format!("{advice:?}"))
        };
        let shown = |advice: Advice<'_>| Some(format!("{advice:?}"));
        let (directory, entries) = (1 << 40, 24);
        let list = Advice::List { directory, entries };
        assert_eq!(told(LIST, &[directory, entries]), shown(list));
        assert_eq!(told(NEW, &[7]), shown(Advice::New { node: 7 }));
        let (node, validity) = (7, 60);
        let empty = Advice::Empty { node, validity };
        assert_eq!(told(EMPTY, &[node, validity]), shown(empty));
        let attributes = Advice::Attributes {
            node: 7,
            number: 8,
            attributes: &9_u64.to_le_bytes(),
        };
        let with_attributes = for_agent(ATTRIBUTES, &[7, 8], &9_u64.to_le_bytes());
        assert_eq!(advice(&with_attributes), Some(attributes));
        for nothing in [
            told(LIST, &[1]),
            told(NEW, &[]),
            told(EMPTY, &[7]),
            told(0, &[7, 7]),
        ] {
            assert_eq!(nothing, None);
        }
        for notification in [
            told(3, &[7, 7]),
            told(-libc::ENOENT, &[]),
            told(AFTER_REPLIES, &[1]),
        ] {
            assert_eq!(notification, None);
        }
        assert_eq!(advice(&[0; 7]), None);
    }

    #[test]
    fn whoever_waits_goes_on_with_the_last_reply_that_is_needed() {
        let replies = Replies::new(2);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| replies.wait([1000, 500].into_iter()));
            for number in 0..1000 {
                replies.count(0);
                if number % 2 == 0 {
                    replies.count(1);
                }
            }
            assert!(waiting.join().unwrap());
        });
        assert!(replies.wait([1000, 500].into_iter()));
    }

    #[test]
    fn the_end_leaves_nobody_waiting() {
        let replies = Replies::new(1);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| replies.wait([1].into_iter()));
            replies.end();
            assert!(!waiting.join().unwrap());
        });
    }
}
