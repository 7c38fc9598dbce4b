//! Tests of kernel files: what boots, what does not and why, and what is remembered.

use super::*;
use crate::bzimage::tests::wrap;
use crate::elf::tests::kernel;

struct Fixture {
    dir: tempfile::TempDir,
    cache: Cache,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("cache")).unwrap();
        Self { dir, cache }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn unpacked(&self) -> usize {
        fs::read_dir(self.cache.root().join(UNPACKED_DIR))
            .unwrap()
            .filter(|entry| {
                let name = entry.as_ref().unwrap().file_name();
                name.to_str().unwrap().ends_with(".elf")
            })
            .count()
    }
}

fn bzimage(release: &str) -> Vec<u8> {
    let elf = kernel(release);
    let mut payload = ::zstd::stream::encode_all(&*elf, 1).unwrap();
    payload.extend_from_slice(&(elf.len() as u32).to_le_bytes());
    wrap(&payload, release)
}

#[test]
fn an_elf_kernel_is_used_where_it_is() {
    let fixture = Fixture::new();
    let path = fixture.file("vmlinux", &kernel("6.1.0-elf"));
    for _ in 0..2 {
        let bootable = bootable(&fixture.cache, &path).unwrap();
        assert_eq!(bootable.vmlinux, path);
        assert_eq!(bootable.version.as_deref(), Some("6.1.0-elf"));
    }
    assert_eq!(fixture.unpacked(), 0);
}

#[test]
fn a_bzimage_is_unpacked_once() {
    let fixture = Fixture::new();
    let path = fixture.file("vmlinuz", &bzimage("6.1.0-bz"));
    let first = bootable(&fixture.cache, &path).unwrap();
    assert_eq!(fs::read(&first.vmlinux).unwrap(), kernel("6.1.0-bz"));
    assert_eq!(first.version.as_deref(), Some("6.1.0-bz"));
    let inode = fs::metadata(&first.vmlinux).unwrap().ino();
    let second = bootable(&fixture.cache, &path).unwrap();
    assert_eq!(first, second);
    assert_eq!(
        fs::metadata(&second.vmlinux).unwrap().ino(),
        inode,
        "it was unpacked again"
    );
}

#[test]
fn a_kernel_that_was_replaced_is_unpacked_anew() {
    let fixture = Fixture::new();
    let path = fixture.file("vmlinuz", &bzimage("6.1.0"));
    bootable(&fixture.cache, &path).unwrap();
    fs::remove_file(&path).unwrap();
    let path = fixture.file("vmlinuz", &bzimage("6.2.0"));
    let bootable = bootable(&fixture.cache, &path).unwrap();
    assert_eq!(fs::read(bootable.vmlinux).unwrap(), kernel("6.2.0"));
    assert_eq!(bootable.version.as_deref(), Some("6.2.0"));
}

#[test]
fn an_unpacked_kernel_that_vanished_is_unpacked_again() {
    let fixture = Fixture::new();
    let path = fixture.file("vmlinuz", &bzimage("6.1.0"));
    let first = bootable(&fixture.cache, &path).unwrap();
    fs::remove_file(&first.vmlinux).unwrap();
    let second = bootable(&fixture.cache, &path).unwrap();
    assert_eq!(fs::read(second.vmlinux).unwrap(), kernel("6.1.0"));
}

#[test]
fn unpacked_kernels_do_not_pile_up() {
    let fixture = Fixture::new();
    for i in 0..KEPT + 3 {
        let path = fixture.file(&format!("vmlinuz-{i}"), &bzimage(&format!("6.1.{i}")));
        bootable(&fixture.cache, &path).unwrap();
    }
    assert_eq!(fixture.unpacked(), KEPT);
}

#[test]
fn every_truncated_bzimage_is_refused_and_leaves_nothing() {
    let fixture = Fixture::new();
    let image = bzimage("6.1.0");
    for len in (0..image.len()).step_by(13) {
        let path = fixture.file("vmlinuz", &image[..len]);
        assert!(bootable(&fixture.cache, &path).is_err(), "{len} bytes");
    }
    let left: Vec<String> = fs::read_dir(fixture.cache.root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with(".lock-") && name != UNPACKED_DIR)
        .collect();
    assert_eq!(left, [""; 0]);
    assert_eq!(fixture.unpacked(), 0);
}

#[test]
fn what_is_no_kernel_is_named() {
    let fixture = Fixture::new();
    let padded = |at: usize, magic: &[u8]| {
        let mut bytes = vec![0; 1024];
        bytes[at..at + magic.len()].copy_from_slice(magic);
        bytes
    };
    for (bytes, named) in [
        (Vec::new(), "empty"),
        (b"#!/bin/sh\n".to_vec(), "neither"),
        (padded(0x38, b"ARM\x64"), "aarch64"),
        (padded(0x38, b"RSC\x05"), "RISC-V"),
        (padded(0x24, &[0x18, 0x28, 0x6f, 0x01]), "32-bit Arm"),
        (padded(0, b"070701"), "cpio"),
        (padded(0, b"\x1f\x8b\x08"), "gzip"),
        (padded(0, b"MZ"), "EFI"),
        (padded(0, &[0x27, 0x05, 0x19, 0x56]), "U-Boot"),
    ] {
        let path = fixture.file("file", &bytes);
        let error = bootable(&fixture.cache, &path).unwrap_err().to_string();
        assert!(error.contains(named), "{error} does not say {named:?}");
        assert!(error.contains("file"), "{error} does not name the file");
    }
}

#[test]
fn what_is_no_file_is_refused_without_waiting() {
    let fixture = Fixture::new();
    let fifo = fixture.dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    for path in [
        fifo.as_path(),
        fixture.dir.path(),
        Path::new("/dev/zero"),
        Path::new("/dev/null"),
    ] {
        let error = bootable(&fixture.cache, path).unwrap_err();
        assert!(matches!(error, ImageError::NotAFile(_)), "{error}");
    }
    let missing = bootable(&fixture.cache, Path::new("/no/such/kernel")).unwrap_err();
    assert!(missing.to_string().contains("/no/such/kernel"), "{missing}");
}
