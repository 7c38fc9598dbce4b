//! Connections to a port of a guest that are made before somebody comes, so that nobody waits for the
//! guest to accept: that takes longer than all the rest of making a connection.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::virtio::vsock::{Reserved, VsockHandle};

/// Connections that are ready, at most: more than a browser opens at once.
const MOST: usize = 16;

/// So few are left when others are made, all at once: that costs less than one after the other, and
/// most who come do not meet it.
const FEW: usize = 8;

/// A way to one port of a guest. Nothing is made in advance before the first connection was wanted.
#[derive(Debug)]
pub struct Spares {
    vsock: VsockHandle,
    port: u32,
    stock: Arc<Mutex<Stock>>,
}

#[derive(Debug, Default)]
struct Stock {
    ready: Vec<Reserved>,
    /// Those that the guest was asked for.
    coming: usize,
}

impl Spares {
    /// Connections to `port`.
    pub fn new(vsock: VsockHandle, port: u32) -> Self {
        Self {
            vsock,
            port,
            stock: Arc::default(),
        }
    }

    /// Whether these are connections to `port`.
    pub fn are(&self, port: u32) -> bool {
        self.port == port
    }

    /// Makes `stream` one with a connection that is sent `prelude` first, as [`VsockHandle::join`] does.
    pub fn join(&self, prelude: Vec<u8>, stream: OwnedFd) -> io::Result<()> {
        match self.spare() {
            Some(spare) => self.vsock.join_reserved(spare, prelude, stream)?,
            None => self.vsock.join(self.port, prelude, stream)?,
        }
        self.restock()
    }

    /// One that the guest has not closed.
    fn spare(&self) -> Option<Reserved> {
        let mut stock = lock(&self.stock);
        while let Some(spare) = stock.ready.pop() {
            if spare.is_open() {
                return Some(spare);
            }
        }
        None
    }

    /// Has more made where there are few.
    fn restock(&self) -> io::Result<()> {
        let missing = {
            let mut stock = lock(&self.stock);
            let there = stock.ready.len() + stock.coming;
            if there > FEW {
                return Ok(());
            }
            let missing = MOST.saturating_sub(there);
            stock.coming += missing;
            missing
        };
        for _ in 0..missing {
            let stock = Arc::clone(&self.stock);
            let made = move |made| {
                let mut stock = lock(&stock);
                stock.coming = stock.coming.saturating_sub(1);
                stock.ready.extend(Result::ok(made));
            };
            self.vsock.reserve(self.port, Vec::new(), made)?;
        }
        Ok(())
    }
}

/// Each change is one step, so a panic leaves nothing half done.
fn lock(stock: &Mutex<Stock>) -> MutexGuard<'_, Stock> {
    stock.lock().unwrap_or_else(PoisonError::into_inner)
}
