//! Whether this host's KVM can run a stock guest, found out by running one.
//!
//! A `/dev/kvm` that opens and answers is no proof: behind it may be a software hypervisor that
//! refuses what every kernel executes. So a tiny guest (the `guest` module) executes it here.

use std::ffi::CStr;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use kvm_ioctls::Kvm;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::{Check, Status};

const DEVICE: &CStr = c"/dev/kvm";
const DEVICE_PATH: &str = "/dev/kvm";

/// What KVM is good for on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvmVerdict {
    /// There is no KVM.
    Missing {
        /// What was found.
        detail: String,
        /// What a person can do.
        mend: String,
    },
    /// There is one, and this user may not open it.
    NotPermitted {
        /// What was found.
        detail: String,
        /// How to be let in.
        mend: String,
    },
    /// There is one, and it cannot run a stock guest.
    Unusable {
        /// Which step failed, and how.
        reason: String,
    },
    /// A guest ran and everything it executed did what it should.
    Works,
}

impl fmt::Display for KvmVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { detail, mend } | Self::NotPermitted { detail, mend } => {
                write!(f, "{detail}: {mend}")
            }
            Self::Unusable { reason } => {
                write!(f, "KVM on this host cannot run a stock guest: {reason}")
            }
            Self::Works => write!(f, "KVM runs guests"),
        }
    }
}

impl From<KvmVerdict> for Check {
    fn from(verdict: KvmVerdict) -> Self {
        match verdict {
            KvmVerdict::Works => Self::ok(KvmVerdict::Works.to_string()),
            KvmVerdict::Missing { detail, mend } | KvmVerdict::NotPermitted { detail, mend } => {
                Self::missing(detail, mend)
            }
            unusable @ KvmVerdict::Unusable { .. } => Self {
                status: Status::Missing,
                detail: unusable.to_string(),
                mend: Some("machines run under emulation here, which is slow".to_owned()),
            },
        }
    }
}

/// Finds out whether this host's KVM can run a stock guest.
///
/// Takes a few milliseconds, and a second where the guest hangs. Opens `/dev/kvm`, makes a machine
/// of 64 KiB and drops it again. A thread does the dropping, because the kernel takes longer for it
/// than for all the rest; it ends by itself some milliseconds after this returned, so a process
/// that must have one thread only (for unshare(2)) probes later, or in a child.
pub fn kvm() -> KvmVerdict {
    let device = match rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(device) => device,
        Err(Errno::ACCESS | Errno::PERM) => return not_permitted(),
        Err(error) => return missing(error),
    };
    match trial::run(into_kvm(device)) {
        Ok(()) => KvmVerdict::Works,
        Err(reason) => KvmVerdict::Unusable { reason },
    }
}

fn into_kvm(device: OwnedFd) -> Kvm {
    use std::os::fd::FromRawFd;
    // SAFETY: the descriptor is open, it is KVM's device, and nothing else owns it.
    unsafe { Kvm::from_raw_fd(device.into_raw_fd()) }
}

fn missing(error: Errno) -> KvmVerdict {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag| flags.split_ascii_whitespace().any(|word| word == flag);
    let mend = if has("vmx") {
        "load it with `sudo modprobe kvm_intel`"
    } else if has("svm") {
        "load it with `sudo modprobe kvm_amd`"
    } else {
        "this CPU offers no virtualization; enable it in the firmware, or nested virtualization \
         where this host is itself a virtual machine"
    };
    let detail = match error {
        Errno::NOENT => format!("there is no {DEVICE_PATH}"),
        error => format!(
            "{DEVICE_PATH} cannot be opened ({})",
            io::Error::from(error)
        ),
    };
    KvmVerdict::Missing {
        detail,
        mend: mend.to_owned(),
    }
}

