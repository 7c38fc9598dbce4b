//! The thread behind an active vsock device: it owns the queues and the connections.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::timerfd::TimerFd;

use super::Mux;
use super::counters::Counters;
use super::mux::VsockQueue;
use crate::interrupt::Interrupt;
use crate::virtio::{ActivateError, Activation, ActiveQueue};

const RX_QUEUE: usize = 0;
const TX_QUEUE: usize = 1;

/// How long the driver may be left without news of packets that were taken from it.
const TX_NEWS_AFTER: Duration = Duration::from_millis(10);

/// How many packets are taken without telling the driver: few enough that its queue has room left.
const TX_NEWS_PACKETS: u64 = 32;

/// What the worker thread owns.
pub(super) struct VsockWorker {
    mux: Box<Mux>,
    memory: GuestMemoryMmap,
    rx: ActiveQueue,
    tx: ActiveQueue,
    /// The event queue's only event is a transport reset after a migration: there is none here.
    _event: Option<ActiveQueue>,
    news: News,
    broken: bool,
}

/// What the driver is told, and when.
///
/// It waits for packets that are sent to it, and does not for having its own taken: it only frees them. An answer
/// comes soon after most of them, so the one interrupt tells of both; the line is the device's, not a queue's.
struct News {
    interrupt: Arc<Interrupt>,
    /// How many packets had been taken when the driver first was to be told of that, and was not yet.
    owed_since: Option<u64>,
    counters: Arc<Counters>,
    timer: TimerFd,
    timer_runs: bool,
}

impl News {
    fn new(interrupt: Arc<Interrupt>, counters: Arc<Counters>, timer: TimerFd) -> Self {
        Self {
            interrupt,
            owed_since: None,
            counters,
            timer,
            timer_runs: false,
        }
    }

    fn taken(&self) -> u64 {
        self.counters.tx_packets.load(Ordering::Relaxed)
    }

    /// The driver is to be told of a queue.
    fn note(&mut self, queue: VsockQueue) {
        match queue {
            VsockQueue::Rx => self.tell(),
            VsockQueue::Tx if self.owed_since.is_none() => self.owed_since = Some(self.taken()),
            VsockQueue::Tx => {}
        }
    }

    fn tell(&mut self) {
        self.owed_since = None;
        self.interrupt.signal_queue();
    }

    /// Tells what is owed, where that is much; else it is told in a while.
    fn settle(&mut self) {
        match self.owed_since {
            Some(since) if self.taken().wrapping_sub(since) >= TX_NEWS_PACKETS => self.tell(),
            // Not set anew for each packet: a timer that runs comes early enough for all.
            Some(_) if !self.timer_runs => match self.timer.reset(TX_NEWS_AFTER, None) {
                Ok(()) => self.timer_runs = true,
                Err(error) => {
                    tracing::warn!("the vsock worker's timer cannot be set: {error}");
                    self.tell();
                }
            },
            _ => {}
        }
    }

    fn timed_out(&mut self) {
        // Readable, or this would not be called.
        let _ = self.timer.wait();
        self.timer_runs = false;
        if self.owed_since.is_some() {
            self.tell();
        }
    }
}

impl VsockWorker {
    /// Joins a mux to queues; gives it back where one of them is missing.
    pub fn new(mux: Box<Mux>, activation: Activation) -> Result<Self, (Box<Mux>, ActivateError)> {
        let mut queues = activation.queues.into_iter();
        let mut usable = |index| {
            queues
                .next()
                .filter(|queue| virtio_queue::QueueT::ready(&queue.queue))
                .ok_or(ActivateError::QueueMissing(index))
        };
        let queues = usable(RX_QUEUE).and_then(|rx| Ok((rx, usable(TX_QUEUE)?)));
        let parts = queues.and_then(|(rx, tx)| {
            let timer = TimerFd::new().map_err(std::io::Error::from)?;
            Ok((rx, tx, timer))
        });
        let (rx, tx, timer) = match parts {
            Ok(parts) => parts,
            Err(error) => return Err((mux, error)),
        };
        let counters = mux.counters().clone();
        Ok(Self {
            mux,
            memory: activation.memory,
            rx,
            tx,
            _event: usable(2).ok(),
            news: News::new(activation.interrupt, counters, timer),
            broken: false,
        })
    }

