//! Where what the host answers goes: replies to the kernel, and advice to whom it is for.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::ahead::Ahead;
use super::ending::Why;
use super::known::Known;
use super::message;
use super::order::{self, Advice, Replies};
use super::window::Lending;

/// One way of a queue's replies.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The kernel's queue.
    pub device: Arc<OwnedFd>,
    /// Where long replies lie.
    pub lending: Arc<Lending>,
    pub known: Arc<Known>,
    pub ahead: Arc<Ahead>,
    /// Counts what the kernel has been given, as [`Delivery::way`].
    pub replies: Arc<Replies>,
    pub way: u32,
}

impl Delivery {
    /// Passes on a message that came by this way.
    pub fn deliver(&self, message: &[u8]) -> Result<(), Why> {
        if let Some(advice) = order::advice(message) {
            self.advise(&advice);
            return Ok(());
        }
        match self.give(message) {
            // The request was interrupted, and nobody waits for its reply any more.
            Ok(_) | Err(Errno::NOENT) => {
                self.replies.count(self.way);
                Ok(())
            }
            Err(errno) => Err(Why::Failed(format!(
                "the kernel refuses a reply of the host: {errno}"
            ))),
        }
    }

    fn advise(&self, advice: &Advice<'_>) {
        match *advice {
            Advice::List { directory, entries } => self.ahead.want(directory, entries),
            Advice::New { node } => self.known.fresh.add(node),
            Advice::Empty { node, validity } => self.known.whole.add(node, validity),
            Advice::Attributes {
                node,
                number,
                attributes,
            } => self.known.attributes.add(node, number, attributes),
        }
    }

    /// Gives the kernel a reply, which is `message` or lies in the slot that was lent for it.
    fn give(&self, message: &[u8]) -> rustix::io::Result<usize> {
        if let Some((unique, length)) = order::placed(message) {
            let window = self.lending.window();
            let slot = window.and_then(|window| window.take_back(unique));
            let reply = slot.as_ref().and_then(|slot| slot.bytes().get(..length));
            return rustix::io::write(&self.device, reply.ok_or(Errno::INVAL)?);
        }
        if let Some(unique) = message::unique(message) {
            self.lending.answered(unique);
        }
        rustix::io::write(&self.device, message)
    }
}
