//! The way of a queue's requests to the host, on which closed and forgotten files wait for company.
//!
//! Nobody waits for a file to be closed on the host, so the kernel has its reply at once. Where the file was only
//! read, the request goes with the next one, or in a while: a packet and a wake-up for each are saved. One that was
//! written to is closed without delay, as nobody on the host can execute it before. That the kernel forgets a file has
//! no reply at all.

use std::io::{self, IoSlice, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::alarm::Alarm;
use super::message::{self, IN_HEADER, OUT_HEADER, word};
use crate::connection::Connection;

/// The opcodes `FUSE_RELEASE` and `FUSE_RELEASEDIR`, `FUSE_FORGET` and `FUSE_BATCH_FORGET`.
const RELEASES: [u32; 2] = [18, 29];
const FORGETS: [u32; 2] = [2, 42];

/// `fuse_release_in.flags`, those of open(2).
const FLAGS: usize = IN_HEADER + 8;
const O_ACCMODE: u32 = 0o3;

/// For how long requests are held back.
pub const PATIENCE: Duration = Duration::from_millis(20);

/// How many bytes of them are.
const HELD: usize = 4 << 10;

/// The reply to a request for which nobody has to ask the host; None where it has to be asked.
pub fn reply_to(request: &[u8]) -> Option<[u8; OUT_HEADER]> {
    is_release(request).then(|| message::reply(request, 0))?
}

/// Whether a request closes something.
pub fn is_release(request: &[u8]) -> bool {
    message::opcode(request).is_some_and(|opcode| RELEASES.contains(&opcode))
}

/// Whether a request can wait: nobody waits for what it does.
pub fn can_wait(request: &[u8]) -> bool {
    match message::opcode(request) {
        Some(opcode) if FORGETS.contains(&opcode) => request.len() < HELD,
        Some(opcode) if RELEASES.contains(&opcode) => {
            word(request, FLAGS).is_some_and(|flags| flags & O_ACCMODE == 0)
        }
        _ => false,
    }
}

/// Requests on their way to one connection.
#[derive(Debug)]
pub struct Outbox {
    to: Arc<Connection>,
    /// What is held back. Locked while something is written, too: messages follow each other whole.
    held: Mutex<Vec<u8>>,
    alarm: Arc<Alarm>,
}

impl Outbox {
    /// One without requests, which `alarm` is for.
    pub fn new(to: Arc<Connection>, alarm: Arc<Alarm>) -> Self {
        Self {
            to,
            held: Mutex::default(),
            alarm,
        }
    }

    /// Sends a request, and before it what was held back.
    pub fn send(&self, request: &[u8]) -> io::Result<()> {
        let mut held = lock(&self.held);
        let mut both = [IoSlice::new(&held), IoSlice::new(request)];
        write_all(&self.to, &mut both)?;
        held.clear();
        Ok(())
    }

    /// Sends a request soon.
    pub fn hold(&self, request: &[u8]) -> io::Result<()> {
        let mut held = lock(&self.held);
        held.extend_from_slice(request);
        match held.len() {
            ..HELD => {
                self.alarm.set();
                Ok(())
            }
            _ => self.flush_locked(&mut held),
        }
    }

    /// Has a request sent with the next one. To be [flushed](Self::flush) where none comes at once.
    pub fn hold_briefly(&self, request: &[u8]) -> io::Result<()> {
        let mut held = lock(&self.held);
        held.extend_from_slice(request);
        match held.len() {
            ..HELD => Ok(()),
            _ => self.flush_locked(&mut held),
        }
    }

    /// Has `pass_on` take what is held back, or the first so many bytes of it; None where it takes nothing.
    pub fn pass_on<T>(&self, pass_on: impl FnOnce(&[u8]) -> Option<(usize, T)>) -> Option<T> {
        let mut held = lock(&self.held);
        let (taken, value) = pass_on(&held)?;
        let taken = taken.min(held.len());
        held.drain(..taken);
        Some(value)
    }

    /// Sends what is held back.
    pub fn flush(&self) {
        // Where the connection is broken, whoever reads from it ends the mount.
        let _ = self.flush_locked(&mut lock(&self.held));
    }

    fn flush_locked(&self, held: &mut Vec<u8>) -> io::Result<()> {
        (&*self.to).write_all(held)?;
        held.clear();
        Ok(())
    }
}

/// Writes all of the parts, most often with a single system call.
fn write_all(mut to: &Connection, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        match to.write_vectored(parts) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut parts, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    fn request(opcode: u32, unique: u64) -> Vec<u8> {
        let mut request = vec![0; 40];
        request[0] = 40;
        request[4..8].copy_from_slice(&opcode.to_le_bytes());
        request[8..16].copy_from_slice(&unique.to_le_bytes());
        request
    }

    fn outbox() -> (Arc<Outbox>, Arc<Alarm>, UnixStream) {
        let (ours, host) = UnixStream::pair().unwrap();
        host.set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let alarm = Arc::new(Alarm::default());
        let outbox = Outbox::new(Arc::new(Connection::new(ours)), Arc::clone(&alarm));
        (Arc::new(outbox), alarm, host)
    }

    fn received(mut host: &UnixStream, count: usize) -> Vec<u64> {
        let mut bytes = vec![0; 40 * count];
        host.read_exact(&mut bytes).unwrap();
        let (requests, _) = bytes.as_chunks::<40>();
        let unique = |request: &[u8; 40]| u64::from_le_bytes(*request[8..].first_chunk().unwrap());
        requests.iter().map(unique).collect()
    }

    #[test]
    fn only_what_closes_something_has_a_reply_here() {
        let reply = reply_to(&request(18, 0x0102_0304_0506)).unwrap();
        assert_eq!(reply, [16, 0, 0, 0, 0, 0, 0, 0, 6, 5, 4, 3, 2, 1, 0, 0]);
        assert!(reply_to(&request(29, 1)).is_some());
        assert!(reply_to(&request(14, 1)).is_none());
        assert!(reply_to(&[18; 15]).is_none());
    }

    #[test]
    fn what_was_written_to_is_closed_at_once() {
        let mut release = request(18, 1);
        release.extend([0; 24]);
        for (flags, waits) in [
            (0, true),
            (1, false),
            (2, false),
            (0x8000, true),
            (0x8001, false),
        ] {
            release[FLAGS..FLAGS + 4].copy_from_slice(&u32::to_le_bytes(flags));
            assert_eq!(can_wait(&release), waits, "{flags:x}");
        }
        assert!(!can_wait(&request(18, 1)));
        assert!(can_wait(&request(2, 1)) && can_wait(&request(42, 1)));
        assert!(!can_wait(&request(1, 1)));
        let mut many = request(42, 1);
        many.resize(HELD, 0);
        assert!(!can_wait(&many));
    }

    #[test]
    fn what_was_held_back_goes_before_the_next_request() {
        let (outbox, _, host) = outbox();
        outbox.hold(&request(18, 1)).unwrap();
        outbox.hold(&request(18, 2)).unwrap();
        outbox.send(&request(1, 3)).unwrap();
        outbox.send(&request(1, 4)).unwrap();
        assert_eq!(received(&host, 4), [1, 2, 3, 4]);
    }

    #[test]
    fn what_is_held_briefly_goes_with_the_next_request_or_when_it_has_to() {
        let (outbox, _, host) = outbox();
        outbox.hold_briefly(&request(18, 1)).unwrap();
        outbox.send(&request(1, 2)).unwrap();
        assert_eq!(received(&host, 2), [1, 2]);
        outbox.hold_briefly(&request(18, 3)).unwrap();
        outbox.flush();
        assert_eq!(received(&host, 1), [3]);
    }

    #[test]
    fn what_is_passed_on_another_way_is_not_sent() {
        let (outbox, _, host) = outbox();
        for unique in 1..=3 {
            outbox.hold(&request(18, unique)).unwrap();
        }
        assert!(outbox.pass_on(|_| None::<(usize, ())>).is_none());
        let passed_on = outbox.pass_on(|held| Some((80, held.len())));
        assert_eq!(passed_on, Some(120));
        outbox.send(&request(1, 4)).unwrap();
        assert_eq!(received(&host, 2), [3, 4]);
    }

    #[test]
    fn little_is_held_back() {
        let (outbox, _, host) = outbox();
        for unique in 0..HELD as u64 / 40 + 1 {
            outbox.hold(&request(18, unique)).unwrap();
        }
        assert_eq!(received(&host, 100).last(), Some(&99));
    }

    #[test]
    fn what_is_held_back_goes_by_itself_in_a_while_until_the_end() {
        let (outbox, alarm, host) = outbox();
        thread::scope(|scope| {
            let thread = scope.spawn(|| alarm.attend(PATIENCE, || outbox.flush()));
            for unique in 0..3 {
                outbox.hold(&request(18, unique)).unwrap();
                assert_eq!(received(&host, 1), [unique]);
            }
            alarm.end();
            thread.join().unwrap();
        });
    }
}
