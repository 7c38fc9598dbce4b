//! How much connections may hold for their host streams.

use super::Mux;

/// Bytes that a connection may hold for its host stream at most: those whose data flows. The guest is woken up
/// for each quarter of it that came free.
const BUF_ALLOC_MAX: u32 = 1 << 20;
/// What a new connection may hold at most.
const BUF_ALLOC_FIRST: u32 = 256 << 10;
/// What every connection may hold.
pub(super) const BUF_ALLOC_MIN: u32 = 16 << 10;
/// What all connections together may hold beyond that. New connections get from the first half;
/// the other one is for those that turn out to be busy.
pub(super) const BUFFER_BUDGET: u64 = 128 << 20;

impl Mux {
    /// What the next connection may hold.
    pub(super) fn buf_alloc(&self) -> u32 {
        let share = (BUFFER_BUDGET / 2).saturating_sub(self.promised) / 32;
        let most = BUF_ALLOC_FIRST - BUF_ALLOC_MIN;
        BUF_ALLOC_MIN + u32::try_from(share).map_or(most, |share| share.min(most))
    }

    /// Lets a connection hold more whose data flows, if there is anything left to give.
    pub(super) fn grow(&mut self, index: usize) {
        let Some(connection) = self.table.get_mut(index) else {
            return;
        };
        let more = u64::from(BUF_ALLOC_MAX.saturating_sub(connection.credit.buf_alloc()));
        if more > 0 && self.promised + more <= BUFFER_BUDGET && connection.is_flowing() {
            self.promised += more;
            connection.grow(BUF_ALLOC_MAX);
        }
    }
}
