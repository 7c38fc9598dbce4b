//! The host side of a shared folder: a FUSE server for a directory of the host.
//!
//! It takes whole FUSE requests and gives whole replies and notifications, over any [`Channel`]: it
//! knows nothing of how they travel. [`Share`] is what is shared, [`dispatch()`] does what one request
//! asks for, [`serve()`] is the loop of a thread around it.

mod channel;
mod dispatch;
mod handle;
mod host;
mod inode;
mod lock;
mod message;
mod owner;
mod passthrough;
mod prompt;
mod serve;
mod view;
mod watch;
pub mod wire;

pub use channel::{Advice, Channel};
pub use dispatch::{Answer, again, dispatch, give_up};
pub use message::{Args, NAME_MAX, PATH_MAX, Reply, check_name, notification};
pub use owner::{Ids, Owner, XATTR, XATTR_PREFIX};
pub use passthrough::{Cache, Caller, Limits, Locking, MAX_TRANSFER, Options, Share, ShareError};
pub use prompt::answer_promptly;
pub use serve::serve;
pub use view::{Readers, View};
pub use watch::{Change, HostEvent, Kind, watch};
