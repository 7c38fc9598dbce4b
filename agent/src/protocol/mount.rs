//! What host and agent say of shared folders.

use serde::{Deserialize, Serialize};

use super::UserIds;

/// A folder, or a single file, that the host serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// A random number that ties the mount's connections to it.
    pub mount: u64,
    /// Where in the guest.
    pub at: MountPoint,
    /// What the guest's list of mounts shows as its source.
    pub source: Vec<u8>,
    /// Type and permissions of what is mounted, as in `st_mode`.
    pub mode: u32,
    /// Whether nothing can be changed through it.
    pub read_only: bool,
    /// How many [`MountStream::Requests`] the host opens, 1 to [`MAX_MOUNT_QUEUES`]. The folder is mounted when
    /// these and the one of notifications are there.
    pub queues: u32,
    /// Where the host has the guest's memory before it: what that is good for.
    pub memory: Option<HostMemory>,
}

/// What the agent can do with a host that has the guest's memory before it: besides, it may open a [`WINDOW`] on each queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMemory {
    /// The I/O port at which the host is called.
    pub call_port: u16,
    /// What is written there, as four bytes, for each queue, once it has an area for [`CALLS`].
    pub calls: Vec<u32>,
}

/// The most connections that carry one mount's requests.
pub const MAX_MOUNT_QUEUES: u32 = 64;

/// Where a folder is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountPoint {
    /// It becomes the machine's root, which the agent waits for ([`Root::Share`](crate::guest::Root)).
    Root,
    /// At this absolute path of the machine's root; what is missing of it is made.
    Path(Vec<u8>),
}

/// One of a mount's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MountStream {
    /// Requests to the host and their replies: a queue of the guest's kernel of its own. The agent answers
    /// `FUSE_RELEASE` and `FUSE_RELEASEDIR` itself, so the host sends no reply to these.
    Requests {
        /// Which one, from 0 up to [`Mount::queues`].
        queue: u32,
    },
    /// Notifications from the host. They may wait for replies, so they have a connection of their own; where
    /// they have to come after replies, [`AFTER_REPLIES`] says so.
    Notifications,
}

/// The length of the kernel's `fuse_out_header`.
const OUT_HEADER: usize = 16;

/// The `error` of a message among notifications that is for the agent and not for the kernel: those after it
/// are given to the kernel once it has been given so many replies, in all, of each queue.
///
/// Behind its header (`unique` is 0) are these numbers for queue 0, 1 and so on, and then the same for replies to the
/// [`CALLS`] of each queue: u64, little endian.
pub const AFTER_REPLIES: i32 = i32::MAX;

/// The `error` of a message among replies that is for the agent and not for the kernel: behind its header
/// (`unique` is 0) are the number of a directory's node, and how many of its entries are better listed than looked up
/// one by one; both are u64, little endian.
pub const LIST: i32 = i32::MAX - 1;

/// The same for the number of a node, u64, that was made just now and has no extended attribute
/// `security.capability`.
pub const NEW: i32 = i32::MAX - 2;

/// The same for the attributes of a directory that has just been changed: the number of its node, that of the message,
/// and the reply to a `FUSE_GETATTR` for it. Among those of one folder, a message with a lower number may say less.
pub const ATTRIBUTES: i32 = i32::MAX - 3;

/// The same for a directory that was made just now, is empty, and of which the kernel is told what the host changes in it:
/// the number of its node, and for how many seconds the kernel may believe that a name is not there; both are u64.
pub const EMPTY: i32 = i32::MAX - 5;

/// The same for the reply to a request with this `unique`, u64, which has this length, u64, and lies in the slot that
/// came with the request ([`PLACE`]).
pub const PLACED: i32 = i32::MAX - 4;

/// The length of the kernel's `fuse_in_header`.
const IN_HEADER: usize = 40;

/// Memory of the agent's that stays at its place in the guest's memory, through which long requests and replies go
/// instead of the stream: so many slots of so many pages of [`WINDOW_PAGE`] bytes, each for one message.
///
/// A slot belongs to the agent, which lends it for a request until that is answered. As the opcode of a message among
/// requests, behind whose header stand the guest-physical addresses of all pages, u64, little endian: this is the
/// queue's window. Sent at most once, and only where the host [can reach it](Mount::memory).
pub const WINDOW: u32 = u32::MAX;
/// Slots of a window.
pub const WINDOW_SLOTS: usize = 2;
/// Pages of a slot: 1 MiB of a file's data, headers, and two names.
pub const SLOT_PAGES: usize = 258;
/// The size of a page, bytes.
pub const WINDOW_PAGE: usize = 4096;

/// The opcode of a message among requests that says where the reply to another request, with the same `unique`, may be
/// placed: behind its header is the number of a slot, u64. It comes before that request.
pub const PLACE: u32 = u32::MAX - 1;

