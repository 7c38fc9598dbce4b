//! What this host can do, found out before anything depends on it.
//!
//! [`kvm`] runs at the start of every machine and costs a few milliseconds; the checks of [`host`]
//! are for `mvm doctor`.

#[cfg(target_arch = "x86_64")]
mod guest;
pub mod host;
mod kvm;

pub use kvm::{KvmVerdict, kvm};

/// How well one facility of the host serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It is there and fit for use.
    Ok,
    /// Machines run without it, or with what there is of it, but slower or with less.
    Slow,
    /// It is not there, or may not be used.
    Missing,
}

/// What was found out about one facility of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Whether it serves.
    pub status: Status,
    /// What was found, in a few words.
    pub detail: String,
    /// What a person can do where it does not serve: a command, or a sentence.
    pub mend: Option<String>,
}

impl Check {
    fn ok(detail: impl Into<String>) -> Self {
        Self {
            status: Status::Ok,
            detail: detail.into(),
            mend: None,
        }
    }

    fn slow(detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            status: Status::Slow,
            detail: detail.into(),
            mend: Some(mend.into()),
        }
    }

    fn missing(detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            status: Status::Missing,
            detail: detail.into(),
            mend: Some(mend.into()),
        }
    }
}
