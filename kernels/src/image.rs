//! Kernel files as users have them: told apart, and turned into an ELF file that can be mapped.
//!
//! An ELF kernel is used where it is. The kernel of a bzImage is unpacked into the cache once;
//! the next time, the file's identity (device, inode, size, times) leads to it without reading
//! the file again.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::bzimage::{self, SetupHeader};
use crate::cache::{self, Cache, CacheError};
use crate::elf::{self, ElfError};
use crate::payload::{self, MAX_VMLINUX, PayloadError};

/// The largest kernel file that is read, in bytes.
const MAX_IMAGE: u64 = MAX_VMLINUX;
/// Unpacked kernels that are kept; the one not used for longest goes first.
const KEPT: usize = 16;
const MAX_KEY_FILE: u64 = 4 << 10;
const UNPACKED_DIR: &str = "unpacked";

/// Why a file is no kernel that a machine can boot.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file cannot be used.
    #[error("the kernel {path} cannot be {action}")]
    Io {
        /// What was tried: "opened", "read", …
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is a directory, a device or the like.
    #[error("the kernel {0} is not a regular file")]
    NotAFile(PathBuf),
    /// It begins like no kernel.
    #[error("{path} is not a kernel that a machine can boot: {what}")]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// It is an ELF file, and unsuitable.
    #[error("{path} is not a kernel that a machine can boot: {source}")]
    Elf {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ElfError,
    },
    /// It is a bzImage, and its kernel does not come out.
    #[error("the kernel {path} cannot be unpacked: {source}")]
    Payload {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: PayloadError,
    },
    /// There is no room for the unpacked kernel.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl ImageError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// A kernel that can be mapped and booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bootable {
    /// The uncompressed ELF kernel.
    pub vmlinux: PathBuf,
    /// The release that `uname -r` will print, where the kernel names one.
    pub version: Option<String>,
}

/// The kinds of file that hold a kernel for a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// An uncompressed 64-bit ELF `vmlinux`.
    Elf,
    /// An x86 bzImage (`vmlinuz`).
    BzImage,
}

/// What a file that begins with `head` ([`bzimage::HEADER_LEN`] bytes of it) is.
///
/// # Errors
/// What it is instead of a kernel for a machine.
pub fn identify(head: &[u8]) -> Result<Format, &'static str> {
    let at = |offset: usize, magic: &[u8]| {
        head.get(offset..)
            .is_some_and(|rest| rest.starts_with(magic))
    };
    if at(0, b"\x7fELF") {
        Ok(Format::Elf)
    } else if SetupHeader::is_present(head) {
        Ok(Format::BzImage)
    } else if at(0x38, b"ARM\x64") {
        Err("it is an aarch64 Image; a machine needs an x86_64 kernel")
    } else if at(0x38, b"RSC\x05") {
        Err("it is a RISC-V Image; a machine needs an x86_64 kernel")
    } else if at(0x24, &[0x18, 0x28, 0x6f, 0x01]) {
        Err("it is a 32-bit Arm zImage; a machine needs an x86_64 kernel")
    } else if at(4, b"zimg") {
        Err("it is a compressed EFI image of another architecture")
    } else if at(0, b"\x27\x05\x19\x56") {
        Err("it is a U-Boot image")
    } else if at(0, b"\x1f\x8b") {
        Err("it is gzip data, which holds an aarch64 kernel or an initrd; gunzip it to see")
    } else if at(0, b"0707") {
        Err("it is a cpio archive, which is an initrd (--initrd)")
    } else if at(0, b"MZ") {
        Err("it is an EFI program without a Linux boot header")
    } else if head.is_empty() {
        Err("it is empty")
    } else {
        Err("it is neither an ELF file nor a bzImage")
    }
}

