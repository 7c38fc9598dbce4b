//! How a machine that runs is controlled: requests and replies over a Unix socket that its owner listens at.
//!
//! `protocol` is what is said, `server` the owner's end, `client` the end of everybody else. `docs/control.md`
//! describes it for other programs.

pub mod client;
mod latch;
mod metrics;
pub mod protocol;
mod server;
#[cfg(test)]
mod tests;

pub use latch::Latch;
pub use server::{Owner, Server};
