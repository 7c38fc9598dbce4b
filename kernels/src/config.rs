//! A kernel's build configuration: found, and read.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use memchr::memmem;

use crate::bzimage;
use crate::cache;
use crate::image::{self, Format};
use crate::payload::{self, MAX_VMLINUX};

/// What `CONFIG_IKCONFIG` puts around the compressed configuration.
const START: &[u8] = b"IKCFG_ST";
const END: &[u8] = b"IKCFG_ED";
/// The largest configuration that is read, in bytes. A distribution's is 260 KiB.
const MAX_CONFIG: u64 = 8 << 20;

/// Whether, and how, an option was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Setting {
    /// Not at all.
    Off,
    /// As a module.
    Module,
    /// Built into the kernel, or set to a value.
    BuiltIn,
}

/// A kernel's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    values: HashMap<String, String>,
}

impl Config {
    /// Reads the text of a `.config`. Lines that are none of its kind are passed over.
    pub fn parse(text: &str) -> Self {
        let mut values = HashMap::new();
        for line in text.lines().map(str::trim) {
            if let Some((option, value)) = line
                .strip_prefix("CONFIG_")
                .and_then(|line| line.split_once('='))
            {
                values.insert(option.to_owned(), value.to_owned());
            } else if let Some(option) = line
                .strip_prefix("# CONFIG_")
                .and_then(|line| line.strip_suffix(" is not set"))
            {
                values.insert(option.to_owned(), "n".to_owned());
            }
        }
        Self { values }
    }

    /// The value of an option, without its `CONFIG_`; None where it is not set.
    pub fn value(&self, option: &str) -> Option<&str> {
        self.values
            .get(option)
            .map(String::as_str)
            .filter(|&value| value != "n")
    }

    /// How an option was chosen, without its `CONFIG_`.
    pub fn setting(&self, option: &str) -> Setting {
        match self.value(option) {
            None => Setting::Off,
            Some("m") => Setting::Module,
            Some(_) => Setting::BuiltIn,
        }
    }

    /// The options that `wanted` sets in another way than this configuration does, sorted, as
    /// `OPTION=VALUE`. A configuration that was asked for is compared with what came of it so.
    pub fn differences(&self, wanted: &Config) -> Vec<String> {
        let mut differences: Vec<String> = wanted
            .values
            .iter()
            .filter(|(option, value)| self.value(option).unwrap_or("n") != value.as_str())
            .map(|(option, value)| format!("{option}={value}"))
            .collect();
        differences.sort();
        differences
    }
}

/// The configuration that an uncompressed kernel carries; None where it carries none.
///
/// At most 8 MiB come out, whatever the compressed data claims.
pub fn embedded(vmlinux: &[u8]) -> Option<String> {
    let mut rest = vmlinux;
    loop {
        let start = memmem::find(rest, START)?;
        rest = rest.get(start + START.len()..)?;
        // The marker also occurs in code that looks for it.
        if !rest.starts_with(b"\x1f\x8b") {
            continue;
        }
        let end = memmem::find(rest, END)?;
        let mut bytes = Vec::new();
        let read = flate2::bufread::GzDecoder::new(rest.get(..end)?)
            .take(MAX_CONFIG)
            .read_to_end(&mut bytes);
        if read.is_ok() {
            return String::from_utf8(bytes).ok();
        }
    }
}

/// The configuration of the kernel in `path`: the embedded one, else the `config-VERSION` or
/// `config` beside it, else the one in /boot or below /lib/modules for its version.
pub fn of_file(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path)
        .ok()?
        .take(MAX_VMLINUX)
        .read_to_end(&mut bytes)
        .ok()?;
    let head = bytes.get(..bytes.len().min(bzimage::HEADER_LEN))?;
    let (vmlinux, version) = match image::identify(head) {
        Ok(Format::Elf) => {
            let version = crate::elf::kernel_release(&*bytes).ok().flatten();
            (bytes, version)
        }
        Ok(Format::BzImage) => {
            let version = bzimage::SetupHeader::parse(&bytes)
                .ok()
                .and_then(|header| header.version);
            (payload::unpack(&bytes, MAX_VMLINUX).ok()?, version)
        }
        Err(_) => return None,
    };
    if let Some(text) = embedded(&vmlinux) {
        return Some(text);
    }
    let beside = path.parent()?;
    // A kernel of the cache has its configuration beside it.
    if path.file_name().is_some_and(|name| name == cache::VMLINUX)
        && let Some(text) = read(&beside.join(cache::CONFIG))
    {
        return Some(text);
    }
    let version = version?;
    [
        beside.join(format!("config-{version}")),
        Path::new("/boot").join(format!("config-{version}")),
        Path::new("/lib/modules").join(&version).join("config"),
    ]
    .iter()
    .find_map(|path| read(path))
}

/// Reads a configuration that is a file of its own.
fn read(path: &Path) -> Option<String> {
    let is_small = fs::metadata(path).ok()?.len() <= MAX_CONFIG;
    is_small.then(|| fs::read_to_string(path).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const TEXT: &str = "# Linux/x86 6.12\nCONFIG_64BIT=y\nCONFIG_FUSE_FS=m\n\
                        # CONFIG_XEN is not set\nCONFIG_NR_CPUS=256\nCONFIG_LSM=\"yama\"\n";

    fn carrier(text: &str) -> Vec<u8> {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gz.write_all(text.as_bytes()).unwrap();
        let mut bytes = b"code that says IKCFG_ST itself".to_vec();
        bytes.extend_from_slice(START);
        bytes.extend_from_slice(&gz.finish().unwrap());
        bytes.extend_from_slice(END);
        bytes.extend_from_slice(b"more code");
        bytes
    }

    #[test]
    fn settings_are_told_apart() {
        let config = Config::parse(TEXT);
        assert_eq!(config.setting("64BIT"), Setting::BuiltIn);
        assert_eq!(config.setting("FUSE_FS"), Setting::Module);
        assert_eq!(config.setting("XEN"), Setting::Off);
        assert_eq!(config.setting("NO_SUCH"), Setting::Off);
        assert_eq!(config.value("NR_CPUS"), Some("256"));
        assert_eq!(config.setting("NR_CPUS"), Setting::BuiltIn);
    }

    #[test]
    fn options_that_did_not_take_are_named() {
        let config = Config::parse(TEXT);
        let wanted = Config::parse(
            "CONFIG_64BIT=y\nCONFIG_FUSE_FS=y\nCONFIG_NEW=y\n# CONFIG_XEN is not set\n\
             # CONFIG_GONE is not set\n",
        );
        assert_eq!(config.differences(&wanted), ["FUSE_FS=y", "NEW=y"]);
    }

    #[test]
    fn an_embedded_configuration_is_found() {
        assert_eq!(embedded(&carrier(TEXT)).as_deref(), Some(TEXT));
    }

    #[test]
    fn damaged_markers_and_data_give_nothing() {
        let whole = carrier(TEXT);
        for len in 0..whole.len() - END.len() - b"more code".len() {
            assert_eq!(embedded(&whole[..len]), None, "{len} bytes");
        }
        assert_eq!(embedded(b"IKCFG_ST\x1f\x8bIKCFG_ED"), None);
        assert_eq!(embedded(b"IKCFG_ED IKCFG_ST"), None);
    }

    #[test]
    fn a_bomb_stays_small() {
        let text = " ".repeat(64 << 20);
        let found = embedded(&carrier(&text)).unwrap_or_default();
        assert!(found.len() as u64 <= MAX_CONFIG, "{}", found.len());
    }
}