/// Makes sure that `path` is a kernel for a machine, and unpacks it into `cache` where need be.
///
/// # Errors
/// One sentence that says what the file is instead.
pub fn bootable(cache: &Cache, path: &Path) -> Result<Bootable, ImageError> {
    let (mut file, metadata) = open(path)?;
    let head = read_head(&mut file, path)?;
    let format = identify(&head).map_err(|what| ImageError::NotAKernel {
        path: path.to_owned(),
        what,
    })?;
    if format == Format::Elf {
        elf::check_kernel(&file, metadata.len()).map_err(|source| ImageError::Elf {
            path: path.to_owned(),
            source,
        })?;
    }
    let unpacked = Unpacked::open(cache)?;
    let key = Key::of(&metadata);
    if let Some(known) = unpacked.known(&key) {
        return Ok(match known.vmlinux {
            Some(vmlinux) => Bootable {
                vmlinux,
                version: known.version,
            },
            None => Bootable {
                vmlinux: path.to_owned(),
                version: known.version,
            },
        });
    }
    match format {
        Format::Elf => {
            let file = File::open(path).map_err(ImageError::io("opened", path))?;
            let version = elf::kernel_release(file).map_err(ImageError::io("read", path))?;
            // Without it the next look only takes as long as this one.
            if let Err(error) = unpacked.remember(&key, None, version.as_deref()) {
                tracing::warn!("{error}");
            }
            Ok(Bootable {
                vmlinux: path.to_owned(),
                version,
            })
        }
        Format::BzImage => {
            let mut image = head;
            (&mut file)
                .take(MAX_IMAGE)
                .read_to_end(&mut image)
                .map_err(ImageError::io("read", path))?;
            unpacked.unpack(&key, &image, path)
        }
    }
}

/// Unpacks or copies the kernel in the file `path` to `target`, and returns its release.
///
/// # Errors
/// As [`bootable`].
pub fn extract(path: &Path, target: &Path) -> Result<Option<String>, ImageError> {
    let (mut file, metadata) = open(path)?;
    let head = read_head(&mut file, path)?;
    let format = identify(&head).map_err(|what| ImageError::NotAKernel {
        path: path.to_owned(),
        what,
    })?;
    let mut out = File::create_new(target).map_err(ImageError::io("written", target))?;
    match format {
        Format::Elf => {
            elf::check_kernel(&file, metadata.len()).map_err(|source| ImageError::Elf {
                path: path.to_owned(),
                source,
            })?;
            let mut whole = head.as_slice().chain(file.take(MAX_IMAGE));
            io::copy(&mut whole, &mut out).map_err(ImageError::io("copied", path))?;
            let copy = File::open(target).map_err(ImageError::io("read", target))?;
            elf::kernel_release(copy).map_err(ImageError::io("read", target))
        }
        Format::BzImage => {
            let mut image = head;
            file.take(MAX_IMAGE)
                .read_to_end(&mut image)
                .map_err(ImageError::io("read", path))?;
            unpack_checked(&image, &mut out, path)?;
            Ok(SetupHeader::parse(&image).ok().and_then(|h| h.version))
        }
    }
}

/// Opens a kernel file without being held up by what is no regular file.
fn open(path: &Path) -> Result<(File, fs::Metadata), ImageError> {
    let file = File::options()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(path)
        .map_err(ImageError::io("opened", path))?;
    let metadata = file.metadata().map_err(ImageError::io("read", path))?;
    if metadata.is_file() {
        Ok((file, metadata))
    } else {
        Err(ImageError::NotAFile(path.to_owned()))
    }
}

fn read_head(file: &mut File, path: &Path) -> Result<Vec<u8>, ImageError> {
    let mut head = Vec::new();
    file.take(bzimage::HEADER_LEN as u64)
        .read_to_end(&mut head)
        .map_err(ImageError::io("read", path))?;
    Ok(head)
}

/// Unpacks a bzImage into `out` and checks that what came out can be booted.
fn unpack_checked(image: &[u8], out: &mut File, path: &Path) -> Result<(), ImageError> {
    let len =
        payload::unpack_into(image, out, MAX_VMLINUX).map_err(|source| ImageError::Payload {
            path: path.to_owned(),
            source,
        })?;
    let file = out.try_clone().map_err(ImageError::io("read", path))?;
    elf::check_kernel(&file, len).map_err(|source| ImageError::Elf {
        path: path.to_owned(),
        source,
    })
}

/// What identifies a file's contents without reading them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key(String);

impl Key {
    fn of(metadata: &fs::Metadata) -> Self {
        Self(format!(
            "{:x}-{:x}-{:x}-{:x}.{:x}-{:x}.{:x}",
            metadata.dev(),
            metadata.ino(),
            metadata.len(),
            metadata.mtime(),
            metadata.mtime_nsec(),
            metadata.ctime(),
            metadata.ctime_nsec(),
        ))
    }
}

