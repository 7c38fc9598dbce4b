//! virtio-vsock for QEMU's `vhost-user-vsock-pci` (and -mmio): the connections of
//! [`crate::virtio::vsock`] behind a vhost-user socket.
//!
//! The machine's memory has to be shared (`memory-backend-memfd,share=on`). The vhost-user
//! protocol's thread and the vring thread both reach the [`Mux`], so here, unlike behind our own
//! transport, it stands behind a lock; it is contended only while the machine starts or stops.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use vhost::vhost_user::{Listener, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{
    ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringMutex, VringState, VringT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::read_config_bytes;
use crate::virtio::vsock::{Mux, QUEUE_SIZE, VsockConfig, VsockHandle, VsockQueue};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Receive, transmit and event queue; QEMU serves the last itself.
const NUM_QUEUES: usize = 3;

/// The event number of the mux's descriptor; those up to NUM_QUEUES are the crate's own.
const MUX_EVENT: u64 = NUM_QUEUES as u64 + 1;

/// A vsock device that serves one hypervisor after the other on a socket; dropping it ends that.
pub struct VhostUserVsock {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What stops the serving thread.
struct Shared {
    stop: EventFd,
    stopped: AtomicBool,
    daemon: Mutex<Option<ShutdownHandle>>,
}

impl VhostUserVsock {
    /// Serves the hypervisor that connects to `listener`, and the next one when it has gone. The
    /// listener's path, where it has one, stays the caller's to remove.
    pub fn serve(listener: UnixListener, config: VsockConfig) -> io::Result<(Self, VsockHandle)> {
        let (mux, handle) = Mux::new(&config)?;
        let backend = Arc::new(Backend {
            cid: config.cid,
            inner: Mutex::new(Inner {
                mux,
                memory: None,
                broken: false,
            }),
        });
        let shared = Arc::new(Shared {
            stop: EventFd::new(EFD_NONBLOCK)?,
            stopped: AtomicBool::new(false),
            daemon: Mutex::new(None),
        });
        let serving = shared.clone();
        let thread = thread::Builder::new()
            .name("vhost-vsock".to_owned())
            .spawn(move || serve(&listener, &backend, &serving))?;
        Ok((
            Self {
                shared,
                thread: Some(thread),
            },
            handle,
        ))
    }
}

impl Drop for VhostUserVsock {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        // Fails only on an overflowing counter: then the thread has been told already.
        let _ = self.shared.stop.write(1);
        if let Some(daemon) = lock(&self.shared.daemon).as_ref() {
            daemon.shutdown();
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the vhost-user vsock thread panicked");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(listener: &UnixListener, backend: &Arc<Backend>, shared: &Shared) {
    while wait_for_peer(listener, shared) {
        if let Err(error) = serve_one(listener, backend, shared) {
            tracing::warn!("a vhost-user vsock connection failed: {error}");
        }
        backend.reset();
    }
}

/// Waits for somebody to connect; false when it is time to stop.
fn wait_for_peer(listener: &UnixListener, shared: &Shared) -> bool {
    while !shared.stopped.load(Ordering::SeqCst) {
        // SAFETY: the eventfd is open as long as `shared` lives, which outlives this borrow.
        let stop = unsafe { std::os::fd::BorrowedFd::borrow_raw(shared.stop.as_raw_fd()) };
        let mut fds = [
            PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return false,
            Ok(_) if !fds[0].revents().is_empty() => return true,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!("the vhost-user vsock socket cannot be watched: {error}");
                return false;
            }
        }
    }
    false
}

fn serve_one(
    listener: &UnixListener,
    backend: &Arc<Backend>,
    shared: &Shared,
) -> Result<(), vhost_user_backend::Error> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("vhost-vsock".to_owned(), backend.clone(), memory)?;
    let mux = lock(&backend.inner).mux.as_raw_fd();
    for handler in daemon.get_epoll_handlers() {
        handler
            .register_listener(mux, EventSet::IN, MUX_EVENT)
            .map_err(vhost_user_backend::Error::StartDaemon)?;
    }
    let accepting: OwnedFd = listener
        .as_fd()
        .try_clone_to_owned()
        .map_err(vhost_user_backend::Error::StartDaemon)?;
    daemon.start(&mut Listener::from(UnixListener::from(accepting)))?;
    *lock(&shared.daemon) = daemon.shutdown_handle();
    if shared.stopped.load(Ordering::SeqCst) {
        // The stop came before there was anything that it could have shut down.
        daemon.request_shutdown();
    }
    let result = daemon.wait();
    *lock(&shared.daemon) = None;
    match result {
        // How a hypervisor that ends looks from here.
        Err(vhost_user_backend::Error::HandleRequest(
            vhost::vhost_user::Error::Disconnected | vhost::vhost_user::Error::PartialMessage,
        )) => Ok(()),
        result => result,
    }
}

