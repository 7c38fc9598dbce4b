//! The arithmetic of flow control: who may send how much.
//!
//! Virtio 1.2, section 5.10.6.3. All counters are free-running modulo 2^32; only differences
//! mean anything, and a guest can make its own counters say whatever it likes.

/// The credit of one connection, both ways.
#[derive(Debug, Clone, Copy)]
pub(super) struct Credit {
    /// Our buffer: what the guest may have in flight.
    buf_alloc: u32,
    /// Bytes received from the guest.
    rx_cnt: u32,
    /// Bytes received from the guest that left our buffer.
    fwd_cnt: u32,
    /// The `fwd_cnt` that the guest was told last.
    told_fwd_cnt: u32,
    /// Bytes sent to the guest.
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
}

/// The guest sent more than it was given credit for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overrun;

impl Credit {
    pub fn new(buf_alloc: u32) -> Self {
        Self {
            buf_alloc,
            rx_cnt: 0,
            fwd_cnt: 0,
            told_fwd_cnt: 0,
            tx_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
        }
    }

    /// Takes over the credit fields of a packet from the guest.
    pub fn peer_says(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_buf_alloc = buf_alloc;
        self.peer_fwd_cnt = fwd_cnt;
    }

    /// Bytes that may be sent to the guest now. A guest that shrinks its buffer below what is in
    /// flight, or claims to have taken more than it got, has none to give.
    pub fn window(&self) -> u32 {
        self.peer_buf_alloc
            .saturating_sub(self.tx_cnt.wrapping_sub(self.peer_fwd_cnt))
    }

    /// Counts bytes sent to the guest.
    pub fn sent(&mut self, bytes: u32) {
        self.tx_cnt = self.tx_cnt.wrapping_add(bytes);
    }

    /// Counts bytes that the guest sent, unless they exceed what our buffer has room for.
    pub fn received(&mut self, bytes: u32) -> Result<(), Overrun> {
        let held = self.rx_cnt.wrapping_sub(self.fwd_cnt);
        match held.checked_add(bytes) {
            Some(total) if total <= self.buf_alloc => {
                self.rx_cnt = self.rx_cnt.wrapping_add(bytes);
                Ok(())
            }
            _ => Err(Overrun),
        }
    }

    /// Whether the guest has sent anything.
    pub fn has_received(&self) -> bool {
        self.rx_cnt != 0
    }

    /// Counts bytes that left our buffer.
    pub fn forwarded(&mut self, bytes: u32) {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(bytes);
    }

    /// Whether so much of our buffer came free since the guest heard of it that it should be
    /// told: a quarter, so that a stream never runs dry and an update serves many packets.
    pub fn update_is_due(&self) -> bool {
        self.fwd_cnt.wrapping_sub(self.told_fwd_cnt) >= (self.buf_alloc / 4).max(1)
    }

    /// Our credit fields for the next packet to the guest.
    pub fn ours(&self) -> (u32, u32) {
        (self.buf_alloc, self.fwd_cnt)
    }

    /// Notes that a packet with [`Credit::ours`] went out.
    pub fn told(&mut self) {
        self.told_fwd_cnt = self.fwd_cnt;
    }

    /// Makes our buffer larger.
    pub fn grow(&mut self, buf_alloc: u32) {
        self.buf_alloc = self.buf_alloc.max(buf_alloc);
    }

    /// Bytes of ours that the guest can fill at most.
    pub fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(counter: u32) -> Credit {
        Credit {
            rx_cnt: counter,
            fwd_cnt: counter,
            told_fwd_cnt: counter,
            tx_cnt: counter,
            peer_fwd_cnt: counter,
            ..Credit::new(1000)
        }
    }

    #[test]
    fn the_window_survives_counters_that_wrap_around() {
        for start in [0, 1, u32::MAX - 3, u32::MAX] {
            let mut credit = at(start);
            credit.peer_says(100, start);
            assert_eq!(credit.window(), 100, "from {start}");
            credit.sent(60);
            assert_eq!(credit.window(), 40, "from {start}");
            credit.peer_says(100, start.wrapping_add(60));
            assert_eq!(credit.window(), 100, "from {start}");
        }
    }

    #[test]
    fn a_guest_that_lies_about_its_buffer_gets_no_window() {
        let mut credit = at(50);
        credit.peer_says(100, 50);
        credit.sent(80);
        credit.peer_says(10, 50);
        assert_eq!(credit.window(), 0, "shrunk below what is in flight");
        credit.peer_says(100, 131);
        assert_eq!(credit.window(), 0, "took more than it was sent");
    }

    #[test]
    fn the_guest_may_fill_the_buffer_and_not_one_byte_more() {
        for start in [0, u32::MAX - 500] {
            let mut credit = at(start);
            assert_eq!(credit.received(600), Ok(()));
            assert_eq!(credit.received(401), Err(Overrun));
            assert_eq!(credit.received(400), Ok(()));
            assert_eq!(credit.received(1), Err(Overrun));
            credit.forwarded(1);
            assert_eq!(credit.received(1), Ok(()));
            assert_eq!(credit.received(u32::MAX), Err(Overrun));
        }
    }

    #[test]
    fn an_update_is_due_when_a_quarter_came_free_and_the_guest_was_not_told() {
        let mut credit = at(u32::MAX - 100);
        credit.received(1000).unwrap();
        credit.forwarded(249);
        assert!(!credit.update_is_due());
        credit.forwarded(1);
        assert!(credit.update_is_due());
        credit.told();
        assert!(!credit.update_is_due());
        assert_eq!(credit.ours(), (1000, 149));
    }
}
