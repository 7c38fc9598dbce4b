//! Debian binary packages: an `ar` archive whose member `data.tar.*` holds the files.
//!
//! Specification: deb(5).

use std::io::{self, Read};

use thiserror::Error;

use crate::archive::{self, ArchiveError, Limits, Visitor};

/// Members that are looked at; a package has three, and a few more where it is signed.
const MAX_MEMBERS: usize = 16;

/// Why a package could not be unpacked.
#[derive(Debug, Error)]
pub enum DebError {
    /// The outer archive is damaged.
    #[error("the package is damaged, or no Debian package")]
    Ar(#[source] io::Error),
    /// The package has no files.
    #[error("the package holds no data.tar")]
    NoData,
    /// The inner archive is damaged or hostile.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
}

/// Calls `visit` for each regular file of the package; see [`archive::for_each_file`].
///
/// # Errors
/// What is wrong with the package, or what `visit` returned.
pub fn for_each_file(
    deb: impl Read,
    limits: Limits,
    visit: &mut Visitor<'_>,
) -> Result<(), DebError> {
    let mut members = ar::Archive::new(deb);
    for _ in 0..MAX_MEMBERS {
        let Some(member) = members.next_entry() else {
            break;
        };
        let mut member = member.map_err(DebError::Ar)?;
        let name = String::from_utf8_lossy(member.header().identifier())
            .trim_end_matches('/')
            .to_owned();
        if !name.starts_with("data.tar") {
            continue;
        }
        let data = archive::decoder(&name, &mut member)?;
        archive::for_each_file(data, limits, visit)?;
        return Ok(());
    }
    Err(DebError::NoData)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use super::*;
    use crate::archive::tests::tar_of;

    const LIMITS: Limits = Limits {
        bytes: 1 << 20,
        entries: 100,
    };

    /// A package that holds `files`, compressed as `suffix` says.
    pub(crate) fn package(files: &[(&str, &[u8])], suffix: &str) -> Vec<u8> {
        let tar = tar_of(files);
        let data = match suffix {
            "xz" => {
                let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
                encoder.write_all(&tar).unwrap();
                encoder.finish().unwrap()
            }
            "zst" => zstd::stream::encode_all(&*tar, 1).unwrap(),
            "gz" => {
                let mut encoder =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(&tar).unwrap();
                encoder.finish().unwrap()
            }
            _ => tar,
        };
        let mut builder = ar::Builder::new(Vec::new());
        let mut member = |name: String, bytes: &[u8]| {
            let header = ar::Header::new(name.into_bytes(), bytes.len() as u64);
            builder.append(&header, bytes).unwrap();
        };
        member("debian-binary".to_owned(), b"2.0\n");
        member("control.tar.xz".to_owned(), b"not looked at");
        let dot = if suffix.is_empty() { "" } else { "." };
        member(format!("data.tar{dot}{suffix}"), &data);
        builder.into_inner().unwrap()
    }

    fn names(deb: &[u8]) -> Result<Vec<String>, DebError> {
        let mut names = Vec::new();
        for_each_file(deb, LIMITS, &mut |member, contents| {
            let mut text = String::new();
            contents.read_to_string(&mut text)?;
            names.push(format!("{} {} {text}", member.path.display(), member.size));
            Ok(())
        })?;
        Ok(names)
    }

    #[test]
    fn each_compression_of_a_package_is_read() {
        for suffix in ["xz", "zst", "gz", ""] {
            let deb = package(&[("./boot/a", b"one"), ("./lib/b", b"three")], suffix);
            assert_eq!(
                names(&deb).unwrap(),
                ["boot/a 3 one", "lib/b 5 three"],
                "{suffix}"
            );
        }
    }

    #[test]
    fn a_truncated_package_is_refused() {
        let deb = package(&[("./boot/a", &[7; 5000])], "xz");
        for len in (0..deb.len() - 1).step_by(7) {
            assert!(names(&deb[..len]).is_err(), "{len} of {} bytes", deb.len());
        }
    }

    #[test]
    fn a_compression_that_is_not_known_is_named() {
        let deb = package(&[("./boot/a", b"one")], "br");
        let error = names(&deb).unwrap_err();
        assert!(error.to_string().contains("data.tar.br"), "{error}");
    }

    #[test]
    fn what_is_no_package_is_refused() {
        for bytes in [&b""[..], b"!<arch>\n", b"\x7fELF", b"!<arch>\ngarbage"] {
            assert!(names(bytes).is_err(), "{bytes:?}");
        }
    }
}
