//! Writing records without holding up who prints: a queue, and a thread that empties it.

use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};

use super::sink::Sink;
use super::{HEADER, Header, MAX_DATA, Set, Stream};

/// The most bytes that wait to be written.
const MAX_QUEUE: usize = 4 << 20;

/// How long [`Writer::flush`] waits for a disk.
const FLUSH: Duration = Duration::from_secs(5);

/// Takes what a machine prints. Writes all of it before it is gone.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    set: Set,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// There is more in the queue, or it was closed.
    filled: Condvar,
    /// There is less in it, or all of it was written.
    emptied: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// Whole records.
    records: Vec<u8>,
    /// The thread has taken some that are not in the file yet.
    writing: bool,
    /// Bytes that did not fit in.
    lost: u64,
    closed: bool,
}

impl Writer {
    /// Appends to the records of `set` in `dir`, which another writer may have left.
    pub fn open(dir: &Path, set: Set) -> Result<Self> {
        let mut sink = Sink::new(dir, set)
            .with_context(|| format!("nothing can be recorded in {}", dir.display()))?;
        if let Err(error) = sink.open() {
            // It is tried again with each record.
            tracing::warn!("the {} of a machine is not written: {error}", set.name);
        }
        let shared = Arc::new(Shared::default());
        let writing = shared.clone();
        let thread = thread::Builder::new()
            .name("record".into())
            .spawn(move || write_all(&writing, sink))
            .context("no thread for a machine's log")?;
        Ok(Self {
            shared,
            set,
            thread: Some(thread),
        })
    }

    /// Records what was printed to `stream`, just now. What the disk does not take in time is lost, which is
    /// then recorded.
    pub fn write(&self, stream: Stream, data: &[u8]) {
        for data in data.chunks(MAX_DATA) {
            self.write_one(stream, data);
        }
    }

    fn write_one(&self, stream: Stream, data: &[u8]) {
        let header = Header::now(stream, data.len()).encode();
        let full = |queue: &mut Queue| queue.records.len() + HEADER + data.len() > MAX_QUEUE;
        let mut queue = self.shared.queue();
        if full(&mut queue) {
            let waited = self
                .shared
                .emptied
                .wait_timeout_while(queue, self.set.patience, full);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if full(&mut queue) {
            queue.lost += data.len() as u64;
            return;
        }
        queue.records.extend_from_slice(&header);
        queue.records.extend_from_slice(data);
        drop(queue);
        self.shared.filled.notify_one();
    }

    /// Waits, not for long, until all that was recorded is in the file.
    pub fn flush(&self) {
        let waited = self
            .shared
            .emptied
            .wait_timeout_while(self.shared.queue(), FLUSH, |queue| {
                queue.writing || !queue.records.is_empty()
            });
        drop(waited);
    }
}

/// What is written in this way came from the serial port.
impl io::Write for Writer {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        Self::write(self, Stream::Console, data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // The thread needs no push, and who prints no disk.
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.filled.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread that writes a machine's log panicked");
        }
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes what is in the queue until it is closed and empty.
fn write_all(shared: &Shared, mut sink: Sink) {
    let mut lost = Lost::default();
    let mut records = Vec::new();
    loop {
        let mut queue = shared
            .filled
            .wait_while(shared.queue(), |queue| {
                queue.records.is_empty() && queue.lost == 0 && !queue.closed
            })
            .unwrap_or_else(PoisonError::into_inner);
        records.clear();
        std::mem::swap(&mut records, &mut queue.records);
        queue.writing = true;
        let overrun = std::mem::take(&mut queue.lost);
        let closed = queue.closed;
        drop(queue);
        shared.emptied.notify_all();

        lost.tell(&mut sink);
        if let Err((error, bytes)) = sink.write(&records) {
            lost.add(bytes, &error.to_string());
        }
        // They came after those that were in the queue.
        if overrun > 0 {
            lost.add(overrun, "the disk is too slow");
            lost.tell(&mut sink);
        }
        shared.queue().writing = false;
        shared.emptied.notify_all();
        if closed {
            lost.tell(&mut sink);
            if lost.bytes > 0 {
                tracing::warn!("{} bytes of output were lost: {}", lost.bytes, lost.reason);
            }
            return;
        }
    }
}

/// Output that could not be written, and about which nothing could be written either.
#[derive(Debug, Default)]
struct Lost {
    bytes: u64,
    reason: String,
}

impl Lost {
    fn add(&mut self, bytes: u64, reason: &str) {
        self.bytes += bytes;
        reason.clone_into(&mut self.reason);
    }

    /// Records it, where that works by now.
    fn tell(&mut self, sink: &mut Sink) {
        if self.bytes == 0 {
            return;
        }
        let note = format!(
            "{} bytes of output were lost: {}\n",
            self.bytes, self.reason
        );
        let mut record = Header::now(Stream::Note, note.len()).encode().to_vec();
        record.extend_from_slice(note.as_bytes());
        if sink.write(&record).is_ok() {
            self.bytes = 0;
        }
    }
}