    /// Takes what the guest had sent before the reset, and gives the mux back for the next
    /// activation.
    pub fn finish(mut self) -> Box<Mux> {
        if !self.broken {
            self.mux.finish(&self.memory, &mut self.tx.queue);
        }
        self.mux
    }

    fn turn(&mut self, ops: &mut EventOps) {
        if self.broken {
            return;
        }
        let news = &mut self.news;
        let (rx, tx) = (&mut self.rx.queue, &mut self.tx.queue);
        let result = self
            .mux
            .turn(&self.memory, rx, tx, |queue| news.note(queue));
        news.settle();
        if let Err(error) = result {
            tracing::warn!("the vsock device waits for a reset, as a ring is broken: {error}");
            self.broken = true;
            self.news.interrupt.signal_needs_reset();
            for fd in [
                self.news.timer.as_raw_fd(),
                self.mux.as_raw_fd(),
                self.rx.kick.as_raw_fd(),
                self.tx.kick.as_raw_fd(),
            ] {
                let events = Events::new_raw(fd, EventSet::IN);
                if let Err(error) = ops.remove(events) {
                    tracing::error!("the vsock worker still watches a descriptor: {error}");
                }
            }
        }
    }
}

impl MutEventSubscriber for VsockWorker {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.news.timer.as_raw_fd() {
            return self.news.timed_out();
        }
        if events.fd() == self.mux.as_raw_fd() && !self.broken {
            self.mux.look_at_host();
        }
        self.turn(ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        // Every write to a kick is an edge, so that kicks need not be read.
        let kick = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (fd, events) in [
            (self.news.timer.as_raw_fd(), EventSet::IN),
            (self.mux.as_raw_fd(), EventSet::IN),
            (self.rx.kick.as_raw_fd(), kick),
            (self.tx.kick.as_raw_fd(), kick),
        ] {
            if let Err(error) = ops.add(Events::new_raw(fd, events)) {
                tracing::error!("the vsock worker cannot watch a descriptor: {error}");
                self.news.interrupt.signal_needs_reset();
            }
        }
        // What the driver or the process queued before this thread ran.
        self.turn(ops);
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    fn news() -> News {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Arc::new(Interrupt::new(line, Arc::default()));
        News::new(interrupt, Arc::default(), TimerFd::new().unwrap())
    }

    fn interrupts(news: &News) -> u64 {
        // Fails where the counter is zero.
        news.interrupt.line().read().unwrap_or(0)
    }

    #[test]
    fn one_interrupt_tells_of_what_was_taken_and_of_the_answer() {
        let mut news = news();
        news.note(VsockQueue::Tx);
        assert_eq!(interrupts(&news), 0);
        news.note(VsockQueue::Rx);
        assert_eq!(interrupts(&news), 1);
        news.settle();
        assert!(!news.timer_runs);
        assert_eq!(interrupts(&news), 0);
    }

    #[test]
    fn what_was_taken_without_an_answer_is_told_in_a_while() {
        let mut news = news();
        news.note(VsockQueue::Tx);
        news.settle();
        assert!(news.timer_runs);
        assert_eq!(interrupts(&news), 0);
        news.timed_out();
        assert_eq!(interrupts(&news), 1);
    }

    #[test]
    fn much_that_was_taken_is_told_at_once() {
        let mut news = news();
        Counters::add(&news.counters.tx_packets, 7);
        news.note(VsockQueue::Tx);
        Counters::add(&news.counters.tx_packets, TX_NEWS_PACKETS - 1);
        news.settle();
        assert_eq!(interrupts(&news), 0);
        Counters::add(&news.counters.tx_packets, 1);
        news.settle();
        assert_eq!(interrupts(&news), 1);
    }
}
