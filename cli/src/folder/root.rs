//! A directory of the host as a machine's root.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use agent::protocol::{self, AGENT_PORT, Done, MountPoint, NewDirectory, Open, UserIds};
use share::{Ids, Limits, Options, Owner, Share, ShareError};

use super::error::FolderError;
use super::served::{Place, Served};
use super::{PATIENCE, files_allowed};
use crate::host_root::HostRoot;
use crate::link::Link;

/// Its share of the descriptors that this process may have.
const SHARE_OF_FILES: usize = 4;

/// A directory that is to be a root.
#[derive(Debug)]
pub struct Root {
    share: Share,
    source: OsString,
    read_only: bool,
    /// What the guest needs besides.
    directories: Vec<NewDirectory>,
}

impl Root {
    /// The directory `path`, all of it, whose owner is the guest's root.
    ///
    /// # Errors
    /// Where it cannot be opened.
    pub fn directory(path: &Path, writable: bool) -> Result<Self, ShareError> {
        let options = Options {
            read_only: !writable,
            ..options(Ids { uid: 0, gid: 0 })
        };
        Ok(Self {
            share: Share::open(path, options)?,
            source: path.into(),
            read_only: !writable,
            directories: Vec::new(),
        })
    }

    /// What `host` shows of this host's own root.
    ///
    /// # Errors
    /// Where it cannot be opened.
    pub fn of_host(host: &HostRoot) -> Result<Self, ShareError> {
        let caller = host.caller();
        let ids = Ids {
            uid: caller.uid,
            gid: caller.gid,
        };
        // What is shown everybody may read, or its owner.
        let options = Options {
            acl: false,
            ..options(ids)
        };
        let directory = |path: &Path, mode, ids: Ids| NewDirectory {
            path: path.as_os_str().as_bytes().to_vec(),
            mode,
            owner: UserIds {
                uid: ids.uid,
                gid: ids.gid,
            },
        };
        let root = Ids { uid: 0, gid: 0 };
        Ok(Self {
            share: Share::open_view(Path::new("/"), options, host.view())?,
            source: "/".into(),
            read_only: true,
            directories: vec![
                directory(&caller.home, 0o700, ids),
                directory(Path::new("/var/tmp"), 0o1777, root),
            ],
        })
    }

    /// Whether the guest can change it.
    pub fn is_writable(&self) -> bool {
        !self.read_only
    }

    /// How many descriptors of this process it may take.
    pub fn files() -> usize {
        files_allowed() / SHARE_OF_FILES
    }

    /// Has the guest behind `link` mount it.
    ///
    /// # Errors
    /// Where it cannot.
    pub fn mount(self, link: &Link, queues: u32) -> Result<Served, FolderError> {
        let place = Place {
            at: MountPoint::Root,
            source: &self.source,
            read_only: self.read_only,
            queues,
            // In an overlay nobody can watch what lies below.
            replayed: !self.read_only,
        };
        let served = Served::start(link, self.share, &place).map_err(|error| {
            let source = Box::new(error);
            FolderError::Root { source }
        })?;
        if !self.directories.is_empty() {
            make(link, self.directories)?;
        }
        Ok(served)
    }
}

fn options(ids: Ids) -> Options {
    Options {
        owner: Owner::Mapped(ids),
        limits: Limits::of_files(Root::files()),
        ..Options::default()
    }
}

fn make(link: &Link, directories: Vec<NewDirectory>) -> Result<(), FolderError> {
    let ask = || {
        let stream = link.connect(AGENT_PORT)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        protocol::send(&stream, &Open::MakeDirectories(directories))?;
        let answer = protocol::receive(&stream)?;
        answer.ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
    };
    let Done(made) = ask().map_err(FolderError::Lost)?;
    made.map_err(FolderError::refused)
}
