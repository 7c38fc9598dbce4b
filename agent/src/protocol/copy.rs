//! What host and agent say of copies.

use serde::{Deserialize, Serialize};

/// What is sent, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pack {
    /// Where it is in the machine's root, from `/`.
    pub path: Vec<u8>,
    /// The name that it gets in the archive; empty for none.
    pub name: Vec<u8>,
    /// Send what a symlink at `path` leads to.
    pub follow: bool,
    /// Send extended attributes.
    pub attributes: bool,
}

/// Where an archive goes, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unpack {
    /// The destination in the machine's root, from `/`.
    pub path: Vec<u8>,
    /// What becomes of it there.
    pub landing: Landing,
    /// Keep owners, set-id bits and extended attributes.
    pub owned: bool,
}

/// What becomes of an archive at its destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Landing {
    /// All of it is unpacked into a directory that exists.
    Members,
    /// It is one tree, packed without a name, and takes the place of the destination; where that is a
    /// directory, it gets this name in there, or without one its content goes there.
    Tree(Option<Vec<u8>>),
}

/// From whoever sends an archive, between its chunks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// Something to tell the person who waits for it; one sentence.
    Note(String),
    /// The archive is complete, or goes no further; one sentence that says why.
    End(Result<(), String>),
}

/// From the agent, while it unpacks. It may end before it has read the whole archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromUnpack {
    /// Something to tell the person who waits for it; one sentence.
    Note(String),
    /// The end; one sentence that says why not all was unpacked.
    Done(Result<(), String>),
}
