//! The fixture of the end-to-end tests: the `mvm` binary is run as a user runs it, and nothing of it
//! is linked in, so that the same tests hold on hardware KVM and through `--accel tcg`.
//!
//! ```no_run
//! use tests::Guest;
//!
//! let output = Guest::new().cpus(2).run("nproc");
//! output.expect_code(0).expect_stdout("2\n");
//! ```
//!
//! The binary is the one that MVM_TEST_BINARY names, else the workspace's release build.

pub mod document;
pub mod guest;
pub mod host;
pub mod image;
pub mod kernel;
pub mod machine;
pub mod net;
pub mod process;
pub mod python;
pub mod ssh;
pub mod terminal;
pub mod tmux;
pub mod user;

pub use guest::Guest;
pub use machine::{Machine, Machines};
pub use process::{Output, Running};
pub use terminal::Terminal;
pub use user::User;
