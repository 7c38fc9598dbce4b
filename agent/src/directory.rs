//! Directories that the host wants to be in the machine's root.

use agent::protocol::{Done, NewDirectory};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use crate::serve::Machine;

/// Makes those that are missing.
pub fn make_all(machine: &Machine, directories: &[NewDirectory]) -> Done {
    let made = machine
        .wait_for_root()
        .and_then(|()| directories.iter().try_for_each(|new| make(machine, new)));
    Done(made)
}

fn make(machine: &Machine, new: &NewDirectory) -> Result<(), String> {
    let path = String::from_utf8_lossy(&new.path);
    let failed =
        |error: std::io::Error| format!("{path} cannot be made in the machine's root: {error}");
    let mut names = new
        .path
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty());
    let Some(name) = names.next_back() else {
        return Ok(());
    };
    if machine.root.open(&new.path, OFlags::PATH).is_ok() {
        return Ok(());
    }
    let above: Vec<_> = names.flat_map(|name| [b"/", name]).collect();
    let above = machine
        .root
        .make_directory(above.concat(), 0o755)
        .map_err(failed)?;
    match rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(0o700)) {
        // Something else was faster, or a symlink leads nowhere: it is not ours to change.
        Err(Errno::EXIST) => return Ok(()),
        outcome => outcome.map_err(|errno| failed(errno.into()))?,
    }
    let (uid, gid) = (Uid::from_raw(new.owner.uid), Gid::from_raw(new.owner.gid));
    let mode = Mode::from_raw_mode(new.mode & 0o7777);
    rustix::fs::chownat(
        &above,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .and_then(|()| rustix::fs::chmodat(&above, name, mode, AtFlags::empty()))
    .map_err(|errno| failed(errno.into()))
}