/// What is known of a file from an earlier look at it.
struct Known {
    /// Its unpacked kernel; None where the file is one already.
    vmlinux: Option<PathBuf>,
    version: Option<String>,
}

/// A key's file.
#[derive(Serialize, Deserialize)]
struct KeyFile {
    /// The name of the unpacked kernel.
    vmlinux: Option<String>,
    version: Option<String>,
}

/// The directory of unpacked kernels: `DIGEST.elf` files, and a `KEY.json` for each file that was
/// looked at. Both appear by renaming.
struct Unpacked<'a> {
    cache: &'a Cache,
    dir: PathBuf,
}

impl<'a> Unpacked<'a> {
    fn open(cache: &'a Cache) -> Result<Self, CacheError> {
        let dir = cache.side_dir(UNPACKED_DIR)?;
        Ok(Self { cache, dir })
    }

    fn known(&self, key: &Key) -> Option<Known> {
        let mut text = Vec::new();
        File::open(self.dir.join(format!("{}.json", key.0)))
            .ok()?
            .take(MAX_KEY_FILE)
            .read_to_end(&mut text)
            .ok()?;
        let entry: KeyFile = serde_json::from_slice(&text).ok()?;
        let Some(name) = entry.vmlinux else {
            return Some(Known {
                vmlinux: None,
                version: entry.version,
            });
        };
        let name = Path::new(&name).file_name()?;
        let path = self.dir.join(name);
        // Its time says when it was last used; that it is there is what opening it shows.
        let file = File::open(&path).ok()?;
        let _ = file.set_modified(SystemTime::now());
        Some(Known {
            vmlinux: Some(path),
            version: entry.version,
        })
    }

    fn unpack(&self, key: &Key, image: &[u8], path: &Path) -> Result<Bootable, ImageError> {
        let _guard = self.cache.exclusive("unpack")?;
        let stage = self.cache.stage()?;
        let staged = stage.path().join(cache::VMLINUX);
        let mut out = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&staged)
            .map_err(ImageError::io("unpacked to", &staged))?;
        unpack_checked(image, &mut out, path)?;
        out.sync_all()
            .map_err(ImageError::io("unpacked to", &staged))?;
        let name = format!("{}.elf", cache::digest(&staged)?);
        let vmlinux = self.dir.join(&name);
        fs::rename(&staged, &vmlinux).map_err(ImageError::io("moved to", &vmlinux))?;
        let version = SetupHeader::parse(image).ok().and_then(|h| h.version);
        self.remember(key, Some(&name), version.as_deref())?;
        self.forget_old();
        Ok(Bootable { vmlinux, version })
    }

    fn remember(
        &self,
        key: &Key,
        vmlinux: Option<&str>,
        version: Option<&str>,
    ) -> Result<(), CacheError> {
        let target = self.dir.join(format!("{}.json", key.0));
        let entry = KeyFile {
            vmlinux: vmlinux.map(str::to_owned),
            version: version.map(str::to_owned),
        };
        let text = serde_json::to_vec(&entry).map_err(|source| CacheError::Metadata {
            path: target.clone(),
            source,
        })?;
        let stage = self.cache.stage()?;
        let staged = stage.path().join("key");
        let mut file = File::create_new(&staged).map_err(CacheError::io("making", &staged))?;
        file.write_all(&text)
            .map_err(CacheError::io("writing", &staged))?;
        fs::rename(&staged, &target).map_err(CacheError::io("making", &target))
    }

    /// Removes what was not used for longest, so that the directory does not grow without end.
    fn forget_old(&self) {
        for (suffix, kept) in [(".elf", KEPT), (".json", 16 * KEPT)] {
            let Ok(entries) = fs::read_dir(&self.dir) else {
                return;
            };
            let mut files: Vec<(SystemTime, PathBuf)> = entries
                .flatten()
                .filter(|entry| {
                    entry
                        .file_name()
                        .as_encoded_bytes()
                        .ends_with(suffix.as_bytes())
                })
                .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
                .collect();
            files.sort_by(|a, b| b.cmp(a));
            for (_, path) in files.iter().skip(kept) {
                if let Err(error) = fs::remove_file(path) {
                    tracing::warn!("{} is left behind: {error}", path.display());
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
