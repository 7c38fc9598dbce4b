//! Folders of the host that a guest has mounted: what `-v` asks for, and `mvm mount` changes.
//!
//! This process serves them (crate `share`); the guest's agent mounts them and passes whole FUSE messages on,
//! over vsock connections of their own. What is mounted is known here and nowhere else.

mod desk;
mod error;
mod gather;
mod pieces;
mod root;
mod served;
pub mod spec;
mod stream;
#[cfg(test)]
mod tests;
mod window;

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use agent::protocol::{self, AGENT_PORT, Identified, MountPoint, Open, UserIds};
use rustix::process::Resource;
use share::{Ids, Limits, Options, Owner, Share};

pub use self::error::FolderError;
pub use self::root::Root;
use self::served::{Place, Served};
use self::spec::Volume;
use crate::link::Link;

/// How many folders a guest may have.
const MAX_FOLDERS: usize = 64;

/// The most descriptors that all of them together may take where the host sets no limit.
const MAX_FILES: usize = 1 << 20;

/// How long the agent may take to answer what it can answer at once: an emulated one is slow.
const PATIENCE: Duration = Duration::from_secs(30);

/// A folder as the guest has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    /// What was asked for.
    pub volume: Volume,
    /// Who the host's user is in the guest.
    pub ids: Ids,
}

/// The folders of one machine.
#[derive(Debug)]
pub struct Folders {
    declared: Vec<Volume>,
    /// Whether the guest can change the machine's root.
    root_is_writable: bool,
    /// The machine's root, until the guest is up.
    root: Mutex<Option<Root>>,
    /// The machine's root, once the guest has it.
    served_root: Mutex<Option<Served>>,
    /// Who commands run as, as it was typed.
    user: Option<String>,
    queues: u32,
    /// The way to the guest, once it is up.
    link: OnceLock<Link>,
    /// Who commands run as, once that had to be known.
    ids: OnceLock<Ids>,
    /// Held while the guest's folders are changed. Taken before `mounted`.
    changing: Mutex<()>,
    mounted: Mutex<Vec<Arc<Mounted>>>,
}

#[derive(Debug)]
struct Mounted {
    folder: Folder,
    /// How many descriptors of this process it may take.
    files: usize,
    served: Served,
}

impl Folders {
    /// Those that are declared for a machine with so many CPUs, whose commands run as `user`.
    ///
    /// # Errors
    /// Where one of them is not on the host, or two are at one place in the guest.
    pub fn new(
        mut declared: Vec<Volume>,
        user: Option<String>,
        cpus: u8,
    ) -> Result<Self, FolderError> {
        // What is below another one is mounted after it.
        declared.sort_by_key(|volume| volume.guest.components().count());
        if declared.len() > MAX_FOLDERS {
            return Err(FolderError::TooMany(MAX_FOLDERS));
        }
        for (index, volume) in declared.iter().enumerate() {
            check_host(volume)?;
            let others = declared.iter().skip(index + 1);
            if others.into_iter().any(|other| other.guest == volume.guest) {
                return Err(FolderError::Taken(volume.guest.clone()));
            }
        }
        Ok(Self {
            declared,
            root_is_writable: false,
            root: Mutex::default(),
            served_root: Mutex::default(),
            user,
            queues: u32::from(cpus).clamp(2, 4),
            link: OnceLock::new(),
            ids: OnceLock::new(),
            changing: Mutex::new(()),
            mounted: Mutex::default(),
        })
    }

    /// These, and `root` as the machine's root.
    pub fn with_root(self, root: Root) -> Self {
        Self {
            root_is_writable: root.is_writable(),
            root: Mutex::new(Some(root)),
            ..self
        }
    }

    /// Whether nothing is to be mounted.
    pub fn is_empty(&self) -> bool {
        self.declared.is_empty() && lock(&self.root).is_none()
    }

    /// Mounts the declared ones in the guest behind `link`, which is up.
    ///
    /// # Errors
    /// Where one cannot be mounted; those before it are then.
    pub fn attach(&self, link: &Link) -> Result<(), FolderError> {
        // A guest greets once.
        let _ = self.link.set(link.clone());
        let _changing = lock(&self.changing);
        let root = lock(&self.root).take();
        if let Some(root) = root {
            let served = root.mount(link, self.queues)?;
            *lock(&self.served_root) = Some(served);
        }
        for volume in &self.declared {
            self.mount(volume.clone())?;
        }
        Ok(())
    }

    /// Has `done` called once the guest has lost the root that is served to it, if there is one.
    ///
    /// # Errors
    /// Where no thread can be started that waits for it.
    pub fn at_end_of_root(&self, done: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        match &*lock(&self.served_root) {
            Some(root) => root.at_end(done),
            None => Ok(()),
        }
    }

    /// Mounts one more.
    ///
    /// # Errors
    /// Where it is not on the host, its place is taken, or the guest cannot mount it.
    pub fn add(&self, volume: Volume) -> Result<Folder, FolderError> {
        let _changing = lock(&self.changing);
        check_host(&volume)?;
        self.check_place(&volume.guest)?;
        self.mount(volume)
    }

