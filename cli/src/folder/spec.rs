//! The grammar of shared folders (`-v`): what was typed, checked, and written back in the same grammar for
//! listing and storing.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use share::{Cache, Locking};
use thiserror::Error;

/// The longest path that Linux takes, its terminating zero not counted.
const MAX_PATH: usize = 4095;

/// The options, for whoever typed another one.
const OPTIONS: &str = "ro, rw, uid=N, gid=N, cache=auto|strict|private and locks=guest|host";

/// Why a folder that was typed is none. Each is one sentence that stands behind what was typed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum VolumeError {
    /// No colon between two paths.
    #[error(
        "a folder to share is HOST:GUEST[:OPTIONS], such as .:/work (boot messages are shown by --verbose)"
    )]
    Form,
    /// Nothing before the colon.
    #[error("the path on the host is missing before the colon")]
    NoHost,
    /// The guest has no working directory to begin from.
    #[error("{0:?} is not an absolute path, which the one in the guest has to be")]
    Relative(OsString),
    /// A path that cannot be meant.
    #[error("{path:?} cannot be a folder's place: {reason}")]
    Path {
        /// What was typed.
        path: OsString,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A word after the second colon that means nothing.
    #[error("{0:?} is not an option of a folder: {OPTIONS} are")]
    Option(OsString),
    /// Not the number of a user or a group.
    #[error("{0:?} is not the number of a user or a group")]
    Id(OsString),
}

/// A folder, or a single file, of the host and where the guest has it: `HOST:GUEST[:OPTIONS]`.
///
/// HOST may hold colons, GUEST may not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Absolute; it is looked up when the folder is shared.
    pub host: PathBuf,
    /// Absolute, each step a name.
    pub guest: PathBuf,
    /// Whether the guest can change nothing.
    pub read_only: bool,
    /// Who the host's user is in the guest, where that is not the user of the command.
    pub uid: Option<u32>,
    /// The same of its group.
    pub gid: Option<u32>,
    /// What the guest may believe.
    pub cache: Cache,
    /// Whom the locks of its programs concern.
    pub locking: Locking,
}

impl Volume {
    /// What `text` says, HOST being relative to the working directory.
    ///
    /// # Errors
    /// Where it is not of this grammar.
    pub fn parse(text: &OsStr) -> Result<Self, VolumeError> {
        let (rest, last) = split_last(text.as_bytes()).ok_or(VolumeError::Form)?;
        let (host, guest, options) = match last.first() {
            Some(b'/') => (rest, last, &b""[..]),
            _ => match split_last(rest) {
                Some((host, guest)) => (host, guest, last),
                // What stands there was meant to be the path.
                None => return Err(VolumeError::Relative(os(last))),
            },
        };
        if host.is_empty() {
            return Err(VolumeError::NoHost);
        }
        let mut volume = Self {
            host: host_path(host)?,
            guest: guest_path(OsStr::from_bytes(guest))?,
            read_only: false,
            uid: None,
            gid: None,
            cache: Cache::default(),
            locking: Locking::default(),
        };
        for option in options.split(|&byte| byte == b',') {
            volume.set(option)?;
        }
        Ok(volume)
    }

    /// A folder that the guest has where the host has it, to be written.
    pub fn at_its_own_path(path: &Path) -> Self {
        Self {
            host: path.to_owned(),
            guest: path.to_owned(),
            read_only: false,
            uid: None,
            gid: None,
            cache: Cache::default(),
            locking: Locking::default(),
        }
    }

    fn set(&mut self, option: &[u8]) -> Result<(), VolumeError> {
        match option {
            b"" => {}
            b"ro" => self.read_only = true,
            b"rw" => self.read_only = false,
            b"cache=auto" => self.cache = Cache::Auto,
            b"cache=strict" => self.cache = Cache::Strict,
            b"cache=private" => self.cache = Cache::Private,
            b"locks=guest" => self.locking = Locking::Guest,
            b"locks=host" => self.locking = Locking::Host,
            option => match option.strip_prefix(b"uid=") {
                Some(number) => self.uid = Some(id(number)?),
                None => match option.strip_prefix(b"gid=") {
                    Some(number) => self.gid = Some(id(number)?),
                    None => return Err(VolumeError::Option(os(option))),
                },
            },
        }
        Ok(())
    }

