//! The bytes of one connection that its host stream did not take at once.
//!
//! Memory is allocated when the first byte is held back, doubles up to the advertised
//! `buf_alloc`, and is given back when the backlog runs empty after having held little.

use vm_memory::VolatileSlice;

const SMALLEST: usize = 4096;

/// A ring of bytes that grows.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: Box<[u8]>,
    head: usize,
    len: usize,
    peak: usize,
}

impl Backlog {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a piece of guest memory. The caller has bounded the length (flow control).
    pub fn push(&mut self, piece: &VolatileSlice<'_>) {
        self.reserve(piece.len());
        let tail = (self.head + self.len) % self.bytes.len().max(1);
        let first = piece.copy_to(self.free_from(tail));
        if let Ok(rest) = piece.offset(first)
            && first < piece.len()
        {
            // The ring wraps around; the free part at its start has room for the rest.
            rest.copy_to(self.free_from(0));
        }
        self.len += piece.len();
        self.peak = self.peak.max(self.len);
    }

    /// The bytes in order, in up to two parts.
    pub fn filled(&self) -> [&[u8]; 2] {
        let end = self.head + self.len;
        if end <= self.bytes.len() {
            [&self.bytes[self.head..end], &[]]
        } else {
            let wrapped = end - self.bytes.len();
            [&self.bytes[self.head..], &self.bytes[..wrapped]]
        }
    }

    /// Drops the first `count` bytes.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(self.len);
        self.len -= count;
        if self.len == 0 {
            self.head = 0;
            if self.peak <= self.bytes.len() / 4 {
                self.bytes = Box::default();
            }
            self.peak = 0;
        } else {
            self.head = (self.head + count) % self.bytes.len();
        }
    }

    fn free_from(&mut self, at: usize) -> &mut [u8] {
        let end = if at < self.head {
            self.head
        } else {
            self.bytes.len()
        };
        &mut self.bytes[at..end]
    }

    fn reserve(&mut self, more: usize) {
        let need = self.len + more;
        if need <= self.bytes.len() {
            return;
        }
        let mut bytes = vec![0; need.next_power_of_two().max(SMALLEST)].into_boxed_slice();
        let [first, second] = self.filled();
        bytes[..first.len()].copy_from_slice(first);
        bytes[first.len()..self.len].copy_from_slice(second);
        self.bytes = bytes;
        self.head = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(backlog: &mut Backlog, bytes: &mut [u8]) {
        backlog.push(&VolatileSlice::from(bytes));
    }

    fn content(backlog: &Backlog) -> Vec<u8> {
        backlog.filled().concat()
    }

    #[test]
    fn bytes_come_out_in_the_order_they_went_in_however_the_ring_wraps() {
        let mut backlog = Backlog::default();
        let (mut next, mut expected) = (0u8, std::collections::VecDeque::new());
        for (add, take) in [
            (3000, 1),
            (1000, 2500),
            (2500, 900),
            (5000, 8000),
            (9000, 9100),
        ]
        .into_iter()
        .cycle()
        .take(200)
        {
            let mut bytes: Vec<u8> = (0..add)
                .map(|_| {
                    next = next.wrapping_add(7);
                    next
                })
                .collect();
            expected.extend(bytes.iter().copied());
            push(&mut backlog, &mut bytes);
            assert_eq!(
                content(&backlog),
                expected.iter().copied().collect::<Vec<_>>()
            );
            let take = take.min(backlog.len());
            backlog.consume(take);
            expected.drain(..take);
            assert_eq!(backlog.len(), expected.len());
        }
    }

    #[test]
    fn an_empty_ring_holds_no_memory_before_and_after_little_use() {
        let mut backlog = Backlog::default();
        assert_eq!(backlog.bytes.len(), 0);
        push(&mut backlog, &mut [1; 100]);
        assert_eq!(backlog.bytes.len(), SMALLEST);
        backlog.consume(100);
        assert_eq!(backlog.bytes.len(), 0);
        push(&mut backlog, &mut vec![1; 200_000]);
        backlog.consume(200_000);
        push(&mut backlog, &mut [1; 100]);
        backlog.consume(100);
        assert_eq!(
            backlog.bytes.len(),
            0,
            "a large ring is kept only while it is used"
        );
    }
}
