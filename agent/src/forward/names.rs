//! Names as the guest resolves them, by the files of the machine's root.

use std::io;
use std::net::IpAddr;
use std::time::Instant;

use agent::names::{self, Files};
use agent::protocol::DialError;

use crate::tree::Tree;

/// All addresses of `name`, those first that the guest has a way to; not empty.
pub fn lookup(root: &Tree, name: &str, deadline: Instant) -> Result<Vec<IpAddr>, DialError> {
    let read = |path: &str| match root.read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(DialError::Other(format!(
            "the guest's /{path} cannot be read: {error}"
        ))),
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
    };
    let files = Files {
        hosts: read("etc/hosts")?,
        resolv_conf: read("etc/resolv.conf")?,
    };
    names::lookup(&files, name, deadline)
}