fn not_permitted() -> KvmVerdict {
    const GROUP_READ_WRITE: u32 = 0o060;
    const RULE: &str = "echo 'KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\"' | sudo tee \
                        /etc/udev/rules.d/99-kvm.rules && sudo udevadm trigger /dev/kvm";
    let group = fs::metadata(DEVICE_PATH)
        .ok()
        .filter(|node| node.gid() != 0 && node.mode() & GROUP_READ_WRITE == GROUP_READ_WRITE)
        .and_then(|node| group_of(&fs::read_to_string("/etc/group").ok()?, node.gid()));
    let user = std::env::var("USER").unwrap_or_default();
    let (detail, mend) = match group {
        Some(group) if group.members.contains(&user) => (
            format!(
                "{DEVICE_PATH} is for the group {}, which this session does not have yet",
                group.name
            ),
            "log in again".to_owned(),
        ),
        Some(group) => (
            format!("{DEVICE_PATH} is for the group {} only", group.name),
            format!(
                "run `sudo usermod -aG {} $USER` and log in again",
                group.name
            ),
        ),
        None => (
            format!("{DEVICE_PATH} is for no group"),
            format!("run `{RULE}`, then `sudo usermod -aG kvm $USER`, and log in again"),
        ),
    };
    KvmVerdict::NotPermitted { detail, mend }
}

#[derive(Debug, PartialEq, Eq)]
struct Group {
    name: String,
    members: Vec<String>,
}

/// The group with this number in a text like /etc/group.
fn group_of(groups: &str, gid: u32) -> Option<Group> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let number = fields.nth(1)?;
        (number.parse() == Ok(gid)).then(|| Group {
            name: name.to_owned(),
            members: fields
                .next()
                .unwrap_or_default()
                .split(',')
                .map(str::to_owned)
                .collect(),
        })
    })
}

#[cfg(not(target_arch = "x86_64"))]
mod trial {
    pub(super) fn run(_: kvm_ioctls::Kvm) -> Result<(), String> {
        Ok(())
    }
}

#[cfg(target_arch = "x86_64")]
mod trial {
    //! One run of the probe guest.

    use std::sync::mpsc::{self, RecvTimeoutError};
    use std::thread::{self, JoinHandle};
    use std::time::{Duration, Instant};

    use kvm_bindings::{
        KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_userspace_memory_region,
    };
    use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
    use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

    use crate::probe::guest;

    /// How long the guest may take. It needs less than a millisecond on hardware; a busy host, or
    /// one that is emulated itself, must not be taken for a broken one.
    const PATIENCE: Duration = Duration::from_secs(1);
    /// How often a vCPU that hangs is interrupted until it notices.
    const NUDGE: Duration = Duration::from_millis(1);
    /// How long a vCPU that ignores interrupts is waited for.
    const GIVE_UP: Duration = Duration::from_secs(1);

