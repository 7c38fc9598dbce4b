//! A table whose entries have small numbers, which are reused, and a queue of those with work to do.

use std::collections::VecDeque;

/// The number of an entry.
pub type Index = u32;

/// Entries by their numbers.
#[derive(Debug)]
pub struct Slots<T> {
    slots: Vec<Slot<T>>,
    free: Vec<Index>,
    ready: VecDeque<Index>,
}

#[derive(Debug)]
struct Slot<T> {
    entry: Option<T>,
    is_ready: bool,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            ready: VecDeque::new(),
        }
    }
}

impl<T> Slots<T> {
    /// How many numbers are in use.
    pub fn len(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    /// Reserves a number; its entry is empty until [`Slots::put`].
    pub fn reserve(&mut self) -> Index {
        self.free.pop().unwrap_or_else(|| {
            let slot = Slot {
                entry: None,
                is_ready: false,
            };
            self.slots.push(slot);
            // Each entry has a descriptor, of which a process has far fewer than 2^31.
            (self.slots.len() - 1) as Index
        })
    }

    /// Takes an entry out, to be put back or its number freed.
    pub fn take(&mut self, index: Index) -> Option<T> {
        self.slots.get_mut(index as usize)?.entry.take()
    }

    /// An entry in its place.
    pub fn get_mut(&mut self, index: Index) -> Option<&mut T> {
        self.slots.get_mut(index as usize)?.entry.as_mut()
    }

    /// Puts an entry at a number that was reserved or taken.
    pub fn put(&mut self, index: Index, entry: T) {
        if let Some(slot) = self.slots.get_mut(index as usize) {
            slot.entry = Some(entry);
        }
    }

    /// Frees a number whose entry was taken, or never put.
    pub fn free(&mut self, index: Index) {
        self.free.push(index);
    }

    /// How many entries there are for which `is_meant` holds.
    pub fn count(&self, is_meant: impl Fn(&T) -> bool) -> usize {
        let entries = self.slots.iter().filter_map(|slot| slot.entry.as_ref());
        entries.filter(|entry| is_meant(entry)).count()
    }

    /// Takes all entries for which `is_meant` holds, and frees their numbers.
    pub fn drain(&mut self, mut is_meant: impl FnMut(&mut T) -> bool) -> Vec<T> {
        let mut drained = Vec::new();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if slot.entry.as_mut().is_some_and(&mut is_meant) {
                drained.extend(slot.entry.take());
                self.free.push(index as Index);
            }
        }
        drained
    }

    /// Queues an entry for its turn, once.
    pub fn enqueue(&mut self, index: Index) {
        if let Some(slot) = self.slots.get_mut(index as usize)
            && !std::mem::replace(&mut slot.is_ready, true)
        {
            self.ready.push_back(index);
        }
    }

    /// The entry whose turn it is.
    pub fn dequeue(&mut self) -> Option<Index> {
        let index = self.ready.pop_front()?;
        if let Some(slot) = self.slots.get_mut(index as usize) {
            slot.is_ready = false;
        }
        Some(index)
    }

    /// How many wait for their turn.
    pub fn ready(&self) -> usize {
        self.ready.len()
    }
}
