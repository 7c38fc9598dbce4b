//! What is written down of a machine: what it was made from, and how it last ended.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The format of [`Definition`] and [`Ending`] on disk.
pub const VERSION: u32 = 1;

/// What a machine is made from: `machine.json`. Its name is that of the directory it is in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// [`VERSION`].
    pub version: u32,
    /// When it was made.
    pub created: Timestamp,
    /// The words typed after `mvm run`.
    pub argv: Vec<Bytes>,
    /// The directory in which they were typed.
    pub cwd: Bytes,
    /// What those words took from the environment (`-e NAME`), which `mvm start` cannot know.
    #[serde(default)]
    pub env: Vec<(Bytes, Bytes)>,
    /// Whether it is to be gone when it has ended, or its owner has been killed.
    #[serde(default)]
    pub ephemeral: bool,
    /// What was changed while it ran, over what `argv` says.
    #[serde(default)]
    pub changes: Changes,
}

impl Definition {
    /// That of a machine that is made here and now.
    pub fn new(argv: &[OsString], env: Vec<(Bytes, Bytes)>) -> Result<Self> {
        let cwd = std::env::current_dir().context("the working directory has gone")?;
        Ok(Self {
            version: VERSION,
            created: Timestamp::now(),
            argv: argv.iter().map(Bytes::from).collect(),
            cwd: cwd.into_os_string().into(),
            env,
            ephemeral: false,
            changes: Changes::default(),
        })
    }
}

/// What was declared while a machine ran, to be so again when it is started again.
///
/// A list that is there replaces what was typed; one that is not leaves it as it was typed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// Host to guest, in the syntax of `-p`, with paths made absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publish: Option<Vec<Bytes>>,
    /// Guest to host, in the syntax of `-R`, with paths made absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reverse: Option<Vec<Bytes>>,
    /// Whether ports are published as they appear.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto: Option<bool>,
    /// Ports that are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclude: Option<Vec<u16>>,
    /// Shared directories, in the syntax of their option.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mounts: Option<Vec<Bytes>>,
}

/// How a machine last ended: `exit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// [`VERSION`].
    pub version: u32,
    /// When.
    pub at: Timestamp,
    /// The exit code that `mvm run` would have had.
    pub code: u8,
    /// Where the machine rather than its command came to an end: one sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Ending {
    /// The command ended with this exit code, now.
    pub fn exited(code: u8) -> Self {
        Self {
            version: VERSION,
            at: Timestamp::now(),
            code,
            error: None,
        }
    }

    /// The machine failed, now.
    pub fn failed(error: impl Into<String>) -> Self {
        Self {
            error: Some(error.into()),
            ..Self::exited(crate::FAILED)
        }
    }
}

/// Bytes that are most often text: in JSON a string where they are UTF-8, else a list of numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub Vec<u8>);

impl Bytes {
    /// The same as the operating system's kind of string.
    pub fn as_os_str(&self) -> &OsStr {
        OsStr::from_bytes(&self.0)
    }
}

impl From<OsString> for Bytes {
    fn from(text: OsString) -> Self {
        Self(text.into_vec())
    }
}

impl From<&OsString> for Bytes {
    fn from(text: &OsString) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

impl From<&str> for Bytes {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        String::from_utf8_lossy(&self.0).fmt(f)
    }
}

/// How [`Bytes`] look in JSON.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Shown<T> {
    Text(T),
    Numbers(Vec<u8>),
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(&self.0) {
            Ok(text) => Shown::Text(text),
            Err(_) => Shown::Numbers(self.0.clone()),
        }
        .serialize(to)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(match Shown::<String>::deserialize(from)? {
            Shown::Text(text) => Self(text.into_bytes()),
            Shown::Numbers(bytes) => Self(bytes),
        })
    }
}

/// A moment: in JSON as RFC 3339 has it, in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub SystemTime);

impl Timestamp {
    /// This moment.
    pub fn now() -> Self {
        Self(SystemTime::now())
    }

    /// How long ago it was; nothing where the clock was set back since.
    pub fn age(self) -> Duration {
        self.0.elapsed().unwrap_or_default()
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The format ends with the year 9999 and begins with 1970, wherever the host's clock may be.
        let latest = SystemTime::UNIX_EPOCH + Duration::from_secs(253_402_300_799);
        let shown = self.0.clamp(SystemTime::UNIX_EPOCH, latest);
        humantime::format_rfc3339_nanos(shown).fmt(f)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        humantime::parse_rfc3339(&text)
            .map(Self)
            .map_err(serde::de::Error::custom)
    }
}