    /// The same in this grammar.
    pub fn text(&self) -> OsString {
        let mut text = self.host.as_os_str().to_owned();
        text.push(":");
        text.push(&self.guest);
        let mut options = String::new();
        if self.read_only {
            options.push_str(",ro");
        }
        for (name, id) in [("uid", self.uid), ("gid", self.gid)] {
            if let Some(id) = id {
                // Writing to a String does not fail.
                let _ = write!(options, ",{name}={id}");
            }
        }
        if self.cache != Cache::Auto {
            options.push_str(",cache=");
            options.push_str(cache_name(self.cache));
        }
        if self.locking == Locking::Host {
            options.push_str(",locks=host");
        }
        if !options.is_empty() {
            options.replace_range(..1, ":");
        }
        text.push(options);
        text
    }
}

/// What `locks=` is followed by.
pub fn locking_name(locking: Locking) -> &'static str {
    match locking {
        Locking::Guest => "guest",
        Locking::Host => "host",
    }
}

/// What `cache=` is followed by.
pub fn cache_name(cache: Cache) -> &'static str {
    match cache {
        Cache::Auto => "auto",
        Cache::Strict => "strict",
        Cache::Private => "private",
    }
}

/// A path of the guest where a folder can be, with one slash before each name and none behind the last.
///
/// # Errors
/// Where it is none.
pub fn guest_path(text: &OsStr) -> Result<PathBuf, VolumeError> {
    let refused = |reason| VolumeError::Path {
        path: text.to_owned(),
        reason,
    };
    let bytes = text.as_bytes();
    if bytes.first() != Some(&b'/') {
        return Err(VolumeError::Relative(text.to_owned()));
    }
    if bytes.contains(&0) {
        return Err(refused("it holds a zero byte"));
    }
    if bytes.contains(&b':') {
        return Err(refused("it holds a colon"));
    }
    let mut path = Vec::new();
    for name in bytes.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(refused("it goes upwards")),
            name if name.len() > share::NAME_MAX => {
                return Err(refused("a name in it is longer than 255 bytes"));
            }
            name => {
                path.push(b'/');
                path.extend_from_slice(name);
            }
        }
    }
    if path.is_empty() {
        return Err(refused("it is the machine's root"));
    }
    if path.len() > MAX_PATH {
        return Err(refused("it is longer than 4095 bytes"));
    }
    Ok(OsString::from_vec(path).into())
}

/// A path on the host; absolute from here on, as it may be used where the working directory is another.
fn host_path(bytes: &[u8]) -> Result<PathBuf, VolumeError> {
    let refused = |reason| VolumeError::Path {
        path: os(bytes),
        reason,
    };
    if bytes.contains(&0) {
        return Err(refused("it holds a zero byte"));
    }
    std::path::absolute(Path::new(OsStr::from_bytes(bytes)))
        .map_err(|_| refused("the working directory cannot be found"))
}

fn id(digits: &[u8]) -> Result<u32, VolumeError> {
    let parsed = std::str::from_utf8(digits)
        .ok()
        .filter(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|text| text.parse().ok());
    // The highest number stands for nobody in system calls.
    parsed
        .filter(|&id| id != u32::MAX)
        .ok_or_else(|| VolumeError::Id(os(digits)))
}

fn split_last(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = text.iter().rposition(|&byte| byte == b':')?;
    Some((text.get(..colon)?, text.get(colon + 1..)?))
}

fn os(bytes: &[u8]) -> OsString {
    OsStr::from_bytes(bytes).to_owned()
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
