//! Where a queue's calls are answered: requests that the guest's agent has left in memory, on the thread of the vCPU that
//! calls ([`vmm::Calls`]), without a wake-up on either side.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use agent::protocol::{
    CALL_ANSWERED, CALL_ASKED, CALL_DONE, CALL_HEADER, CALL_PAGES, PLACED_FROM, WINDOW_PAGE,
};
use share::{Advice, Reply, Share};
use vmm::{Callee, GuestMemory};

use super::pieces::{Pieces, nonsense};
use super::stream;

/// The size of what requests and replies are left in, bytes.
const AREA: usize = CALL_PAGES * WINDOW_PAGE;

/// A place for the calls of one queue, which the guest opens or does not.
pub struct Desk {
    share: Arc<Share>,
    memory: GuestMemory,
    area: OnceLock<Pieces>,
    /// The agent makes one call at a time.
    work: Mutex<Work>,
    /// How many replies were given, all of them before this says so.
    replies: AtomicU64,
}

struct Work {
    requests: Box<[u8]>,
    reply: Reply<'static>,
}

impl fmt::Debug for Desk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Desk")
            .field("area", &self.area)
            .field("replies", &self.replies)
            .finish_non_exhaustive()
    }
}

impl Desk {
    /// One for `share` and a guest with this memory, which is not open yet.
    pub fn new(share: Arc<Share>, memory: GuestMemory) -> Self {
        Self {
            share,
            memory,
            area: OnceLock::new(),
            work: Mutex::new(Work {
                requests: vec![0; AREA - CALL_HEADER].into(),
                reply: Reply::with_capacity(PLACED_FROM),
            }),
            replies: AtomicU64::new(0),
        }
    }

    /// Opens it at these pages.
    ///
    /// # Errors
    /// `InvalidData` for another number of pages, and where it is open.
    pub fn open(&self, pages: &[u64]) -> io::Result<()> {
        if pages.len() != CALL_PAGES {
            return Err(nonsense("an area for calls of another size"));
        }
        let opened = self.area.set(Pieces::of(pages));
        opened.map_err(|_| nonsense("a second area for calls"))
    }

    /// How many replies were given so far.
    pub fn replies(&self) -> u64 {
        self.replies.load(Ordering::Acquire)
    }

    /// Answers what is asked, as far as that can be done at once.
    fn answer(&self, area: &Pieces, work: &mut Work) -> io::Result<()> {
        let asked = usize::try_from(self.number(area, CALL_ASKED)?).unwrap_or(usize::MAX);
        let requests = work.requests.get_mut(..asked);
        let requests = requests.ok_or_else(|| nonsense("a call that is too long"))?;
        area.read(&self.memory, CALL_HEADER, requests)?;
        let (mut done, mut answered) = (0, Ok(0));
        while let Some(message) = requests.get(done..).and_then(stream::first) {
            let send = |reply: &[u8], advice: &[Advice]| {
                // Only the first has somebody who waits.
                if done == 0 {
                    answered = self.give(area, reply, advice);
                }
            };
            if !share::answer_promptly(&self.share, message, &mut work.reply, send)? {
                break;
            }
            done += message.len();
        }
        self.set(area, CALL_ANSWERED, answered? as u64)?;
        self.set(area, CALL_DONE, done as u64)
    }

    /// Puts a reply there, and before it what is to come before it; returns how many bytes that is.
    fn give(&self, area: &Pieces, reply: &[u8], advice: &[Advice]) -> io::Result<usize> {
        let advice: Vec<_> = advice.iter().map(stream::told).collect();
        let parts = advice.iter().map(Vec::as_slice).chain([reply]);
        let mut at = CALL_HEADER;
        for part in parts {
            area.write(&self.memory, at, part)?;
            at += part.len();
        }
        self.replies.fetch_add(1, Ordering::Release);
        Ok(at - CALL_HEADER)
    }

    fn number(&self, area: &Pieces, at: usize) -> io::Result<u64> {
        let mut number = [0; 8];
        area.read(&self.memory, at, &mut number)?;
        Ok(u64::from_le_bytes(number))
    }

    fn set(&self, area: &Pieces, at: usize, number: u64) -> io::Result<()> {
        area.write(&self.memory, at, &number.to_le_bytes())
    }
}

impl Callee for Desk {
    fn call(&self) {
        // What is not answered here the agent asks for by the stream.
        let (Some(area), Ok(mut work)) = (self.area.get(), self.work.try_lock()) else {
            return;
        };
        if let Err(error) = self.answer(area, &mut work) {
            tracing::debug!("a call of the guest was not answered: {error}");
        }
    }
}

#[cfg(test)]
#[path = "desk_tests.rs"]
mod tests;
