//! Threads that nobody waits for.

use std::io;
use std::thread;

/// Runs `body` on a thread called `name` (15 bytes show in `ps`), which ends by itself.
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).spawn(body)?;
    Ok(())
}
