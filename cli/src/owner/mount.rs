//! What a machine's owner does when it is asked for other folders.

use std::path::Path;

use anyhow::{Result, bail};

use super::{Owned, declare};
use crate::control::protocol::{Answer, Mount, Op, State};
use crate::folder::spec::{self, Volume, cache_name, locking_name};
use crate::folder::{Folder, FolderError};
use crate::store::Bytes;

impl Owned {
    /// The folders that the guest has.
    pub(super) fn mounts(&self) -> Vec<Mount> {
        self.folders.list().iter().map(shown).collect()
    }

    /// Does one of the operations on folders, and writes down what is to be so at the next start.
    pub(super) fn change_mounts(&self, op: Op) -> Result<Answer> {
        match op {
            Op::MountLs => Ok(Answer::Mounts(self.mounts())),
            Op::MountAdd { mounts } => {
                // All of them make sense before the first is done.
                let volumes: Vec<Volume> =
                    mounts.iter().map(declare::volume).collect::<Result<_>>()?;
                self.check_running()?;
                let mut added = Vec::new();
                for volume in volumes {
                    added.push(shown(&self.folders.add(volume.clone())?));
                    self.note(|changes| {
                        let declared = changes.mounts.get_or_insert_default();
                        declared.retain(|text| !is_at(text, &volume.guest));
                        declared.push(volume.text().into());
                    })?;
                }
                Ok(Answer::Mounts(added))
            }
            Op::MountRm { guest, force } => {
                self.check_running()?;
                let mut removed = Vec::new();
                for text in guest {
                    let path = spec::guest_path(text.as_os_str())?;
                    let outcome = self.folders.remove(&path, force);
                    // One that the guest itself has unmounted is not to come back either.
                    if matches!(outcome, Ok(_) | Err(FolderError::NotThere(_))) {
                        self.note(|changes| {
                            let declared = changes.mounts.get_or_insert_default();
                            declared.retain(|text| !is_at(text, &path));
                        })?;
                    }
                    removed.push(shown(&outcome?));
                }
                Ok(Answer::Mounts(removed))
            }
            other => bail!("{other:?} is no operation on folders"),
        }
    }

    fn check_running(&self) -> Result<()> {
        match *self.state() {
            State::Running => Ok(()),
            State::Paused => {
                bail!("the machine is paused: its guest cannot change what it has mounted")
            }
            State::Stopping => bail!("the machine is about to end"),
            State::Starting | State::Other => bail!("{}", FolderError::NotUp),
        }
    }
}

/// Whether a declared folder is at this path of the guest.
fn is_at(declared: &Bytes, guest: &Path) -> bool {
    Volume::parse(declared.as_os_str()).is_ok_and(|volume| volume.guest == guest)
}

fn shown(folder: &Folder) -> Mount {
    let volume = &folder.volume;
    Mount {
        host: volume.host.as_os_str().to_owned().into(),
        guest: volume.guest.as_os_str().to_owned().into(),
        read_only: volume.read_only,
        uid: folder.ids.uid,
        gid: folder.ids.gid,
        cache: cache_name(volume.cache).to_owned(),
        locks: locking_name(volume.locking).to_owned(),
    }
}
