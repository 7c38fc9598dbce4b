//! From a vCPU's exit to the device it reaches, or to the error that ends the machine.
//!
//! Both buses are frozen before the first vCPU runs, so an access takes no lock here.

use devices::bus::Bus;
use kvm_ioctls::VcpuExit;
use thiserror::Error;

/// What the guest's accesses reach.
#[derive(Debug, Default)]
pub struct Buses {
    /// Port I/O.
    pub pio: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

/// Why a running machine ended without being asked to.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
pub enum RunError {
    /// The guest's processor shut down.
    #[error("the guest crashed with a triple fault on vCPU {vcpu}{}", at(*.rip))]
    TripleFault {
        /// The vCPU's number.
        vcpu: u8,
        /// Its instruction pointer, where KVM tells.
        rip: Option<u64>,
    },
    /// KVM gave up on an instruction or an event.
    #[error(
        "KVM stopped vCPU {vcpu} with internal error {suberror} ({}){}",
        suberror_name(*.suberror), at(*.rip)
    )]
    Internal {
        /// The vCPU's number.
        vcpu: u8,
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// Its instruction pointer, where KVM tells.
        rip: Option<u64>,
    },
    /// The hardware refused to enter the guest.
    #[error(
        "the processor refused to enter the guest on vCPU {vcpu} (hardware reason {reason:#x}){}",
        at(*.rip)
    )]
    FailEntry {
        /// The vCPU's number.
        vcpu: u8,
        /// The hardware's reason code.
        reason: u64,
        /// Its instruction pointer, where KVM tells.
        rip: Option<u64>,
    },
    /// An exit that this machine never asks for.
    #[error("vCPU {vcpu} left the guest with an exit that is not handled: {exit}{}", at(*.rip))]
    Unhandled {
        /// The vCPU's number.
        vcpu: u8,
        /// The exit's name.
        exit: String,
        /// Its instruction pointer, where KVM tells.
        rip: Option<u64>,
    },
    /// KVM_RUN itself failed.
    #[error(
        "KVM could not run vCPU {vcpu}: {}{}",
        std::io::Error::from_raw_os_error(*.errno), at(*.rip)
    )]
    Run {
        /// The vCPU's number.
        vcpu: u8,
        /// The ioctl's errno.
        errno: i32,
        /// Its instruction pointer, where KVM tells.
        rip: Option<u64>,
    },
    /// A thread of this process panicked: a bug of ours.
    #[error("the thread of vCPU {vcpu} panicked; this is a bug of the machine monitor")]
    Panicked {
        /// The vCPU's number.
        vcpu: u8,
    },
}

fn at(rip: Option<u64>) -> String {
    rip.map_or_else(String::new, |rip| format!(", at instruction {rip:#x}"))
}

/// `KVM_INTERNAL_ERROR_*` in words.
fn suberror_name(suberror: u32) -> &'static str {
    match suberror {
        1 => "an instruction that KVM cannot emulate",
        2 => "an event while another was delivered",
        3 => "an event whose delivery failed",
        4 => "an unexpected exit of the hardware",
        _ => "of a kind this program does not know",
    }
}

/// What became of an exit.
#[derive(Debug, PartialEq, Eq)]
pub enum Handled {
    /// Enter the guest again.
    Resume,
    /// The machine cannot go on.
    Fatal(Fatal),
}

/// An exit that ends the machine; [`Fatal::into_error`] adds what only the vCPU knows.
#[derive(Debug, PartialEq, Eq)]
pub enum Fatal {
    /// KVM_EXIT_SHUTDOWN.
    TripleFault,
    /// KVM_EXIT_INTERNAL_ERROR; the suberror is in `kvm_run`.
    Internal,
    /// KVM_EXIT_FAIL_ENTRY.
    FailEntry(u64),
    /// Anything else, by name.
    Unhandled(String),
}

