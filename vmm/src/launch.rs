//! The boot recipe: from a configuration to a machine whose vCPUs are ready to run.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::arch::{self, Processor, ProcessorError, acpi, layout};
use crate::attach::{self, AttachError};
use crate::boot::cmdline::{self, CmdlineError};
use crate::boot::initrd::{self, InitrdError};
use crate::boot::kernel::{self, KernelError};
use crate::boot::params::{self, ParamsError};
use crate::config::{ConfigError, MachineConfig};
use crate::control::Control;
use crate::machine::Machine;
use crate::memory::{self, MemoryError};
use crate::vcpu;
use crate::vm::{Vm, VmError};

/// Why a machine could not be launched. Nothing of it is left behind.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// The configuration is impossible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A device.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initial RAM disk.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// The kernel's command line.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// What the kernel is told.
    #[error(transparent)]
    Params(#[from] ParamsError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    /// A vCPU's registers.
    #[error(transparent)]
    Processor(#[from] ProcessorError),
    /// A thread.
    #[error("a thread of the machine could not be started")]
    Thread(#[source] io::Error),
}

/// Where the time of a launch went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// Guest memory and the VM.
    pub vm: Duration,
    /// Opening and attaching devices.
    pub devices: Duration,
    /// Kernel, initial RAM disk, command line and tables.
    pub kernel: Duration,
    /// vCPUs and their threads.
    pub vcpus: Duration,
}

impl Timings {
    /// The whole launch.
    pub fn total(&self) -> Duration {
        self.vm + self.devices + self.kernel + self.vcpus
    }
}

/// Builds the machine that `config` describes and starts its vCPUs.
pub fn launch(config: MachineConfig) -> Result<Machine, LaunchError> {
    let machine = prepare(config)?;
    machine.resume();
    Ok(machine)
}

/// Builds the machine that `config` describes; it is paused until [`Machine::resume`].
pub fn prepare(mut config: MachineConfig) -> Result<Machine, LaunchError> {
    let mut watch = Stopwatch::start();
    let mut timings = Timings::default();

    config.validate()?;
    cmdline::check(&config.cmdline)?;
    vcpu::install_kick_handler().map_err(LaunchError::Thread)?;
    let memory = memory::create(config.memory)?;
    let mut vm = Vm::new(config.cpus, &memory)?;
    timings.vm = watch.lap();

    let devices = attach::devices(&mut config, &mut vm, &memory)?;
    timings.devices = watch.lap();

    let ram_end = layout::low_ram_end(config.memory);
    let kernel = kernel::load(&memory, &config.kernel, ram_end)?;
    let initrd = match &config.initrd {
        Some(initrd) => initrd::place(&memory, initrd, kernel.end, kernel.initrd_ceiling)?,
        None => None,
    };
    cmdline::write(&memory, &config.cmdline)?;
    params::write(&memory, &kernel, &layout::memory_map(config.memory), initrd)?;
    acpi::write(&memory, config.cpus, &devices.nodes)?;
    arch::write_boot_tables(&memory, kernel.entry)?;
    timings.kernel = watch.lap();

    let vcpus = vm.create_vcpus(config.cpus)?;
    let memory_end = layout::memory_map(config.memory)
        .last()
        .map_or(0, |range| range.start + range.len);
    let processor = Processor::new(vm.kvm(), vcpus.first(), config.cpus, memory_end)?;
    for (id, vcpu) in (0..).zip(&vcpus) {
        processor.set_up_vcpu(vcpu, id, kernel.entry)?;
    }
    let control = Arc::new(Control::new());
    let mut machine = Machine::new(vm, devices, control)?;
    for (id, vcpu) in (0..).zip(vcpus) {
        machine.add_vcpu(id, vcpu)?;
    }
    timings.vcpus = watch.lap();
    machine.set_timings(timings);
    Ok(machine)
}

struct Stopwatch(Instant);

impl Stopwatch {
    fn start() -> Self {
        Self(Instant::now())
    }

    /// The time since the last lap.
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.0, now))
    }
}
