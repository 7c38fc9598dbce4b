//! Calls: requests that the host answers while the processor that makes them stands still.
//!
//! The agent leaves a request in memory that the host reaches, and leaves the guest by writing to an I/O port. When it goes on,
//! the answer is there, and no thread had to be woken for it on either side. What would take its time the host does not
//! answer so, and the agent sends it over the stream.

use std::arch::asm;
use std::io;

use agent::protocol::{CALL_ANSWERED, CALL_ASKED, CALL_DONE, CALL_HEADER, CALL_PAGES, WINDOW_PAGE};

use super::message::word;
use super::pinned::Pinned;

/// How much there is for a header and the messages of one side, bytes.
const AREA: usize = CALL_PAGES * WINDOW_PAGE;

/// How many ports a call's number takes.
const PORTS: usize = size_of::<u32>();

/// After so many calls in a row that the host did not answer, so many requests go over the stream before the next call: it may
/// be a folder, or a time, of which it answers none.
const REFUSALS: u32 = 8;
const PAUSE: u32 = 32;

/// How the host is called for one queue.
#[derive(Debug, Clone, Copy)]
pub struct Calls {
    /// The I/O port.
    pub port: u16,
    /// What is written there.
    pub number: u32,
}

/// Calls for one queue, by one thread.
pub struct Caller {
    memory: Pinned,
    /// Messages to the host, and then from it.
    messages: Box<[u8]>,
    /// Has the host answer.
    call: Box<dyn Fn(&Pinned) + Send>,
    /// How many calls in a row were not answered, and how many are not made now.
    refused: u32,
    paused: u32,
}

/// What has become of a call.
pub struct Answer<'a> {
    /// How many of the bytes that were sent behind the request were taken.
    pub taken: usize,
    /// What the host answers: the reply, and before it what the agent is told; one after the other.
    pub messages: Messages<'a>,
}

impl Caller {
    /// Whoever calls so, on the thread that this is made on.
    ///
    /// # Errors
    /// Where memory cannot be kept at its place, or the kernel does not let the agent write to ports.
    pub fn new(calls: Calls) -> io::Result<Self> {
        permit(calls.port)?;
        Self::by(move |_| write(calls))
    }

    /// Whoever calls by `call`, in which the host answers in that memory.
    fn by(call: impl Fn(&Pinned) + Send + 'static) -> io::Result<Self> {
        Ok(Self {
            memory: Pinned::new(AREA)?,
            messages: vec![0; AREA - CALL_HEADER].into(),
            call: Box::new(call),
            refused: 0,
            paused: 0,
        })
    }

    /// The guest-physical addresses of the pages that the host has to know first.
    pub fn addresses(&self) -> &[u64] {
        self.memory.addresses()
    }

    /// Asks the host for `request`, and tells it `rest` if it answers; None where it does not, and nothing was done.
    pub fn ask(&mut self, request: &[u8], rest: &[u8]) -> Option<Answer<'_>> {
        if self.paused > 0 {
            self.paused -= 1;
            return None;
        }
        let Some((taken, answered)) = self.make(request, rest) else {
            self.refused = self.refused.saturating_add(1);
            if self.refused >= REFUSALS {
                self.paused = PAUSE;
            }
            return None;
        };
        self.refused = 0;
        let messages = Messages(self.messages.get(..answered)?);
        Some(Answer { taken, messages })
    }

    /// Makes a call; how many bytes of `rest` were taken, and how many of messages answer.
    fn make(&mut self, request: &[u8], rest: &[u8]) -> Option<(usize, usize)> {
        let asked = request.len() + rest.len();
        let (first, behind) = self.messages.get_mut(..asked)?.split_at_mut(request.len());
        first.copy_from_slice(request);
        behind.copy_from_slice(rest);
        self.put(asked);
        self.set(CALL_ASKED, asked as u64);
        self.set(CALL_DONE, 0);
        (self.call)(&self.memory);
        let done = usize::try_from(self.number(CALL_DONE)).ok()?;
        let taken = done.checked_sub(request.len())?;
        let answered = usize::try_from(self.number(CALL_ANSWERED)).ok()?;
        if taken > rest.len() || answered > self.messages.len() {
            return None;
        }
        self.take(answered);
        Some((taken, answered))
    }

    /// Copies the first `length` bytes of the messages to the area.
    fn put(&self, length: usize) {
        let length = length.min(self.messages.len());
        // SAFETY: `length` bytes are in `messages`, which is as long as what there is behind the header of the mapping. That
        // lives as long as `self` does, and nobody has a reference to it; the host writes there in a call only.
        unsafe {
            let to = self.memory.start().as_ptr().add(CALL_HEADER);
            std::ptr::copy_nonoverlapping(self.messages.as_ptr(), to, length);
        }
    }

    /// Copies from the area to the first `length` bytes of the messages.
    fn take(&mut self, length: usize) {
        let length = length.min(self.messages.len());
        // SAFETY: as in `put`.
        unsafe {
            let from = self.memory.start().as_ptr().add(CALL_HEADER);
            std::ptr::copy_nonoverlapping(from, self.messages.as_mut_ptr(), length);
        }
    }

    fn set(&self, at: usize, number: u64) {
        debug_assert!(at < CALL_HEADER);
        // SAFETY: in the mapping, which begins with aligned numbers of this size; nobody has a reference to it.
        unsafe {
            let place = self.memory.start().as_ptr().add(at).cast::<u64>();
            place.write_volatile(number.to_le());
        }
    }

    fn number(&self, at: usize) -> u64 {
        debug_assert!(at < CALL_HEADER);
        // SAFETY: as in `set`.
        let number = unsafe {
            let place = self.memory.start().as_ptr().add(at).cast::<u64>();
            place.read_volatile()
        };
        u64::from_le(number)
    }
}

