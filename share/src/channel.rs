//! The way between a guest's kernel and the server.

use std::io::{self, IoSlice};

/// Carries whole FUSE messages to and from one guest.
///
/// A share may be served over several channels at once, and one channel by several threads, so all
/// that is here may be called from several threads at a time.
pub trait Channel: Send + Sync {
    /// Waits for the next request and puts it into `buffer`, which is large enough for the largest.
    /// Returns its length; zero once there will be no more.
    ///
    /// # Errors
    /// Where the connection is broken.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Sends a reply or a notification, which is `parts` one after the other.
    ///
    /// # Errors
    /// Where it cannot be sent. A reply to a request that was interrupted, and a notification of
    /// what the guest does not know, may be refused without the connection being broken.
    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<()>;

    /// Whether the other end answers `FUSE_RELEASE` and `FUSE_RELEASEDIR` itself, which have no outcome that
    /// somebody could look at: no reply to them is sent then.
    fn answers_releases(&self) -> bool {
        false
    }
}
