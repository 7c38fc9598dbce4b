//! The QEMU that emulates the outer Linux: finding it, and its command line.

use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use vmm::probe::host::{find_program, qemu_version};

/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// The distribution's package with the program.
pub const PACKAGE: &str = "qemu-system-x86";

/// The mount tag of the host's `/`.
pub const HOST_TAG: &str = "host";

/// The mount tag of mvm's cache directory.
pub const CACHE_TAG: &str = "cache";

/// The processor: one with AMD-V, and without XSAVE and all that takes it.
///
/// A guest's `xsetbv` does not reach the outer KVM (seen with QEMU 7.2): what CPUID then tells the guest contradicts
/// what it has enabled. Its kernel warns and does without XSAVE, but programs that only ask CPUID for AVX, as `cksum` of
/// coreutils 9.1 does, die of an illegal instruction.
const CPU: &str = "EPYC-v1,+svm,+npt,-xsave,-avx,-avx2,-fma,-f16c";

/// What the emulated machine is made of.
#[derive(Debug)]
pub struct Emulation<'a> {
    /// The outer kernel: an ELF with a PVH note, or a bzImage.
    pub kernel: &'a Path,
    /// The outer initramfs.
    pub initrd: &'a Path,
    /// The outer kernel's command line.
    pub cmdline: &'a str,
    /// Bytes of memory.
    pub memory: u64,
    /// Virtual CPUs.
    pub cpus: usize,
    /// The Unix socket of the vhost-user vsock device.
    pub vsock: &'a Path,
    /// mvm's cache directory: its files never change, so the outer Linux may cache them.
    pub cache: &'a Path,
}

/// QEMU's path, from PATH.
pub fn find() -> Option<PathBuf> {
    let path = env::var_os("PATH");
    find_program(PROGRAM, path.as_deref())
        .or_else(|| find_program(PROGRAM, Some("/usr/bin".as_ref())))
}

/// The first version whose emulated CPUs may run beside each other. Before it, one CPU could translate a
/// page of code while another changed it and go on with the old code: kernels that patch themselves
/// at run time, as KVM's users make them do, then die of a breakpoint that is there no more.
const CPUS_IN_PARALLEL: (u32, u32) = (8, 1);

/// How many of `wanted` CPUs the QEMU that is installed emulates reliably.
pub fn reliable_cpus(wanted: usize) -> usize {
    match find().and_then(|qemu| version(&qemu)) {
        Some(version) if version >= CPUS_IN_PARALLEL => wanted,
        _ => 1,
    }
}

fn version(qemu: &Path) -> Option<(u32, u32)> {
    let output = Command::new(qemu).arg("--version").output().ok()?;
    parse_version(&String::from_utf8_lossy(&output.stdout))
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = qemu_version(text)?
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

impl Emulation<'_> {
    /// QEMU's arguments. Its AMD-V is the only virtualization that its TCG emulates.
    pub fn arguments(&self) -> Vec<OsString> {
        let memory = format!(
            "memory-backend-memfd,id=memory,share=on,size={}M",
            self.memory >> 20
        );
        let mut args: Vec<OsString> = [
            "-accel",
            "tcg,thread=multi",
            "-machine",
            "q35,memory-backend=memory,usb=off,vmport=off,smbus=off,sata=off",
            "-cpu",
            CPU,
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
            "-object",
        ]
        .map(OsString::from)
        .into();
        let mut push = |words: &[&dyn AsRef<std::ffi::OsStr>]| {
            args.extend(words.iter().map(|word| word.as_ref().to_owned()));
        };
        push(&[&memory, &"-m", &format!("{}M", self.memory >> 20)]);
        push(&[&"-smp", &self.cpus.to_string()]);
        push(&[&"-kernel", &self.kernel, &"-initrd", &self.initrd]);
        push(&[&"-append", &self.cmdline]);
        push(&[
            &"-chardev",
            &option("socket,id=vsock,path=", self.vsock),
            &"-device",
            &"vhost-user-vsock-pci,chardev=vsock",
        ]);
        for (tag, path) in [(HOST_TAG, Path::new("/")), (CACHE_TAG, self.cache)] {
            push(&[
                &"-virtfs",
                &option(
                    &format!(
                        "local,id={tag},mount_tag={tag},security_model=none,multidevs=remap,path="
                    ),
                    path,
                ),
            ]);
        }
        args
    }
}

/// An option value that ends in a path; QEMU wants commas doubled.
fn option(start: &str, path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut value = start.as_bytes().to_vec();
    for &byte in path.as_os_str().as_bytes() {
        value.push(byte);
        if byte == b',' {
            value.push(byte);
        }
    }
    OsString::from_vec(value)
}

/// Becomes QEMU, bound to die with the supervisor that started this process.
///
/// The kernel keeps the death signal over exec, so it can be set here, in safe code, rather than
/// between fork and exec.
pub fn become_qemu(arguments: &[OsString]) -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .context("cannot tie QEMU's life to its supervisor's")?;
    if getppid().is_none_or(|parent| parent.is_init()) {
        bail!("the supervisor has gone");
    }
    let qemu = find().with_context(|| format!("{PROGRAM} is not there any more"))?;
    Err(Command::new(qemu).args(arguments).exec()).context("QEMU cannot be run")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright";
        assert_eq!(parse_version(debian), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert!(Some((10, 0)) > Some(CPUS_IN_PARALLEL));
        assert_eq!(parse_version("bash 5.2"), None);
    }

    #[test]
    fn a_comma_in_a_path_does_not_end_the_option() {
        assert_eq!(option("path=", Path::new("/a,b")), "path=/a,,b");
    }
}
