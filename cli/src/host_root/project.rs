//! Which working directories are shared without having been asked for.

use std::path::Path;

use super::caller::Caller;
use super::known;
use super::paths::{is_below_any, is_guests_own, is_wide, real};

/// Whether the caller's working directory is shared, to be written.
///
/// # Errors
/// What it is that keeps it from being: the end of a sentence that begins with the directory.
pub fn check(caller: &Caller) -> Result<(), &'static str> {
    let dir = &caller.cwd;
    let home = real(&caller.home);
    if *dir == home {
        return Err("is your home directory");
    }
    if is_wide(dir, &home) {
        return Err("holds home directories");
    }
    if is_guests_own(dir) {
        return Err("is something that the guest has of its own");
    }
    let is_exactly = |known: &[&str]| known.iter().any(|path| dir == Path::new(path));
    let is_projects = is_below_any(dir, known::PROJECTS) && !is_exactly(known::PROJECTS);
    let is_system = is_below_any(dir, known::SYSTEM) || is_below_any(dir, known::VAR);
    if is_below_any(dir, known::VAR) || (is_system && !is_projects) {
        return Err("belongs to the system");
    }
    if is_exactly(known::NO_PROJECTS) {
        return Err("is shared by all kinds of programs");
    }
    let secret = dir
        .strip_prefix(&home)
        .is_ok_and(|path| is_below_any(path, known::CREDENTIALS));
    match secret {
        true => Err("is where credentials are kept"),
        false => Ok(()),
    }
}
