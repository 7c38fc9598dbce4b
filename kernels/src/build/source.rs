//! Unpacks a kernel's source package: a tar archive inside of a Debian package, read as a stream.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use super::{BuildError, io_error};
use crate::archive::{self, Limits, Member};
use crate::deb;
use crate::package::Package;
use crate::progress::{Counted, Progress, Unit};

/// The package holds the archive and a few patches.
const PACKAGE_LIMITS: Limits = Limits {
    bytes: 2 << 30,
    entries: 10_000,
};
/// Linux 6.12 has 87,000 files in 1.4 GiB.
const SOURCE_LIMITS: Limits = Limits {
    bytes: 8 << 30,
    entries: 500_000,
};

/// Parts of the source that no virtual machine needs, which are three quarters of it. Their
/// Kconfig files and makefiles are kept, because the configuration is read from all of them.
const LEFT_OUT: [&str; 17] = [
    "Documentation",
    "drivers/accel",
    "drivers/gpu",
    "drivers/iio",
    "drivers/infiniband",
    "drivers/media",
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "drivers/pinctrl",
    "drivers/scsi",
    "drivers/staging",
    "drivers/usb",
    "rust",
    "samples",
    "sound",
    "tools/perf",
    "tools/testing",
];

/// A kernel's unpacked source.
pub(super) struct Tree {
    /// Where its top-level Makefile is.
    pub(super) dir: PathBuf,
    /// When its newest file was changed: seconds since 1970-01-01 UTC.
    pub(super) modified: u64,
}

/// Unpacks the source in `package` to `dir`.
pub(super) fn unpack(
    package: &Package,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<Tree, BuildError> {
    let path = &package.file;
    let file = File::open(path).map_err(io_error(path))?;
    let len = file.metadata().map_err(io_error(path))?.len();
    let message = format!("Unpacking {}", package.name);
    progress.step(&message, Some(len), Unit::Bytes);
    let mut tree = Tree {
        dir: dir.to_owned(),
        modified: 0,
    };
    let counted = Counted::new(file, progress);
    deb::for_each_file(
        counted,
        PACKAGE_LIMITS,
        &mut |member, contents| match archive_name(&member.path) {
            Some(name) => unpack_source(&name, contents, &mut tree),
            None => Ok(()),
        },
    )
    .map_err(|source| BuildError::Deb {
        name: package.name.clone(),
        source,
    })?;
    if tree.dir.join("Makefile").is_file() {
        Ok(tree)
    } else {
        Err(BuildError::NoSource(package.name.clone()))
    }
}

/// The name of the archive with the source: `usr/src/linux-source-VERSION.tar.xz`, or the same in
/// a directory of its own.
fn archive_name(path: &Path) -> Option<String> {
    path.strip_prefix("usr/src").ok()?;
    let name = path.file_name()?.to_str()?;
    // Not the signature or the patches that may lie beside it.
    let is_archive = [".tar.xz", ".tar.zst", ".tar.gz", ".tar.bz2"]
        .iter()
        .any(|suffix| name.ends_with(suffix));
    (is_archive && name.starts_with("linux-source-")).then(|| name.to_owned())
}

fn unpack_source(name: &str, contents: &mut dyn Read, tree: &mut Tree) -> io::Result<()> {
    let data = archive::decoder(name, contents).map_err(io::Error::other)?;
    archive::for_each_file(data, SOURCE_LIMITS, &mut |member, contents| {
        let Some(path) = needed(member) else {
            return Ok(());
        };
        tree.modified = tree.modified.max(member.modified);
        archive::write_file(&tree.dir.join(path), member, contents)
    })
    .map_err(io::Error::other)
}

/// Where in the tree a file goes; None where it is not needed.
fn needed(member: &Member) -> Option<PathBuf> {
    // All names begin with the directory linux-source-VERSION.
    let path: PathBuf = member.path.components().skip(1).collect();
    let name = path.file_name()?.to_str()?;
    let is_makefile = ["Kconfig", "Makefile", "Kbuild"]
        .iter()
        .any(|prefix| name.starts_with(prefix));
    let other_architecture = path.starts_with("arch") && {
        let mut parts = path.components().skip(1);
        let architecture = parts.next();
        parts.next().is_some() && architecture != Some(Component::Normal("x86".as_ref()))
    };
    let is_left_out = other_architecture || LEFT_OUT.iter().any(|part| path.starts_with(part));
    (is_makefile || !is_left_out).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::tests::tar_of;
    use crate::deb::tests::package;
    use crate::progress::Silent;

    fn source_package(files: &[(&str, &[u8])]) -> (tempfile::TempDir, Package) {
        let tar = tar_of(files);
        let compressed = zstd::stream::encode_all(&*tar, 1).unwrap();
        let deb = package(
            &[
                ("./usr/share/doc/linux-source-6.99/copyright", b"words"),
                ("./usr/src/linux-patch-6.99-rt.patch.xz", b"patch"),
                ("./usr/src/linux-source-6.99.tar.zst", &compressed),
            ],
            "xz",
        );
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("linux-source-6.99_1_all.deb");
        std::fs::write(&file, deb).unwrap();
        let package = Package {
            name: "linux-source-6.99".to_owned(),
            version: "1".to_owned(),
            file,
        };
        (dir, package)
    }

    #[test]
    fn what_a_machine_needs_is_unpacked_and_the_rest_left_out() {
        let (dir, package) = source_package(&[
            ("linux-source-6.99/Makefile", b"all:"),
            ("linux-source-6.99/arch/Kconfig", b""),
            ("linux-source-6.99/arch/x86/kernel/head_64.S", b""),
            ("linux-source-6.99/arch/arm64/kernel/head.S", b""),
            ("linux-source-6.99/drivers/gpu/drm/Kconfig", b""),
            ("linux-source-6.99/drivers/gpu/drm/big.c", b""),
            ("linux-source-6.99/drivers/gpu.c", b""),
        ]);
        let target = dir.path().join("linux");
        let tree = unpack(&package, &target, &Silent).unwrap();
        assert_eq!(tree.dir, target);
        for (path, is_there) in [
            ("Makefile", true),
            ("arch/Kconfig", true),
            ("arch/x86/kernel/head_64.S", true),
            ("arch/arm64/kernel/head.S", false),
            ("drivers/gpu/drm/Kconfig", true),
            ("drivers/gpu/drm/big.c", false),
            ("drivers/gpu.c", true),
        ] {
            assert_eq!(target.join(path).exists(), is_there, "{path}");
        }
    }

    #[test]
    fn a_package_without_source_is_refused() {
        let (dir, package) = source_package(&[("linux-source-6.99/README", b"no Makefile")]);
        let result = unpack(&package, &dir.path().join("linux"), &Silent);
        assert!(matches!(result, Err(BuildError::NoSource(_))));
    }
}
