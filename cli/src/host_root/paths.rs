//! Paths of the host: where they lead, and which are too wide to be shown for what is in them.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};

use super::known;

/// How many symbolic links a path may go through, as in Linux.
const MAX_LINKS: usize = 40;

/// What has to be there for `path` to lead where it does: the symbolic links on its way, then what it is
/// in the end.
pub fn steps(path: &Path) -> Vec<PathBuf> {
    let names = |path: &Path| -> Vec<Option<OsString>> {
        let names = path.components().filter_map(|part| match part {
            Component::Normal(name) => Some(Some(name.to_owned())),
            Component::ParentDir => Some(None),
            _ => None,
        });
        names.collect()
    };
    let mut left: VecDeque<_> = names(path).into();
    let mut at = PathBuf::from("/");
    let mut steps = Vec::new();
    while let Some(name) = left.pop_front() {
        let Some(name) = name else {
            at.pop();
            continue;
        };
        let next = at.join(name);
        match fs::read_link(&next) {
            Ok(target) if steps.len() < MAX_LINKS => {
                if target.is_absolute() {
                    at = "/".into();
                }
                for name in names(&target).into_iter().rev() {
                    left.push_front(name);
                }
                steps.push(next);
            }
            _ => at = next,
        }
    }
    steps.push(at);
    steps
}

/// Where `path` leads, as far as there is something.
pub fn real(path: &Path) -> PathBuf {
    steps(path).pop().unwrap_or_default()
}

/// Takes `.` and `..` out of a path as typed in `cwd`, by its names alone.
pub fn absolute(path: &Path, cwd: &Path) -> PathBuf {
    let mut absolute = PathBuf::from("/");
    for part in cwd.join(path).components() {
        match part {
            Component::Normal(name) => absolute.push(name),
            Component::ParentDir => drop(absolute.pop()),
            _ => {}
        }
    }
    absolute
}

/// Whether there is a directory of the guest's own at `path`.
pub fn is_guests_own(path: &Path) -> bool {
    is_below_any(path, known::GUESTS_OWN)
}

/// Whether `path` is one of `dirs`, or below one.
pub fn is_below_any(path: &Path, dirs: &[&str]) -> bool {
    dirs.iter().any(|dir| path.starts_with(dir))
}

/// Whether `path` is the root, somebody's home, or above one.
pub fn is_wide(path: &Path, home: &Path) -> bool {
    let is_someones = path
        .parent()
        .is_some_and(|above| above == Path::new("/home"));
    let homes = [Path::new("/root"), Path::new("/home"), home];
    is_someones || homes.iter().any(|home| home.starts_with(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_on_the_way_are_steps_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir_all(root.join("a/b")).unwrap();
        symlink("a", root.join("relative")).unwrap();
        symlink(root.join("relative/b"), root.join("absolute")).unwrap();
        symlink("../absolute", root.join("a/up")).unwrap();
        let at = |path: &str| root.join(path);
        assert_eq!(steps(&at("a/b")), [at("a/b")]);
        assert_eq!(
            steps(&at("relative/up/../b")),
            [
                at("relative"),
                at("a/up"),
                at("absolute"),
                at("relative"),
                at("a/b")
            ]
        );
        assert_eq!(steps(&at("a/no/such")), [at("a/no/such")]);
        symlink("loop", root.join("loop")).unwrap();
        assert!(steps(&at("loop")).len() <= MAX_LINKS + 1);
    }

    #[test]
    fn a_typed_path_is_taken_from_the_working_directory() {
        for (path, expected) in [
            ("x", "/projects/here/x"),
            ("./x/", "/projects/here/x"),
            ("../x", "/projects/x"),
            ("/x/../../y", "/y"),
            (".", "/projects/here"),
        ] {
            let absolute = absolute(Path::new(path), Path::new("/projects/here"));
            assert_eq!(absolute, Path::new(expected), "{path}");
        }
    }

    #[test]
    fn homes_and_what_is_above_them_are_wide() {
        let home = Path::new("/data/users/me");
        for wide in [
            "/",
            "/data",
            "/data/users",
            "/data/users/me",
            "/home",
            "/home/you",
            "/root",
        ] {
            assert!(is_wide(Path::new(wide), home), "{wide}");
        }
        for narrow in [
            "/data/users/me/project",
            "/home/you/project",
            "/root/x",
            "/work",
        ] {
            assert!(!is_wide(Path::new(narrow), home), "{narrow}");
        }
    }
}
