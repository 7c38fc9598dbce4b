//! Extended attributes (xattr(7)) of files and directories.
//!
//! Carried are those that mean the same elsewhere: a user's own, access control lists, and a
//! program's capabilities. Labels of a security module are of one system only.

use std::os::fd::AsFd;

use rustix::fs::{XattrFlags, fgetxattr, flistxattr, flistxattr_query, fsetxattr};
use rustix::io::Errno;

use super::member::Attribute;

/// What stands before an attribute's name as the keyword of a pax record.
pub const KEYWORD: &[u8] = b"SCHILY.xattr.";

/// The largest list of names, and the largest value, that Linux has.
const MAX_SIZE: usize = 64 << 10;

/// Names or beginnings of names.
const CARRIED: [&[u8]; 3] = [b"user.", b"system.posix_acl_", b"security.capability"];

/// Whether this attribute is carried from one system to the other.
pub fn is_carried(name: &[u8]) -> bool {
    CARRIED.iter().any(|start| name.starts_with(start)) && !name.contains(&0)
}

/// The attributes of `file` that are carried; none where its filesystem has no attributes.
pub fn of(file: impl AsFd) -> Result<Vec<Attribute>, Errno> {
    match flistxattr_query(&file) {
        Ok(0) | Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Ok(_) => {}
        Err(error) => return Err(error),
    }
    let mut names = vec![0u8; MAX_SIZE];
    let len = flistxattr(&file, &mut names)?;
    names.truncate(len);
    let mut found = Vec::new();
    let mut value = vec![0u8; MAX_SIZE];
    for name in names
        .split(|&byte| byte == 0)
        .filter(|name| is_carried(name))
    {
        match fgetxattr(&file, name, &mut value) {
            Ok(len) => found.push((name.to_vec(), value.get(..len).unwrap_or_default().to_vec())),
            // Removed since.
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Gives `file` those of `attributes` that are carried; the first that cannot be set, and why.
pub fn set(file: impl AsFd, attributes: &[Attribute]) -> Result<(), (&[u8], Errno)> {
    let mut failed = Ok(());
    for (name, value) in attributes.iter().filter(|(name, _)| is_carried(name)) {
        let set = fsetxattr(&file, name.as_slice(), value, XattrFlags::empty());
        failed = failed.and(set.map_err(|error| (name.as_slice(), error)));
    }
    failed
}