/// Messages that follow each other, each with its length in front.
#[derive(Debug)]
pub struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(word(self.0, 0)?).ok()?;
        let (message, rest) = self.0.split_at_checked(length).filter(|_| length > 0)?;
        self.0 = rest;
        Some(message)
    }
}

/// Lets this thread write calls to `port`.
fn permit(port: u16) -> io::Result<()> {
    // SAFETY: this process's memory is not touched; what the thread may do with those ports is for `write` to say.
    let permitted = unsafe {
        libc::syscall(
            libc::SYS_ioperm,
            libc::c_ulong::from(port),
            PORTS as libc::c_ulong,
            1,
        )
    };
    match permitted {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn write(Calls { port, number }: Calls) {
    // SAFETY: the host takes calls at this port, as it has said, and in one it writes to nothing of this process's but the
    // areas that it was told of, which are volatile to the compiler as this may change all memory. The thread may write to the
    // port: its `Caller` was made here, after `permit`.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") number, options(nostack, preserves_flags));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const REQUEST: [u8; 5] = [5, 0, 0, 0, 1];

    /// A host that does `answer` with the area; None where this machine's kernel keeps no memory at its place.
    fn caller(answer: impl Fn(&mut [u8]) + Send + 'static) -> Option<Caller> {
        let call = move |memory: &Pinned| {
            // SAFETY: the area, which nobody else touches in a call.
            let area = unsafe { std::slice::from_raw_parts_mut(memory.start().as_ptr(), AREA) };
            answer(area);
        };
        match Caller::by(call) {
            Ok(caller) => Some(caller),
            Err(error) => {
                eprintln!("skipped: no calls here: {error}");
                None
            }
        }
    }

    fn set(area: &mut [u8], at: usize, number: u64) {
        area[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }

    #[test]
    fn the_host_finds_the_request_and_what_is_held_back_and_answers() {
        let Some(mut caller) = caller(|area| {
            assert_eq!(area[CALL_ASKED..][..8], 9_u64.to_le_bytes());
            assert_eq!(area[CALL_DONE..][..8], [0; 8]);
            assert_eq!(area[CALL_HEADER..][..9], [5, 0, 0, 0, 1, 4, 0, 0, 0]);
            area[CALL_HEADER..][..11].copy_from_slice(&[6, 0, 0, 0, 7, 8, 5, 0, 0, 0, 9]);
            set(area, CALL_DONE, 9);
            set(area, CALL_ANSWERED, 11);
        }) else {
            return;
        };
        for _ in 0..2 {
            let answer = caller.ask(&REQUEST, &[4, 0, 0, 0]).unwrap();
            let messages: Vec<_> = answer.messages.collect();
            assert_eq!(answer.taken, 4);
            assert_eq!(messages, [&[6, 0, 0, 0, 7, 8][..], &[5, 0, 0, 0, 9]]);
        }
    }

    #[test]
    fn what_the_host_leaves_is_not_answered() {
        let Some(mut caller) = caller(|_| {}) else {
            return;
        };
        assert!(caller.ask(&REQUEST, &[]).is_none());
        let long = vec![1; AREA];
        assert!(caller.ask(&long, &[]).is_none());
        assert!(caller.ask(&REQUEST, &long).is_none());
    }

    #[test]
    fn a_host_that_answers_none_is_called_now_and_then() {
        let calls = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&calls);
        let Some(mut caller) = caller(move |area| {
            // Answers the twelfth and those after it.
            if counted.fetch_add(1, Ordering::Relaxed) >= 11 {
                set(area, CALL_DONE, 5);
                set(area, CALL_ANSWERED, 0);
            }
        }) else {
            return;
        };
        let mut ask = |count| {
            (0..count)
                .filter(|_| caller.ask(&REQUEST, &[]).is_some())
                .count()
        };
        assert_eq!(ask(8 + 3 * 33), 0);
        assert_eq!(calls.load(Ordering::Relaxed), 11);
        assert_eq!(
            ask(32 + 100),
            100,
            "it is asked as ever once it has answered"
        );
    }

    #[test]
    fn numbers_that_cannot_be_are_no_answer() {
        for (done, answered) in [
            (4, 0),
            (6, 0),
            (u64::MAX, 0),
            (5, AREA as u64),
            (5, u64::MAX),
        ] {
            let Some(mut caller) = caller(move |area| {
                set(area, CALL_DONE, done);
                set(area, CALL_ANSWERED, answered);
            }) else {
                return;
            };
            assert!(caller.ask(&REQUEST, &[]).is_none(), "{done} {answered}");
        }
    }

    #[test]
    fn messages_end_where_they_make_no_sense() {
        let count = |bytes: &[u8]| Messages(bytes).count();
        assert_eq!(count(&[]), 0);
        assert_eq!(count(&[4, 0, 0]), 0);
        assert_eq!(count(&[0, 0, 0, 0, 1]), 0);
        assert_eq!(count(&[4, 0, 0, 0, 9, 0, 0, 0, 1]), 1);
        assert_eq!(count(&[4, 0, 0, 0, 255, 255, 255, 255]), 1);
    }
}
