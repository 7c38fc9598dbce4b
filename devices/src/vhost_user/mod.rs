//! Devices for a machine of another hypervisor: vhost-user backends.
//!
//! The outer Linux that QEMU emulates is reached through the same vsock code as a guest of our
//! own; only the transport differs.

mod vsock;

pub use self::vsock::VhostUserVsock;
