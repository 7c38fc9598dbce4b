//! A thread that owns what it works on: an epoll loop over one subscriber.
//!
//! A virtio device moves its queues into a worker at activation and gets them dropped when the
//! worker is stopped, so no queue is ever shared and no data path takes a lock.

use std::io;
use std::thread::{self, JoinHandle};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A running worker thread; dropping it stops the thread and waits for it.
#[derive(Debug)]
pub struct Worker<S> {
    stop: EventFd,
    thread: Option<JoinHandle<Option<S>>>,
}

impl<S: MutEventSubscriber + Send + 'static> Worker<S> {
    /// Starts a thread called `name` (15 bytes show in `ps`) that runs `subscriber` until stopped.
    pub fn spawn(name: &str, subscriber: S) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let subscriber = Stoppable {
            inner: subscriber,
            stop: stop.try_clone()?,
            stopped: false,
        };
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(subscriber))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl<S> Worker<S> {
    /// Stops the thread, waits for it, and hands back what it owned (None if it panicked).
    pub fn stop(mut self) -> Option<S> {
        self.join()
    }

    fn join(&mut self) -> Option<S> {
        let thread = self.thread.take()?;
        // Fails only on an overflowing counter: then the thread has been told already.
        let _ = self.stop.write(1);
        thread.join().ok().flatten()
    }
}

impl<S> Drop for Worker<S> {
    fn drop(&mut self) {
        self.join();
    }
}

struct Stoppable<S> {
    inner: S,
    stop: EventFd,
    stopped: bool,
}

impl<S: MutEventSubscriber> MutEventSubscriber for Stoppable<S> {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        use std::os::fd::AsRawFd;
        if events.fd() == self.stop.as_raw_fd() {
            self.stopped = true;
        } else if !self.stopped {
            self.inner.process(events, ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.stop, EventSet::IN)) {
            tracing::error!("a worker cannot watch its stop event: {error}");
            self.stopped = true;
        }
        self.inner.init(ops);
    }
}

fn run<S: MutEventSubscriber>(subscriber: Stoppable<S>) -> Option<S> {
    let mut manager = match EventManager::new() {
        Ok(manager) => manager,
        Err(error) => {
            tracing::error!("a worker cannot start its event loop: {error}");
            return None;
        }
    };
    let id: SubscriberId = manager.add_subscriber(subscriber);
    loop {
        if let Err(error) = manager.run() {
            tracing::error!("a worker's event loop failed: {error}");
            break;
        }
        match manager.subscriber_mut(id) {
            Ok(subscriber) if !subscriber.stopped => {}
            _ => break,
        }
    }
    manager.remove_subscriber(id).ok().map(|s| s.inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counter {
        kick: EventFd,
        seen: u64,
        done: EventFd,
    }

    impl MutEventSubscriber for Counter {
        fn process(&mut self, _: Events, _: &mut EventOps) {
            self.seen += self.kick.read().unwrap_or(0);
            self.done.write(1).unwrap();
        }
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.kick, EventSet::IN)).unwrap();
        }
    }

    #[test]
    fn a_worker_processes_events_and_hands_its_subscriber_back() {
        let kick = EventFd::new(0).unwrap();
        let done = EventFd::new(0).unwrap();
        let worker = Worker::spawn(
            "counter",
            Counter {
                kick: kick.try_clone().unwrap(),
                seen: 0,
                done: done.try_clone().unwrap(),
            },
        )
        .unwrap();
        kick.write(3).unwrap();
        done.read().unwrap();
        assert_eq!(worker.stop().map(|c| c.seen), Some(3));
    }

    #[test]
    fn dropping_a_worker_that_was_never_kicked_ends_it() {
        let worker = Worker::spawn(
            "idle",
            Counter {
                kick: EventFd::new(0).unwrap(),
                seen: 0,
                done: EventFd::new(0).unwrap(),
            },
        );
        drop(worker.unwrap());
    }
}
