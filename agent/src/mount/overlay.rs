//! An overlay over a folder, which does not expect that what lies below it changes.
//!
//! overlayfs keeps what it has found for a name, or that it has found nothing. Where the folder's kernel is told that
//! the name stands for something else now, the overlay goes on to say `ESTALE`, or that there is nothing
//! (fs/overlayfs/super.c, `ovl_revalidate_real`), until it has forgotten the name. The kernel can be asked to forget
//! all that nobody uses, and no less.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use super::alarm::Alarm;
use super::message;

/// What has the kernel forget names, and what it is told for that (proc_sys_vm(5)).
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";
const NAMES: &str = "2";

/// How long the kernel may believe what is no more: forgetting costs time, and changes come in bursts.
pub const PATIENCE: Duration = Duration::from_millis(300);

/// Notifications of a name: `FUSE_NOTIFY_INVAL_ENTRY` and `FUSE_NOTIFY_DELETE`.
const OF_NAMES: [i32; 2] = [3, 6];

/// Whether a folder lies below an overlay, and who is to hear of changed names then.
#[derive(Debug)]
pub struct Overlay(Option<Arc<Alarm>>);

impl Overlay {
    /// None.
    pub fn none() -> Self {
        Self(None)
    }

    /// One that is looked after by whoever attends to `alarm`.
    pub fn with(alarm: Arc<Alarm>) -> Self {
        Self(Some(alarm))
    }

    /// The kernel was given this notification, of something that it knew.
    pub fn note(&self, notification: &[u8]) {
        if let Some(alarm) = &self.0
            && message::kind(notification).is_some_and(|kind| OF_NAMES.contains(&kind))
        {
            alarm.set();
        }
    }
}

/// Has the kernel forget names that nobody uses.
pub fn forget_names() {
    if let Err(error) = fs::write(DROP_CACHES, NAMES) {
        eprintln!("mvm-agent: files that the host replaces may be stale: {DROP_CACHES}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn only_names_that_changed_are_a_reason_to_forget() {
        let notification = |kind: i32| {
            let mut message = vec![0; 32];
            message[4..8].copy_from_slice(&kind.to_le_bytes());
            message
        };
        let alarm = Arc::new(Alarm::default());
        let overlay = Overlay::with(Arc::clone(&alarm));
        let (forgotten, times) = mpsc::channel();
        thread::scope(|scope| {
            let attending = scope.spawn(|| {
                alarm.attend(Duration::from_millis(1), || forgotten.send(()).unwrap());
            });
            for kind in OF_NAMES {
                // FUSE_NOTIFY_INVAL_INODE, and what is too short to be anything.
                overlay.note(&notification(2));
                overlay.note(&[3; 7]);
                assert!(times.try_recv().is_err());
                overlay.note(&notification(kind));
                times.recv_timeout(Duration::from_secs(60)).unwrap();
            }
            alarm.end();
            attending.join().unwrap();
        });
        Overlay::none().note(&notification(OF_NAMES[0]));
    }
}
