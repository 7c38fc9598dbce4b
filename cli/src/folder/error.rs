//! Why a folder is not shared, in one sentence for a person.

use std::io;
use std::path::PathBuf;

use share::ShareError;
use thiserror::Error;

use crate::table::harmless;

/// What is wrong with a folder that is to be shared, or to be shared no longer.
#[derive(Debug, Error)]
pub enum FolderError {
    /// The host has nothing there, or does not let us look.
    #[error("{path} cannot be shared", path = path.display())]
    Host {
        /// What was to be shared.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The server does not take it.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// Two at one place.
    #[error(
        "a folder is shared at {path} in the guest already: choose another path, or remove that one first",
        path = .0.display()
    )]
    Taken(PathBuf),
    /// One that another one would hide.
    #[error(
        "a folder at {above} in the guest hides the one at {below}: remove that one first",
        above = above.display(), below = below.display()
    )]
    Hidden {
        /// The outer one.
        above: PathBuf,
        /// The inner one.
        below: PathBuf,
    },
    /// There is none at this place.
    #[error("no folder is shared at {path} in the guest", path = .0.display())]
    NotThere(PathBuf),
    /// As many as there can be.
    #[error("{0} folders are shared with this machine, and no more can be")]
    TooMany(usize),
    /// The guest is not up, or about to end.
    #[error("the machine's guest is not up")]
    NotUp,
    /// The guest did not take it.
    #[error("nothing is mounted at {path} in the guest", path = guest.display())]
    Mount {
        /// Where.
        guest: PathBuf,
        /// Why not.
        source: Box<FolderError>,
    },
    /// The guest did not take it for its root.
    #[error("the machine's root is not mounted")]
    Root {
        /// Why not.
        source: Box<FolderError>,
    },
    /// The guest did not let go of it.
    #[error("the folder at {path} in the guest stays", path = guest.display())]
    Unmount {
        /// Where.
        guest: PathBuf,
        /// Why.
        source: Box<FolderError>,
    },
    /// The agent's own sentence.
    #[error("{0}")]
    Refused(String),
    /// The guest takes too long.
    #[error("the guest did not mount it in time")]
    TooSlow,
    /// The guest does not answer.
    #[error(
        "the guest's agent does not answer: `mvm mount rm -f` takes the folder away all the same"
    )]
    Silent,
    /// The agent is not reached, or makes no sense.
    #[error("the connection to the guest's agent broke")]
    Lost(#[source] io::Error),
    /// This process cannot serve it.
    #[error("no thread serves the folder")]
    Thread(#[source] io::Error),
}

impl FolderError {
    /// The agent's own sentence, which is a guest's and may go to a terminal.
    pub fn refused(sentence: String) -> Self {
        Self::Refused(harmless(&sentence))
    }
}
