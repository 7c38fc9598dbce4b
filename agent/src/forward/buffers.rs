//! The memory through which bytes go, and in which they wait.

use std::ops::Range;
use std::sync::Arc;

/// The size of a buffer.
const SIZE: usize = 256 << 10;

/// What waits in a copy of its own rather than in a buffer that is lent.
const COPIED: usize = 16 << 10;

/// Buffers that are lent at a time: 64 MiB.
const MAX_LENT: usize = 256;

/// Buffers that wait to be lent again.
const MAX_SPARE: usize = 4;

/// A buffer that all connections read into, one after the other. What could not be passed on at once
/// stays in it, where it is much, and another takes its place: bytes are not copied to wait.
#[derive(Debug)]
pub struct Buffers {
    shared: Box<[u8]>,
    spare: Vec<Box<[u8]>>,
    /// Counts those that are lent: each holds a reference, however it ends.
    loans: Arc<()>,
}

/// Bytes that wait.
#[derive(Debug)]
pub struct Rest {
    buffer: Box<[u8]>,
    bytes: Range<usize>,
    /// Of a buffer that is lent.
    loan: Option<Arc<()>>,
}

impl Buffers {
    /// The shared buffer, and nothing lent.
    pub fn new() -> Self {
        Self {
            shared: new(),
            spare: Vec::new(),
            loans: Arc::new(()),
        }
    }

    /// The size of a buffer.
    pub fn size(&self) -> usize {
        SIZE
    }

    /// How many are lent.
    pub fn lent(&self) -> usize {
        Arc::strong_count(&self.loans).saturating_sub(1)
    }

    /// How much to read of a connection that would like to read `wanted` bytes: what has to wait must
    /// have a place.
    pub fn limit(&self, wanted: usize) -> usize {
        match self.lent() < MAX_LENT {
            true => wanted.min(SIZE),
            false => wanted.min(COPIED),
        }
    }

    /// What connections read into.
    pub fn shared(&mut self) -> &mut [u8] {
        &mut self.shared
    }

    /// Keeps these bytes of the shared buffer.
    pub fn keep(&mut self, bytes: Range<usize>) -> Rest {
        if bytes.len() <= COPIED || self.lent() >= MAX_LENT {
            let buffer = self.shared.get(bytes).unwrap_or_default();
            return Rest {
                bytes: 0..buffer.len(),
                buffer: buffer.into(),
                loan: None,
            };
        }
        let another = match self.spare.pop() {
            Some(spare) => spare,
            None => new(),
        };
        Rest {
            buffer: std::mem::replace(&mut self.shared, another),
            bytes,
            loan: Some(Arc::clone(&self.loans)),
        }
    }

    /// Takes back what nothing waits in any more, to be lent again. To drop it does too; it only
    /// costs an allocation.
    pub fn give_back(&mut self, rest: Rest) {
        if rest.loan.is_some() && self.spare.len() < MAX_SPARE {
            self.spare.push(rest.buffer);
        }
    }
}

impl Rest {
    /// Those that still wait.
    pub fn bytes(&self) -> &[u8] {
        self.buffer.get(self.bytes.clone()).unwrap_or_default()
    }

    /// Forgets the first `count` of them.
    pub fn consume(&mut self, count: usize) {
        self.bytes.start = self.bytes.end.min(self.bytes.start + count);
    }
}

fn new() -> Box<[u8]> {
    vec![0; SIZE].into_boxed_slice()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_stays_as_it_was_while_the_shared_buffer_is_used() {
        let mut buffers = Buffers::new();
        buffers.shared().fill(1);
        let mut much = buffers.keep(10..100_000);
        buffers.shared().fill(2);
        let mut little = buffers.keep(5..8);
        buffers.shared().fill(3);
        assert_eq!(much.bytes().len(), 99_990);
        assert!(much.bytes().iter().all(|byte| *byte == 1));
        assert_eq!(little.bytes(), [2, 2, 2]);
        much.consume(99_989);
        assert_eq!(much.bytes(), [1]);
        little.consume(4);
        assert!(little.bytes().is_empty());
        buffers.give_back(much);
        buffers.give_back(little);
        assert_eq!(buffers.lent(), 0);
    }

    #[test]
    fn no_more_is_lent_than_there_is_and_all_of_it_comes_back() {
        let mut buffers = Buffers::new();
        let lent: Vec<Rest> = (0..MAX_LENT).map(|_| buffers.keep(0..SIZE)).collect();
        assert_eq!(buffers.limit(SIZE), COPIED);
        // Read before there was nothing more to lend.
        let copied = buffers.keep(0..COPIED + 1);
        assert_eq!(copied.buffer.len(), COPIED + 1);
        buffers.give_back(copied);
        assert_eq!(buffers.limit(SIZE), COPIED);
        lent.into_iter().for_each(|rest| buffers.give_back(rest));
        assert_eq!((buffers.lent(), buffers.spare.len()), (0, MAX_SPARE));
        assert_eq!(buffers.limit(SIZE), SIZE);
    }

    #[test]
    fn what_is_dropped_is_not_lent_any_more() {
        let mut buffers = Buffers::new();
        let kept = buffers.keep(0..SIZE);
        assert_eq!(buffers.lent(), 1);
        drop(kept);
        assert_eq!(buffers.lent(), 0);
    }
}
