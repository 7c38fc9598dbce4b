//! Connections between the host and what is in the guest, all served by one thread.
//!
//! The thread accepts the host's connections and reads the first message of each. Those that ask
//! for something in the guest stay with it ([`reactor`]); all others are handed on.

mod dial;
mod greeting;
mod pair;
mod reactor;
mod slots;
#[cfg(test)]
pub mod tests;

pub use reactor::{Listener, Reactor};