/// The opcode of a message among requests that stands for another request, with the same `unique`, which lies in a slot:
/// behind its header are the slot's number and the request's length, u64 both.
pub const REQUEST_PLACED: u32 = u32::MAX - 2;

/// A request, or a reply, shorter than so many bytes does not go through a window.
pub const PLACED_FROM: usize = 16 << 10;

/// The opcode of a message among requests that opens an area for calls: behind its header are the guest-physical addresses
/// of [`CALL_PAGES`] pages, u64, little endian. Sent at most once for a queue.
///
/// A call is a request that does not go over the stream: the agent leaves it in the area, and then [calls](HostMemory),
/// with what is held back behind it. When it goes on, the host has answered it there, or has left that for the
/// stream. At the beginning of the area stand how many bytes of messages there are ([`CALL_ASKED`]) and how many of these were
/// answered ([`CALL_DONE`]), always whole ones and first the first, by so many bytes of messages
/// ([`CALL_ANSWERED`]); u64, little endian, at these offsets. The messages of either side follow at [`CALL_HEADER`].
pub const CALLS: u32 = u32::MAX - 3;
/// Pages of an area for calls, each of [`WINDOW_PAGE`] bytes.
pub const CALL_PAGES: usize = 6;
/// How many bytes of messages are asked for.
pub const CALL_ASKED: usize = 0;
/// How many of them were done.
pub const CALL_DONE: usize = 8;
/// How many bytes of messages answer them.
pub const CALL_ANSWERED: usize = 16;
/// Where messages begin.
pub const CALL_HEADER: usize = 24;

/// A message for the host, among requests: with this opcode, `unique`, and these numbers behind `fuse_in_header`.
pub fn for_host(opcode: u32, unique: u64, numbers: &[u64]) -> Vec<u8> {
    let length = IN_HEADER + size_of_val(numbers);
    let mut message = Vec::with_capacity(length);
    message.extend(u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    message.extend(opcode.to_le_bytes());
    message.extend(unique.to_le_bytes());
    message.resize(IN_HEADER, 0);
    for number in numbers {
        message.extend(number.to_le_bytes());
    }
    message
}

/// A message for the agent, among replies or notifications: of this kind, with these numbers and then these bytes behind
/// `fuse_out_header`.
pub fn for_agent(kind: i32, numbers: &[u64], rest: &[u8]) -> Vec<u8> {
    let length = OUT_HEADER + size_of_val(numbers) + rest.len();
    let mut message = Vec::with_capacity(length);
    message.extend(u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    message.extend(kind.to_le_bytes());
    message.extend(0_u64.to_le_bytes());
    for number in numbers {
        message.extend(number.to_le_bytes());
    }
    message.extend(rest);
    message
}

/// From the host, on a mount's connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToMount {
    /// Do again, in this order, what was done on the host, where somebody watches; answered with
    /// [`FromMount::Replayed`].
    Replay(Vec<HostChange>),
    /// Take the mount away if nobody uses it, or in any case; answered with [`FromMount::Unmounted`].
    Unmount {
        /// In any case: whoever uses it gets errors from then on.
        force: bool,
    },
}

/// From the agent, on a mount's connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromMount {
    /// It is mounted, or one sentence that says why not, and nothing follows.
    Mounted(Result<Mounted, String>),
    /// The changes were done again, or there was nobody to see it.
    Replayed,
    /// It is not mounted any more, or one sentence that says why it still is.
    Unmounted(Result<(), String>),
}

/// What is to be known of a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mounted {
    /// The thread that does the host's changes again, as its requests name it (`fuse_in_header.pid`).
    pub replayer: u32,
}

/// Something that was done on the host in a shared folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostChange {
    /// The directory, from the mount's root on; empty for that itself.
    pub dir: Vec<u8>,
    /// The entry; empty for the directory itself.
    pub name: Vec<u8>,
    /// What was done.
    pub what: ChangeKind,
}

/// What was done on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChangeKind {
    /// A regular file was made.
    CreatedFile,
    /// A directory was made.
    CreatedDirectory,
    /// A symbolic link was made.
    CreatedSymlink,
    /// A FIFO, a socket or a device was made.
    CreatedSpecial,
    /// It was written.
    Modified,
    /// It was closed by somebody who could write it.
    CloseWrite,
    /// Its attributes were changed.
    Attributes,
    /// It was removed.
    Deleted {
        /// Whether it was a directory.
        is_dir: bool,
    },
    /// It was given another name.
    Moved {
        /// The new directory, as in [`HostChange::dir`].
        dir: Vec<u8>,
        /// The new name.
        name: Vec<u8>,
    },
    /// More was done than could be told: anything may be different.
    Overflow,
}

/// A directory that is to be there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewDirectory {
    /// Absolute. What is missing above it is made too, for everybody to enter, and is root's.
    pub path: Vec<u8>,
    /// Permissions that it gets where it is made.
    pub mode: u32,
    /// Whose it is where it is made.
    pub owner: UserIds,
}
