//! What depends on the processor architecture: the only place that chooses one.
//!
//! Each architecture offers the same names: `layout` (addresses), `interrupts` (lines and their
//! controller), `Processor` (what every vCPU is set up with), `Entry` (how a kernel is started)
//! and `tsc_khz` (the rate of the host's cycle counter).

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("this architecture is not supported yet: add a module beside arch/x86_64");