/// What the vhost-user crate calls.
struct Backend {
    cid: u64,
    inner: Mutex<Inner>,
}

struct Inner {
    mux: Mux,
    memory: Option<Memory>,
    /// A ring was wrong; the driver has to start over.
    broken: bool,
}

impl Backend {
    fn reset(&self) {
        let mut inner = lock(&self.inner);
        inner.mux.reset();
        inner.broken = false;
    }
}

impl Inner {
    fn turn(&mut self, vrings: &[VringMutex<Memory>]) {
        let (Some(rx), Some(tx)) = (vrings.first(), vrings.get(1)) else {
            return;
        };
        let (mut rx, mut tx) = (rx.get_mut(), tx.get_mut());
        let runs = |vring: &VringState<Memory>| vring.is_enabled() && vring.get_queue().ready();
        let memory = match &self.memory {
            Some(memory) if !self.broken && runs(&rx) && runs(&tx) => memory.memory(),
            // The driver has not started: what the host asked for waits for it as connections.
            _ => return,
        };
        let (mut signal_rx, mut signal_tx) = (false, false);
        let result =
            self.mux.turn(
                &memory,
                rx.get_queue_mut(),
                tx.get_queue_mut(),
                |queue| match queue {
                    VsockQueue::Rx => signal_rx = true,
                    VsockQueue::Tx => signal_tx = true,
                },
            );
        if let Err(error) = result {
            tracing::warn!("vsock waits for the guest's driver to start over: {error}");
            self.broken = true;
        }
        for (vring, wanted) in [(&rx, signal_rx), (&tx, signal_tx)] {
            if wanted && let Err(error) = vring.signal_used_queue() {
                tracing::warn!("the hypervisor cannot be told of used vsock buffers: {error}");
            }
        }
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringMutex<Memory>;

    fn num_queues(&self) -> usize {
        NUM_QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE.into()
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The vrings keep this themselves.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        // As the protocol has it, `size` is at most 256; do not rely on it.
        let mut data = vec![0; size.min(256) as usize];
        read_config_bytes(&self.cid.to_le_bytes(), offset.into(), &mut data);
        data
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        lock(&self.inner).memory = Some(memory);
        Ok(())
    }

    fn reset_device(&self) {
        self.reset();
    }

    fn stop_vring(&self, _queue_index: u32) -> io::Result<()> {
        self.reset();
        Ok(())
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        match new_event_consumer_and_notifier(EventFlag::CLOEXEC | EventFlag::NONBLOCK) {
            Ok(pair) => Some(pair),
            Err(error) => {
                tracing::error!("the vhost-user vsock thread cannot be stopped: {error}");
                None
            }
        }
    }

    fn handle_event(
        &self,
        device_event: u16,
        _events: EventSet,
        vrings: &[Self::Vring],
        _thread_id: usize,
    ) -> io::Result<()> {
        let mut inner = lock(&self.inner);
        if u64::from(device_event) == MUX_EVENT {
            inner.mux.look_at_host();
        }
        inner.turn(vrings);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
