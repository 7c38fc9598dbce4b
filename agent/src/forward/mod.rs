//! Connections between the host and what is in the guest, all served by one thread.
//!
//! The thread accepts the host's connections and reads the first message of each ([`reactor`]).
//! Those that ask for something in the guest stay with it, all others are handed on:
//!
//! - [`pair`], [`pace`], [`buffers`]: the host's connection joined to one in the guest;
//! - [`dial`], [`resolve`]: how the one in the guest is made, names and paths on threads of their own;
//! - [`control`]: what the host asks for on the connection that controls forwards, with [`listen`] for
//!   connections that begin in the guest;
//! - [`watch`]: the guest's listening sockets, reported as they come and go ([`sock_diag`], [`tracepoint`]);
//! - [`datagram`], [`flow`]: datagrams and their flows.
//!
//! Data structures belong to the one thread; others speak to it through a [`Handle`].

mod buffers;
mod control;
mod datagram;
mod dial;
mod flow;
mod frames;
mod greeting;
mod handle;
mod joining;
mod listen;
mod names;
mod pace;
mod pair;
mod poller;
mod reactor;
mod resolve;
mod slots;
mod sock_diag;
#[cfg(test)]
pub mod tests;
mod tracepoint;
mod unix;
mod watch;

pub use handle::Handle;
pub use reactor::{Listener, Reactor};
