//! The machine monitor: from a [`MachineConfig`] to a running [`Machine`] on KVM.
//!
//! [`launch`] is the recipe. What depends on the processor architecture is in `arch`; devices are
//! in the `devices` crate and know nothing of KVM; `notify` joins the two by eventfds, so that
//! queue notifications and interrupts cause no exit to user space.

mod arch;
mod attach;
pub mod boot;
mod calls;
pub mod config;
mod control;
mod exit;
mod footprint;
pub mod image;
mod launch;
mod machine;
mod memory;
mod notify;
pub mod probe;
mod reach;
mod stats;
mod vcpu;
mod vm;

pub use arch::ProcessorError;
pub use arch::acpi::AcpiError;
pub use arch::layout::CALL_PORT;
pub use arch::tsc_khz;
pub use attach::AttachError;
pub use calls::{Call, Callee, Calls};
pub use config::{DiskConfig, Initrd, MachineConfig, NetConfig, TapSource, VsockConfig};
pub use control::Outcome;
pub use exit::RunError;
pub use footprint::release_program;
pub use launch::{LaunchError, Timings, launch, prepare};
pub use machine::Machine;
pub use memory::MemoryError;
pub use notify::NotifyError;
pub use reach::{GuestMemory, Reach};
pub use stats::{DiskStats, MemoryStats, NetStats, Stats, VcpuStats, VsockStats};
pub use vm::VmError;
