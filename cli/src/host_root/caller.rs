//! Who runs mvm, and where.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::known;

/// The caller of mvm, as far as a machine with the host's root takes after them.
#[derive(Debug, Clone)]
pub struct Caller {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// The login name, where the host knows one.
    pub name: Option<String>,
    /// Home directory: absolute, below `/`.
    pub home: PathBuf,
    /// Working directory, without symbolic links.
    pub cwd: PathBuf,
    /// PATH and those variables that [`known`] names, in this order.
    pub environment: Vec<(OsString, OsString)>,
}

impl Caller {
    /// Whoever runs this process.
    pub fn of_this_process() -> Result<Self> {
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        let passwd = fs::read("/etc/passwd").unwrap_or_default();
        let entry = entry_of(uid, &passwd);
        let home = env::var_os("HOME").map(PathBuf::from);
        let home = home
            .into_iter()
            .chain(entry.clone().map(|entry| entry.home))
            .find(|home| is_home(home));
        let name = entry.map(|entry| entry.name);
        let home = home.unwrap_or_else(|| match (uid, &name) {
            (0, _) => "/root".into(),
            (_, Some(name)) => Path::new("/home").join(name),
            (uid, None) => Path::new("/home").join(uid.to_string()),
        });
        let cwd = env::current_dir().context("the working directory has gone")?;
        Ok(Self {
            uid,
            gid,
            name,
            home,
            cwd,
            environment: environment(|name| env::var_os(name)),
        })
    }

    /// The value of one of the variables.
    pub fn variable(&self, name: &str) -> Option<&OsStr> {
        let mut all = self.environment.iter();
        all.find(|(known, _)| known == name)
            .map(|(_, value)| value.as_os_str())
    }

    /// The directories in PATH that are absolute, in its order.
    pub fn search_path(&self) -> impl Iterator<Item = PathBuf> {
        let path = self.variable("PATH").unwrap_or_default();
        env::split_paths(path)
            .filter(|dir| dir.is_absolute())
            .collect::<Vec<_>>()
            .into_iter()
    }
}

/// The variables of the caller that count in a machine with the host's root.
pub fn environment(of: impl Fn(&str) -> Option<OsString>) -> Vec<(OsString, OsString)> {
    ["PATH"]
        .iter()
        .chain(known::DIRECTORY_VARIABLES)
        .chain(known::VARIABLES)
        .filter_map(|name| Some((OsString::from(name), of(name)?)))
        .filter(|(_, value)| !value.is_empty())
        .collect()
}

/// Whether a path can be somebody's home in the guest.
fn is_home(path: &Path) -> bool {
    let plain = path
        .components()
        .all(|part| !matches!(part, std::path::Component::ParentDir));
    path.is_absolute() && plain && path.parent().is_some()
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    name: String,
    home: PathBuf,
}

/// The user with this number in a passwd(5) file.
fn entry_of(uid: u32, passwd: &[u8]) -> Option<Entry> {
    let uid = uid.to_string();
    passwd.split(|&byte| byte == b'\n').find_map(|line| {
        let fields: Vec<_> = line.split(|&byte| byte == b':').collect();
        let [name, _, number, _, _, home, _] = fields[..] else {
            return None;
        };
        let name = str::from_utf8(name).ok().filter(|name| !name.is_empty())?;
        (number == uid.as_bytes()).then(|| Entry {
            name: name.to_owned(),
            home: OsStr::from_bytes(home).into(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_number() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nbroken:x:1000\n:x:1000:1::/no:\n\
            me:x:1000:100:Me:/home/me:/bin/sh\nalso:x:1000:1::/home/also:/bin/sh\n";
        let entry = entry_of(1000, passwd).unwrap();
        assert_eq!((entry.name.as_str(), entry.home), ("me", "/home/me".into()));
        assert_eq!(entry_of(7, passwd), None);
    }

    #[test]
    fn only_what_is_known_is_taken_from_the_environment() {
        let set = [
            "HOME",
            "PATH",
            "AWS_SECRET_ACCESS_KEY",
            "CARGO_HOME",
            "LANG",
        ];
        let taken = environment(|name| set.contains(&name).then(|| "/x".into()));
        let names: Vec<_> = taken
            .iter()
            .map(|(name, _)| name.to_str().unwrap())
            .collect();
        assert_eq!(names, ["PATH", "CARGO_HOME", "LANG"]);
    }

    #[test]
    fn a_home_is_a_directory_below_the_root() {
        for (path, expected) in [
            ("/home/me", true),
            ("/root", true),
            ("/", false),
            ("", false),
            ("home", false),
            ("/home/..", false),
        ] {
            assert_eq!(is_home(Path::new(path)), expected, "{path:?}");
        }
    }
}