impl Fatal {
    /// The error to report for vCPU `vcpu`.
    pub fn into_error(self, vcpu: u8, suberror: u32, rip: Option<u64>) -> RunError {
        match self {
            Self::TripleFault => RunError::TripleFault { vcpu, rip },
            Self::Internal => RunError::Internal {
                vcpu,
                suberror,
                rip,
            },
            Self::FailEntry(reason) => RunError::FailEntry { vcpu, reason, rip },
            Self::Unhandled(exit) => RunError::Unhandled { vcpu, exit, rip },
        }
    }
}

/// Carries an access to its device; names every exit that is not an access.
pub fn handle(exit: VcpuExit<'_>, buses: &Buses) -> Handled {
    match exit {
        VcpuExit::IoIn(port, data) => {
            buses.pio.read(port.into(), data);
        }
        VcpuExit::IoOut(port, data) => {
            buses.pio.write(port.into(), data);
        }
        VcpuExit::MmioRead(address, data) => {
            buses.mmio.read(address, data);
        }
        VcpuExit::MmioWrite(address, data) => {
            buses.mmio.write(address, data);
        }
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
        VcpuExit::Shutdown => return Handled::Fatal(Fatal::TripleFault),
        VcpuExit::InternalError => return Handled::Fatal(Fatal::Internal),
        VcpuExit::FailEntry(reason, _) => return Handled::Fatal(Fatal::FailEntry(reason)),
        other => return Handled::Fatal(Fatal::Unhandled(name(&other))),
    }
    Handled::Resume
}

/// What an unexpected exit is called.
fn name(exit: &VcpuExit<'_>) -> String {
    match exit {
        // 1 is KVM_SYSTEM_EVENT_SHUTDOWN, 2 a reset, 3 a crash.
        VcpuExit::SystemEvent(kind, _) => format!("system event {kind}"),
        VcpuExit::MemoryFault { gpa, size, .. } => {
            format!("a memory fault at guest address {gpa:#x}+{size:#x}")
        }
        VcpuExit::Unsupported(reason) => format!("KVM_EXIT reason {reason}"),
        VcpuExit::Unknown => "KVM_EXIT_UNKNOWN".to_owned(),
        VcpuExit::Hlt => "KVM_EXIT_HLT".to_owned(),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_to_nothing_read_all_ones_and_go_on() {
        let buses = Buses::default();
        let mut data = [0; 4];
        assert_eq!(
            handle(VcpuExit::MmioRead(0xd000_0000, &mut data), &buses),
            Handled::Resume
        );
        assert_eq!(data, [0xff; 4]);
        let mut data = [0; 2];
        assert_eq!(
            handle(VcpuExit::IoIn(0xcf8, &mut data), &buses),
            Handled::Resume
        );
        assert_eq!(data, [0xff; 2]);
        assert_eq!(handle(VcpuExit::IoOut(0x80, &[1]), &buses), Handled::Resume);
        assert_eq!(
            handle(VcpuExit::MmioWrite(u64::MAX, &[1; 8]), &buses),
            Handled::Resume
        );
    }

    #[test]
    fn every_fatal_exit_is_named_with_its_place() {
        let buses = Buses::default();
        let message = |exit| match handle(exit, &buses) {
            Handled::Fatal(fatal) => fatal.into_error(3, 1, Some(0xffff_1234)).to_string(),
            Handled::Resume => panic!("resumed"),
        };
        for (exit, word) in [
            (VcpuExit::Shutdown, "triple fault"),
            (VcpuExit::InternalError, "cannot emulate"),
            (VcpuExit::FailEntry(0x8000_0021, 0), "0x80000021"),
            (VcpuExit::Hlt, "KVM_EXIT_HLT"),
            (VcpuExit::Unknown, "KVM_EXIT_UNKNOWN"),
            (VcpuExit::Unsupported(99), "99"),
            (VcpuExit::SystemEvent(3, &[]), "system event 3"),
            (VcpuExit::TprAccess, "TprAccess"),
        ] {
            let message = message(exit);
            assert!(message.contains(word), "{message}");
            assert!(message.contains("vCPU 3"), "{message}");
            assert!(message.contains("0xffff1234"), "{message}");
        }
    }
}
