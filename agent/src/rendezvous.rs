//! Where a session, or a mount, meets its streams: they come on connections of their own, in any order.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::connection::Connection;

/// How long a session waits for its streams, and a stream for its session.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A session's streams by what they are to it.
pub type Streams<K> = HashMap<K, Arc<Connection>>;

/// Streams that no session has taken yet; `K` tells those of one session apart.
///
/// Bounded: the thread of the connection that brought a stream waits here with it, and their
/// number is bounded where connections are accepted.
#[derive(Debug)]
pub struct Rendezvous<K> {
    waiting: Mutex<HashMap<u64, Streams<K>>>,
    changed: Condvar,
}

impl<K> Default for Rendezvous<K> {
    fn default() -> Self {
        Self {
            waiting: Mutex::default(),
            changed: Condvar::new(),
        }
    }
}

impl<K: Copy + Eq + Hash> Rendezvous<K> {
    /// Leaves a stream for its session and waits until it was taken.
    ///
    /// A stream that nobody takes within `patience`, or that is there already, is closed.
    pub fn offer(&self, session: u64, kind: K, stream: Connection, patience: Duration) {
        let mut waiting = self.waiting();
        let streams = waiting.entry(session).or_default();
        if streams.contains_key(&kind) {
            return;
        }
        let stream = Arc::new(stream);
        streams.insert(kind, Arc::clone(&stream));
        self.changed.notify_all();
        let is_here = |waiting: &HashMap<u64, Streams<K>>| {
            let offered = waiting.get(&session).and_then(|streams| streams.get(&kind));
            offered.is_some_and(|offered| Arc::ptr_eq(offered, &stream))
        };
        let deadline = Instant::now() + patience;
        while is_here(&waiting) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                take(&mut waiting, session, &[kind]);
                return;
            }
            let waited = self.changed.wait_timeout(waiting, left);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes the streams of `kinds`, waiting for them; the kinds that did not come within `patience` are the error.
    pub fn collect(
        &self,
        session: u64,
        kinds: &[K],
        patience: Duration,
    ) -> Result<Streams<K>, Vec<K>> {
        let missing = |waiting: &HashMap<u64, Streams<K>>| -> Vec<K> {
            let here = waiting.get(&session);
            let is_missing = |kind: &K| !here.is_some_and(|streams| streams.contains_key(kind));
            kinds.iter().copied().filter(is_missing).collect()
        };
        let deadline = Instant::now() + patience;
        let mut waiting = self.waiting();
        loop {
            let missing = missing(&waiting);
            let left = deadline.saturating_duration_since(Instant::now());
            if missing.is_empty() || left.is_zero() {
                let streams = take(&mut waiting, session, kinds);
                self.changed.notify_all();
                return if missing.is_empty() {
                    Ok(streams)
                } else {
                    Err(missing)
                };
            }
            let waited = self.changed.wait_timeout(waiting, left);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Streams<K>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take<K: Copy + Eq + Hash>(
    waiting: &mut HashMap<u64, Streams<K>>,
    session: u64,
    kinds: &[K],
) -> Streams<K> {
    let Some(streams) = waiting.get_mut(&session) else {
        return Streams::new();
    };
    let taken = kinds
        .iter()
        .filter_map(|kind| streams.remove_entry(kind))
        .collect();
    if streams.is_empty() {
        waiting.remove(&session);
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent::protocol::StreamKind;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::thread;

    const SOON: Duration = Duration::from_millis(20);

    fn stream() -> (Connection, UnixStream) {
        let (agent, host) = UnixStream::pair().unwrap();
        (Connection::new(agent), host)
    }

    #[test]
    fn streams_meet_their_session_in_either_order() {
        let rendezvous = Rendezvous::default();
        thread::scope(|scope| {
            let (early, _early_host) = stream();
            let (late, _late_host) = stream();
            scope.spawn(|| rendezvous.offer(7, StreamKind::Stdout, early, PATIENCE));
            let session = scope.spawn(|| {
                rendezvous.collect(7, &[StreamKind::Stdout, StreamKind::Stderr], PATIENCE)
            });
            scope.spawn(|| rendezvous.offer(7, StreamKind::Stderr, late, PATIENCE));
            assert_eq!(session.join().unwrap().unwrap().len(), 2);
        });
        assert!(rendezvous.waiting().is_empty(), "a stream was left behind");
    }

    #[test]
    fn a_stream_without_a_session_is_closed() {
        let rendezvous = Rendezvous::default();
        let (agent, mut host) = stream();
        rendezvous.offer(1, StreamKind::Stdin, agent, SOON);
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
        assert!(
            rendezvous.waiting().is_empty(),
            "the stream was left behind"
        );
    }

    #[test]
    fn a_session_without_its_streams_says_which() {
        let rendezvous = Rendezvous::default();
        let kinds = [StreamKind::Stdout, StreamKind::Stderr];
        assert_eq!(rendezvous.collect(1, &kinds, SOON).unwrap_err(), kinds);
    }

    #[test]
    fn a_second_stream_of_a_kind_is_closed_and_the_first_is_kept() {
        let rendezvous = Rendezvous::default();
        thread::scope(|scope| {
            let (first, _first_host) = stream();
            scope.spawn(|| rendezvous.offer(1, StreamKind::Stdin, first, PATIENCE));
            while rendezvous.waiting().is_empty() {
                thread::yield_now();
            }
            let (second, mut second_host) = stream();
            rendezvous.offer(1, StreamKind::Stdin, second, PATIENCE);
            assert_eq!(second_host.read(&mut [0]).unwrap(), 0);
            rendezvous
                .collect(1, &[StreamKind::Stdin], PATIENCE)
                .unwrap();
        });
    }
}
