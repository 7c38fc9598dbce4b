//! A table whose entries have small numbers, which are reused.

/// The number of an entry.
pub type Index = u32;

/// Entries by their numbers.
#[derive(Debug)]
pub struct Slots<T> {
    entries: Vec<Option<T>>,
    free: Vec<Index>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slots<T> {
    /// How many numbers are in use.
    pub fn len(&self) -> usize {
        self.entries.len().saturating_sub(self.free.len())
    }

    /// Reserves a number; its entry is empty until [`Slots::put`].
    pub fn reserve(&mut self) -> Index {
        self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            // Bounded by the open files that a process may have, far below 2^32.
            (self.entries.len() - 1) as Index
        })
    }

    /// Takes an entry out, to be put back or its number freed.
    pub fn take(&mut self, index: Index) -> Option<T> {
        self.entries.get_mut(index as usize)?.take()
    }

    /// An entry in its place.
    pub fn get_mut(&mut self, index: Index) -> Option<&mut T> {
        self.entries.get_mut(index as usize)?.as_mut()
    }

    /// Puts an entry at a number that was reserved or taken.
    pub fn put(&mut self, index: Index, entry: T) {
        if let Some(place) = self.entries.get_mut(index as usize) {
            *place = Some(entry);
        }
    }

    /// Frees a number whose entry was taken, or never put.
    pub fn free(&mut self, index: Index) {
        self.free.push(index);
    }
}
