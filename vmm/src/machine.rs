//! A machine that was launched: how its owner watches it, talks to it, and ends it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use devices::power::{Power, PowerEvent};
use devices::serial::Serial;
use devices::virtio::balloon::BalloonHandle;
use devices::virtio::mmio::MmioTransport;
use devices::virtio::vsock::VsockHandle;
use devices::virtio::vsock::uds::VsockUds;
use kvm_ioctls::VcpuFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::attach::Devices;
use crate::calls::Calls;
use crate::control::{Control, Outcome};
use crate::exit::Buses;
use crate::launch::{LaunchError, Timings};
use crate::memory;
use crate::reach::Reach;
use crate::stats::{MemoryStats, Meters, Stats, VcpuStats, VsockStats};
use crate::vcpu;
use crate::vm::Vm;

/// A machine. All methods can be called from any thread; dropping it ends the guest at once and
/// waits for all threads and for the console's last output.
///
/// End of life, in this order: vCPUs, device workers, the power watcher, KVM, guest memory.
#[derive(Debug)]
pub struct Machine {
    control: Arc<Control>,
    buses: Option<Arc<Buses>>,
    transports: Vec<Arc<MmioTransport>>,
    serial: Option<Arc<Serial>>,
    power: Option<Arc<Power>>,
    power_watcher: Option<JoinHandle<()>>,
    vsock: Option<VsockHandle>,
    vsock_uds: Option<VsockUds>,
    balloon: Option<BalloonHandle>,
    calls: Calls,
    meters: Meters,
    timings: Timings,
    vm: Vm,
}

impl Machine {
    pub(crate) fn new(
        vm: Vm,
        devices: Devices,
        control: Arc<Control>,
    ) -> Result<Self, LaunchError> {
        let watcher =
            watch_power(devices.power_events, control.clone()).map_err(LaunchError::Thread)?;
        Ok(Self {
            control,
            buses: Some(Arc::new(devices.buses)),
            transports: devices.transports,
            serial: Some(devices.serial),
            power: Some(devices.power),
            power_watcher: Some(watcher),
            vsock: devices.vsock,
            vsock_uds: devices.vsock_uds,
            balloon: devices.balloon,
            calls: devices.calls,
            meters: devices.meters,
            timings: Timings::default(),
            vm,
        })
    }

    pub(crate) fn add_vcpu(&mut self, id: u8, vcpu: VcpuFd) -> Result<(), LaunchError> {
        let Some(buses) = &self.buses else {
            return Ok(());
        };
        let thread = vcpu::spawn(id, vcpu, buses.clone(), self.control.clone())
            .map_err(LaunchError::Thread)?;
        self.control.add_thread(thread);
        Ok(())
    }

    pub(crate) fn set_timings(&mut self, timings: Timings) {
        self.timings = timings;
    }

    /// Where the time of the launch went.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// What the machine has used so far. Fails where the host does not say how much memory that is.
    pub fn stats(&self) -> io::Result<Stats> {
        let cpu_times = self.control.cpu_times().into_iter();
        let memory = self.vm.memory();
        Ok(Stats {
            vcpus: cpu_times.map(VcpuStats::new).collect(),
            memory: MemoryStats {
                size: memory.iter().map(GuestMemoryRegion::len).sum(),
                resident: memory::resident(memory)?,
            },
            disks: self.meters.disks(),
            nets: self.meters.nets(),
            vsock: self.vsock.as_ref().map(VsockStats::of),
        })
    }

    /// Waits until the machine has ended, and tells how.
    pub fn wait(&self) -> Outcome {
        self.control.wait()
    }

    /// Waits until the machine has ended, at most for `timeout`; None when it has not.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Outcome> {
        self.control.wait_timeout(timeout)
    }

    /// Ends the machine now, whatever its guest does. Nothing where it has ended.
    pub fn stop(&self) {
        self.control.finish(Outcome::Stopped);
    }

    /// Takes all vCPUs out of the guest; returns when they have left it. Device workers go on.
    pub fn pause(&self) {
        self.control.pause();
    }

    /// Lets the vCPUs run (on).
    pub fn resume(&self) {
        self.control.resume();
    }

    /// The guest's memory, and whom it can call.
    pub fn reach(&self) -> Reach {
        Reach {
            memory: self.vm.memory().clone().into(),
            calls: self.calls.clone(),
        }
    }

    /// Opens connections into the guest and takes those it opens; None without a vsock device.
    pub fn vsock(&self) -> Option<&VsockHandle> {
        self.vsock.as_ref()
    }

    /// Asks the guest for memory and sees what it gave; None without a balloon.
    pub fn balloon(&self) -> Option<&BalloonHandle> {
        self.balloon.as_ref()
    }

    /// Presses the power button; a guest that listens shuts down and powers off.
    pub fn press_power_button(&self) -> io::Result<()> {
        match &self.power {
            Some(power) => power.press_power_button(),
            None => Ok(()),
        }
    }

    /// Gives `bytes` to the guest as input of its serial console; returns how many fitted the
    /// port's FIFO of 64 bytes. For the rest wait for [`Machine::console_room`].
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.serial.as_ref().map_or(0, |serial| serial.input(bytes))
    }

    /// Becomes readable when the guest has read all console input.
    pub fn console_room(&self) -> Option<&EventFd> {
        self.serial.as_ref().map(|serial| serial.room())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
        self.control.join();
        self.vsock_uds = None;
        for transport in &self.transports {
            transport.shutdown();
        }
        // The power devices hold the sending ends that the watcher waits on.
        self.buses = None;
        self.power = None;
        self.serial = None;
        if let Some(watcher) = self.power_watcher.take() {
            // It has no way to panic, and nothing is left to be told if it did.
            let _ = watcher.join();
        }
    }
}

/// Ends the machine when its guest powers off or resets; ends itself with the power devices.
fn watch_power(events: Receiver<PowerEvent>, control: Arc<Control>) -> io::Result<JoinHandle<()>> {
    thread::Builder::new()
        .name("power".to_owned())
        .spawn(move || {
            if let Ok(event) = events.recv() {
                control.finish(match event {
                    PowerEvent::Off => Outcome::PowerOff,
                    PowerEvent::Reset => Outcome::Reset,
                });
            }
        })
}
