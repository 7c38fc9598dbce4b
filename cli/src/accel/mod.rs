//! Where machines run: on this host's KVM, or in an outer Linux that QEMU emulates.
//!
//! QEMU's TCG emulates AMD-V, so a Linux booted under it has a complete KVM of its own. The
//! outer Linux is a machine like any other to the rest of mvm: it runs the same agent, reached by
//! the same protocol over the same vsock device, which here serves QEMU over vhost-user. What a
//! user asks for is run there by this very program, on the host's files at their own paths.

pub mod client;
pub mod join;
pub mod outer;
pub mod qemu;
pub mod state;
pub mod supervisor;
pub mod tap;

use std::ffi::OsString;
use std::sync::OnceLock;

use anyhow::{Result, bail};
use vmm::probe::{self, KvmVerdict};

use crate::args::Accel;

/// Set in the environment of an mvm in the outer Linux.
pub const OUTER_VARIABLE: &str = "MVM_OUTER";

/// The first argument of a process that is to become QEMU.
const TRAMPOLINE: &str = "__qemu";

/// What was chosen.
#[derive(Debug, PartialEq, Eq)]
pub enum Choice {
    /// This host's KVM.
    Kvm,
    /// The outer Linux.
    Tcg {
        /// Why not KVM.
        reason: String,
    },
}

/// What a kernel on an emulated CPU is told, the outer one and those of machines.
///
/// An emulator does not speculate. And the kernel does without CMPXCHG16B (X86_FEATURE_CX16 is 4*32+13): after it QEMU's
/// flags are those of an older operation, in which any bit may be set (seen in 7.2, whose translator has no
/// `gen_update_cc_op` before that helper). An interrupt that comes before the next operation saves them, and its end
/// restores a pointer's bits as DF, NT and AC: the memory that is cleared next is what lies below. Linux's allocator
/// uses the instruction all the time. What programs see of it stays as it is.
pub const ON_EMULATED_CPU: &str = "mitigations=off clearcpuid=141";

/// Whether this mvm runs in the outer Linux.
pub fn is_outer() -> bool {
    std::env::var_os(OUTER_VARIABLE).is_some()
}

/// Chooses what `accel` asks for; what works, where it leaves that open.
pub fn choose(accel: Accel) -> Result<Choice> {
    if is_outer() {
        return Ok(Choice::Kvm);
    }
    match accel {
        Accel::Tcg => Ok(Choice::Tcg {
            reason: "emulation was asked for".to_owned(),
        }),
        Accel::Kvm => match verdict() {
            KvmVerdict::Works => Ok(Choice::Kvm),
            verdict => bail!("{verdict}"),
        },
        Accel::Auto => match verdict() {
            KvmVerdict::Works => Ok(Choice::Kvm),
            verdict => Ok(Choice::Tcg {
                reason: verdict.to_string(),
            }),
        },
    }
}

/// What the probe found, once a process.
fn verdict() -> &'static KvmVerdict {
    static VERDICT: OnceLock<KvmVerdict> = OnceLock::new();
    VERDICT.get_or_init(probe::kvm)
}

/// Where this process was started to become QEMU: does that, and returns only what failed.
pub fn trampoline(arguments: &[OsString]) -> Option<Result<()>> {
    match arguments {
        [_, first, rest @ ..] if first == TRAMPOLINE => Some(qemu::become_qemu(rest)),
        _ => None,
    }
}
