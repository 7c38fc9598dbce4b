//! A root that the host serves: it comes after the host was told that the machine is there.
//!
//! The folder is mounted like any other, by whoever the host asks for it, and everything that needs the root
//! waits until it is complete.

use std::fs;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent::guest::Mount;
use anyhow::{Context, Result, anyhow};
use rustix::fs::{CWD, Mode, OFlags, openat};

use super::{LOWER, ROOT, disk};
use crate::init::Successor;
use crate::mounts;
use crate::tree::Tree;

/// How long a root may take from the moment on that somebody needs it: the host of an emulated machine is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// A root that is still to come.
#[derive(Debug)]
pub struct Expected {
    /// Whether writes go to a tmpfs that lies over it.
    overlay: bool,
    /// What is mounted below it once it is there.
    mounts: Vec<Mount>,
    /// Who becomes its own init once it is there.
    successor: Option<Successor>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Clone)]
enum State {
    /// The host has not asked for it.
    Absent,
    /// It is being put together.
    Coming,
    /// It is there, or one sentence that says why it never will be.
    Settled(Result<(), String>),
}

impl Expected {
    pub fn new(overlay: bool, mounts: Vec<Mount>) -> Self {
        Self {
            overlay,
            mounts,
            successor: None,
            state: Mutex::new(State::Absent),
            changed: Condvar::new(),
        }
    }

    /// Has the root's own init started, once that is there.
    pub fn hand_over_to(&mut self, successor: Successor) {
        self.successor = Some(successor);
    }

    /// Makes the root of what `attach` mounts over the directory it is given, and puts it into `tree`.
    /// Fails with a sentence, and where there was an attempt already.
    pub fn complete<T>(
        &self,
        tree: &Tree,
        attach: impl FnOnce(OwnedFd) -> Result<T, String>,
    ) -> Result<T, String> {
        self.settle(|| {
            let put = self.put_together(tree, attach);
            put.map_err(|error| format!("{error:#}"))
        })
    }

    fn settle<T>(&self, put: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
        {
            let mut state = self.state();
            if !matches!(*state, State::Absent) {
                return Err("the machine's root is there already".to_owned());
            }
            *state = State::Coming;
        }
        let put = put();
        *self.state() = State::Settled(put.as_ref().map(drop).map_err(Clone::clone));
        self.changed.notify_all();
        put
    }

    /// Waits until it is complete; fails with a sentence.
    pub fn wait(&self) -> Result<(), String> {
        let settled = |state: &mut State| !matches!(state, State::Settled(_));
        let waited = self
            .changed
            .wait_timeout_while(self.state(), PATIENCE, settled);
        match &*waited.unwrap_or_else(PoisonError::into_inner).0 {
            State::Settled(outcome) => outcome.clone(),
            State::Absent | State::Coming => Err(format!(
                "the host did not share the machine's root within {} seconds",
                PATIENCE.as_secs()
            )),
        }
    }

    fn put_together<T>(
        &self,
        tree: &Tree,
        attach: impl FnOnce(OwnedFd) -> Result<T, String>,
    ) -> Result<T> {
        let at = if self.overlay { LOWER } else { ROOT };
        fs::create_dir_all(at).with_context(|| format!("{at} cannot be made in the initramfs"))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let attached =
            attach(openat(CWD, at, flags, Mode::empty())?).map_err(|why| anyhow!(why))?;
        if self.overlay {
            disk::lay_over(ROOT)?;
        }
        let root = super::enter()?;
        super::furnish(&root)?;
        mounts::mount_requested(&root, &self.mounts)?;
        tree.settle(root);
        if let Some(successor) = &self.successor {
            successor.take_over(tree)?;
        }
        Ok(attached)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_who_wait_learn_why_there_is_no_root() {
        let expected = Expected::new(false, Vec::new());
        let refuse = || Err::<(), _>("the host has thought better of it".to_owned());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| expected.wait());
            let why = expected.settle(refuse).unwrap_err();
            assert_eq!(waiting.join().unwrap(), Err(why));
        });
        let again = expected.settle(|| Ok(())).unwrap_err();
        assert!(again.contains("there already"), "{again}");
    }
}
