//! What host and guest say to each other; the agent itself is the binary beside this library.
//!
//! Host and agent are always of one build: `mvm` carries the agent and writes it into every
//! initramfs. So the protocol has no negotiation; [`protocol::VERSION`] only catches mistakes.

pub mod archive;
pub mod guest;
pub mod names;
pub mod protocol;
pub mod sock_diag;