    /// What machines here build on, besides what the trial uses.
    const NEEDED: [(Cap, &str); 5] = [
        (Cap::UserMemory, "memory slots"),
        (Cap::Irqchip, "an interrupt controller in the kernel"),
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::ImmediateExit, "immediate exits"),
    ];

    /// Runs the probe guest; the error says what KVM could not do.
    pub(super) fn run(kvm: Kvm) -> Result<(), String> {
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(format!("its interface has version {version}, not 12"));
        }
        if let Some((_, name)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(format!("it does not offer {name}"));
        }
        Trial::prepare(&kvm)?.conduct()
    }

    fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> String {
        move |error| format!("it refused to {what} ({error})")
    }

    struct Trial {
        // Declared before the memory that the machine uses, so dropped before it.
        vcpu: VcpuFd,
        _vm: VmFd,
        memory: GuestMemoryMmap,
    }

    impl Trial {
        fn prepare(kvm: &Kvm) -> Result<Self, String> {
            let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), guest::MEMORY_LEN)])
                .map_err(|error| format!("no memory could be had for a trial ({error})"))?;
            guest::load(&memory).map_err(|error| error.to_string())?;
            let vm = kvm.create_vm().map_err(refused("make a machine"))?;
            for (slot, region) in (0..).zip(memory.iter()) {
                let slot = kvm_userspace_memory_region {
                    slot,
                    flags: 0,
                    guest_phys_addr: region.start_addr().0,
                    memory_size: region.len(),
                    userspace_addr: region.as_ptr() as u64,
                };
                // SAFETY: the region is mapped for as long as `memory` lives, and `Trial` drops
                // the machine before it.
                unsafe { vm.set_user_memory_region(slot) }.map_err(refused("take memory"))?;
            }
            let vcpu = vm.create_vcpu(0).map_err(refused("make a vCPU"))?;
            let cpuid = kvm
                .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
                .map_err(refused("tell its CPUID"))?;
            vcpu.set_cpuid2(&cpuid)
                .map_err(refused("take its own CPUID"))?;
            let mut sregs = vcpu.get_sregs().map_err(refused("show registers"))?;
            guest::set_long_mode(&mut sregs);
            vcpu.set_sregs(&sregs)
                .map_err(refused("enter 64-bit mode"))?;
            let regs = kvm_regs {
                rip: guest::CODE,
                rsp: guest::STACK_TOP,
                rflags: 2,
                ..Default::default()
            };
            vcpu.set_regs(&regs).map_err(refused("take registers"))?;
            Ok(Self {
                vcpu,
                _vm: vm,
                memory,
            })
        }

        /// Runs the guest on a thread of its own, which is interrupted where it takes too long.
        fn conduct(self) -> Result<(), String> {
            let signal = SIGRTMIN() + 1;
            register_signal_handler(signal, ignore)
                .map_err(|error| format!("its vCPU could not be bounded in time ({error})"))?;
            let (done, outcome) = mpsc::channel();
            let thread = thread::Builder::new()
                .name("kvm-probe".to_owned())
                .spawn(move || {
                    let mut trial = self;
                    // The receiver may have given up: then nobody wants to know.
                    let _ = done.send(trial.outcome());
                })
                .map_err(|error| format!("its vCPU got no thread ({error})"))?;
            match outcome.recv_timeout(PATIENCE) {
                Ok(outcome) => outcome,
                Err(RecvTimeoutError::Disconnected) => Err("its vCPU thread died".to_owned()),
                Err(RecvTimeoutError::Timeout) => {
                    interrupt(&thread, signal, &outcome);
                    Err("a guest of a hundred instructions did not end within a second".to_owned())
                }
            }
        }

        fn outcome(&mut self) -> Result<(), String> {
            let failure = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(guest::REPORT_PORT, &[guest::PASSED])) => return Ok(()),
                Ok(VcpuExit::IoOut(guest::REPORT_PORT, &[guest::WRONG_RESULT])) => {
                    "gave a wrong result".to_owned()
                }
                Ok(VcpuExit::IoOut(guest::REPORT_PORT, &[guest::UNEXPECTED_EXCEPTION])) => {
                    "raised an exception".to_owned()
                }
                Ok(VcpuExit::InternalError) => {
                    "is not emulated (KVM_EXIT_INTERNAL_ERROR)".to_owned()
                }
                Ok(VcpuExit::Shutdown) => "ended in a triple fault".to_owned(),
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    format!("failed at the entry (hardware reason {reason:#x})")
                }
                Ok(exit) => format!("ended in an unexpected exit ({exit:?})"),
                Err(error) => format!("failed ({error})"),
            };
            let step: u8 = self
                .memory
                .read_obj(GuestAddress(guest::STEP_BYTE))
                .map_err(|error| error.to_string())?;
            let step = guest::STEPS
                .get(usize::from(step))
                .unwrap_or(&"an unknown step");
            Err(format!("{step} {failure}"))
        }
    }

    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

    /// Interrupts the vCPU until its thread ends. A signal that comes just before KVM_RUN is
    /// lost, hence more than one.
    fn interrupt<T>(thread: &JoinHandle<()>, signal: libc::c_int, ended: &mpsc::Receiver<T>) {
        let deadline = Instant::now() + GIVE_UP;
        while Instant::now() < deadline {
            // Fails only when the thread is gone, and then the channel says so.
            let _ = thread.kill(signal);
            if !matches!(ended.recv_timeout(NUDGE), Err(RecvTimeoutError::Timeout)) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_group_is_found_by_its_number() {
        let groups = "root:x:0:\nkvm:x:104:ada,grace\nbad line\nmore:x:1040:\n";
        let group = group_of(groups, 104).unwrap();
        assert_eq!(group.name, "kvm");
        assert_eq!(group.members, ["ada", "grace"]);
        assert_eq!(group_of(groups, 1040).unwrap().name, "more");
        assert_eq!(group_of(groups, 1), None);
    }

    /// What the verdict is depends on the host; that there is one, with a reason, does not.
    #[test]
    fn the_host_gets_a_verdict_that_a_person_can_read() {
        let before = Instant::now();
        let verdict = kvm();
        println!("{verdict:?}\n{verdict} ({:?})", before.elapsed());
        assert!(!verdict.to_string().is_empty());
        assert_eq!(verdict, kvm(), "the verdict changes");
        if verdict != KvmVerdict::Works {
            let check = Check::from(verdict);
            assert_eq!(check.status, Status::Missing);
            assert!(check.mend.is_some_and(|mend| !mend.is_empty()));
        }
    }
}
