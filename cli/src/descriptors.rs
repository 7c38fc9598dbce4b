//! The limit of open files: each forwarded connection takes some.

use rustix::process::{Resource, getrlimit, setrlimit};

/// Lets this process have as many open files as it may. The usual soft limit of 1,024 is there for programs
/// that use select(2).
pub fn raise_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!("the limit of open files stays as it is: {error}");
    }
}