    fn mount(&self, volume: Volume) -> Result<Folder, FolderError> {
        let link = self.link.get().ok_or(FolderError::NotUp)?;
        let ids = self.ids(link)?;
        let ids = Ids {
            uid: volume.uid.unwrap_or(ids.uid),
            gid: volume.gid.unwrap_or(ids.gid),
        };
        let files = self.files_left() / 4;
        let options = Options {
            read_only: volume.read_only,
            owner: Owner::Mapped(ids),
            cache: volume.cache,
            locking: volume.locking,
            limits: Limits::of_files(files),
            ..Options::default()
        };
        let share = Share::open(&volume.host, options)?;
        let place = Place {
            at: MountPoint::Path(volume.guest.as_os_str().as_bytes().to_vec()),
            source: volume.host.as_os_str(),
            read_only: volume.read_only,
            queues: self.queues,
            replayed: true,
        };
        let served = Served::start(link, share, &place).map_err(|error| FolderError::Mount {
            guest: volume.guest.clone(),
            source: Box::new(error),
        })?;
        let folder = Folder { volume, ids };
        lock(&self.mounted).push(Arc::new(Mounted {
            folder: folder.clone(),
            files,
            served,
        }));
        Ok(folder)
    }

    /// Takes the one at `guest` away, with `force` also from whoever uses it.
    ///
    /// # Errors
    /// Where there is none, or it is in use.
    pub fn remove(&self, guest: &Path, force: bool) -> Result<Folder, FolderError> {
        let _changing = lock(&self.changing);
        let all = self.there();
        let below = all.iter().find(|mounted| {
            let path = &mounted.folder.volume.guest;
            path != guest && path.starts_with(guest)
        });
        let found = all
            .iter()
            .find(|mounted| mounted.folder.volume.guest == guest)
            .ok_or_else(|| FolderError::NotThere(guest.to_owned()))?;
        if let Some(below) = below {
            return Err(FolderError::Hidden {
                above: guest.to_owned(),
                below: below.folder.volume.guest.clone(),
            });
        }
        let unmounted = found.served.unmount(force);
        unmounted.map_err(|error| FolderError::Unmount {
            guest: guest.to_owned(),
            source: Box::new(error),
        })?;
        lock(&self.mounted).retain(|mounted| !Arc::ptr_eq(mounted, found));
        Ok(found.folder.clone())
    }

    /// Those that the guest has, in the order in which they were mounted.
    pub fn list(&self) -> Vec<Folder> {
        let there = self.there();
        there.iter().map(|mounted| mounted.folder.clone()).collect()
    }

    /// Whether the guest may be about to write to one of them.
    pub fn writes(&self) -> bool {
        let there = self.there();
        let mut there = there.iter();
        self.root_is_writable || there.any(|mounted| !mounted.folder.volume.read_only)
    }

    /// Serves none any more.
    pub fn end(&self) {
        // Somebody may be waiting for the guest with one of them in hand.
        for mounted in lock(&self.mounted).drain(..) {
            mounted.served.end();
        }
        lock(&self.served_root).take();
    }

    /// Those that were not unmounted by the guest itself.
    fn there(&self) -> Vec<Arc<Mounted>> {
        let mut mounted = lock(&self.mounted);
        mounted.retain(|mounted| mounted.served.is_there());
        mounted.clone()
    }

    fn check_place(&self, guest: &Path) -> Result<(), FolderError> {
        let there = self.there();
        if there.len() >= MAX_FOLDERS {
            return Err(FolderError::TooMany(MAX_FOLDERS));
        }
        for mounted in there {
            let other = &mounted.folder.volume.guest;
            if other == guest {
                return Err(FolderError::Taken(guest.to_owned()));
            }
            if other.starts_with(guest) {
                return Err(FolderError::Hidden {
                    above: guest.to_owned(),
                    below: other.clone(),
                });
            }
        }
        Ok(())
    }

    /// Who the machine's commands run as, in numbers; the guest is asked once.
    fn ids(&self, link: &Link) -> Result<Ids, FolderError> {
        if let Some(ids) = self.ids.get() {
            return Ok(*ids);
        }
        let ids = match &self.user {
            None => Ids { uid: 0, gid: 0 },
            Some(user) => identify(link, user)?,
        };
        Ok(*self.ids.get_or_init(|| ids))
    }

    /// How many descriptors this process may have that no folder may take.
    fn files_left(&self) -> usize {
        let mut taken: usize = self.there().iter().map(|mounted| mounted.files).sum();
        if lock(&self.served_root).is_some() {
            taken += Root::files();
        }
        files_allowed().saturating_sub(taken)
    }
}

/// How many descriptors all folders together may take.
fn files_allowed() -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile).current;
    let limit = limit.and_then(|limit| usize::try_from(limit).ok());
    limit.unwrap_or(MAX_FILES).min(MAX_FILES)
}

/// Who `user` is in the guest behind `link`.
fn identify(link: &Link, user: &str) -> Result<Ids, FolderError> {
    let ask = || {
        let stream = link.connect(AGENT_PORT)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let user = user.to_owned();
        protocol::send(&stream, &Open::Identify { user })?;
        let answer = protocol::receive(&stream)?;
        answer.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    };
    let Identified(found) = ask().map_err(FolderError::Lost)?;
    let UserIds { uid, gid } = found.map_err(FolderError::refused)?;
    Ok(Ids { uid, gid })
}

fn check_host(volume: &Volume) -> Result<(), FolderError> {
    let found = std::fs::metadata(&volume.host);
    found.map(drop).map_err(|source| FolderError::Host {
        path: volume.host.clone(),
        source,
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
