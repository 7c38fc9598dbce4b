//! From a machine's configuration to its devices: each opened, placed on a bus, joined to KVM.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};

use devices::bus::{BusDevice, BusError};
use devices::power::{I8042, I8042_LEN, I8042_PORT, POWER_LEN, Power, PowerEvent};
use devices::serial::{COM1_IRQ, COM1_LEN, COM1_PORT, Serial};
use devices::virtio::VirtioDevice;
use devices::virtio::balloon::{Balloon, BalloonConfig, BalloonHandle};
use devices::virtio::block::disk::{DiskError, open_image};
use devices::virtio::block::{Block, BlockConfig, BlockError};
use devices::virtio::mmio::{MMIO_SIZE, MmioTransport, PAGE_OFFSET};
use devices::virtio::net::{self, Net, NetError, Tap, TapError};
use devices::virtio::rng::Rng;
use devices::virtio::vsock::uds::{UdsError, VsockUds};
use devices::virtio::vsock::{self, Vsock, VsockHandle};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

use crate::arch::acpi::VirtioNode;
use crate::arch::{interrupts, layout};
use crate::calls::Calls;
use crate::config::{DiskConfig, MachineConfig, NetConfig, TapSource, VsockConfig};
use crate::exit::Buses;
use crate::notify::{self, NotifyError};
use crate::stats::Meters;
use crate::vm::Vm;

/// Queues of a disk: one for each vCPU up to here; each has a thread of its own.
const MAX_DISK_QUEUES: u16 = 8;

/// Why a device could not be attached.
#[derive(Debug, Error)]
pub enum AttachError {
    /// It could not be made.
    #[error("the machine's {device} could not be made")]
    Make {
        /// What it is.
        device: String,
        /// Why.
        source: io::Error,
    },
    /// Its place is taken.
    #[error("the machine's {device} has no place on its bus")]
    Place {
        /// What it is.
        device: String,
        /// Why.
        source: BusError,
    },
    /// A disk image cannot be used.
    #[error(transparent)]
    Image(#[from] DiskError),
    /// The Unix socket of the vsock device cannot be offered.
    #[error(transparent)]
    VsockUds(#[from] UdsError),
    /// A TAP interface cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A network card cannot be made on its TAP interface.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A disk cannot be made of its image.
    #[error("the disk {} cannot be attached", path.display())]
    Disk {
        /// The image.
        path: PathBuf,
        /// Why.
        source: BlockError,
    },
    /// No interrupt line is left.
    #[error("the machine has more devices than the {max} it has interrupt lines for")]
    TooMany {
        /// How many fit.
        max: usize,
    },
    /// KVM refused an eventfd.
    #[error("the machine's {device} could not be joined to KVM")]
    Notify {
        /// What it is.
        device: String,
        /// Why.
        source: NotifyError,
    },
}

/// All devices of a machine.
#[derive(Debug)]
pub struct Devices {
    /// What vCPUs reach.
    pub buses: Buses,
    /// What the ACPI tables say of the virtio devices.
    pub nodes: Vec<VirtioNode>,
    /// The virtio transports, to be shut down at the end.
    pub transports: Vec<Arc<MmioTransport>>,
    /// The console.
    pub serial: Arc<Serial>,
    /// Power switch and button.
    pub power: Arc<Power>,
    /// What the guest asks of its power switch.
    pub power_events: Receiver<PowerEvent>,
    /// The way to the guest's sockets, where there is a vsock device.
    pub vsock: Option<VsockHandle>,
    /// The Unix socket that leads there, held for as long as it is offered.
    pub vsock_uds: Option<VsockUds>,
    /// The hold on the guest's balloon, where there is one.
    pub balloon: Option<BalloonHandle>,
    /// Whom the guest can call.
    pub calls: Calls,
    /// What the devices have done.
    pub meters: Meters,
}

/// Makes the devices that `config` asks for; takes the console and the network card out of it.
pub fn devices(
    config: &mut MachineConfig,
    vm: &mut Vm,
    memory: &GuestMemoryMmap,
) -> Result<Devices, AttachError> {
    let mut board = Board::new(vm, memory);
    let (serial, power, power_events) = board.add_platform(config)?;
    for disk in &config.disks {
        board.add_disk(disk, config.cpus)?;
    }
    if let Some(net) = config.net.take() {
        board.add_net(net)?;
    }
    let (vsock, vsock_uds) = match &config.vsock {
        Some(vsock) => board.add_vsock(vsock)?,
        None => (None, None),
    };
    if config.rng {
        board.add_virtio("entropy device", Box::new(Rng::new()))?;
    }
    let balloon = match config.balloon {
        true => Some(board.add_balloon()?),
        false => None,
    };
    Ok(Devices {
        buses: board.buses,
        nodes: board.nodes,
        transports: board.transports,
        serial,
        power,
        power_events,
        vsock,
        vsock_uds,
        balloon,
        calls: board.calls,
        meters: board.meters,
    })
}

/// A machine whose devices are being placed.
struct Board<'a> {
    vm: &'a mut Vm,
    memory: &'a GuestMemoryMmap,
    buses: Buses,
    nodes: Vec<VirtioNode>,
    transports: Vec<Arc<MmioTransport>>,
    calls: Calls,
    meters: Meters,
}

type Sockets = (Option<VsockHandle>, Option<VsockUds>);
type Platform = (Arc<Serial>, Arc<Power>, Receiver<PowerEvent>);

impl<'a> Board<'a> {
    fn new(vm: &'a mut Vm, memory: &'a GuestMemoryMmap) -> Self {
        Self {
            vm,
            memory,
            buses: Buses::default(),
            nodes: Vec::new(),
            transports: Vec::new(),
            calls: Calls::default(),
            meters: Meters::default(),
        }
    }

    /// COM1, the power registers, the keyboard controller's reset line, and the port of calls.
    fn add_platform(&mut self, config: &mut MachineConfig) -> Result<Platform, AttachError> {
        let output = config
            .console
            .take()
            .unwrap_or_else(|| Box::new(io::sink()));
        let irq = self.line("serial port", COM1_IRQ)?;
        let serial = Serial::new(irq, output).map_err(make("serial port"))?;
        let serial = Arc::new(serial);
        self.add_port("serial port", COM1_PORT, COM1_LEN, serial.clone())?;

        let (sender, events) = mpsc::channel();
        let irq = self.line("power button", interrupts::GED_GSI)?;
        let power = Arc::new(Power::new(irq, sender.clone()));
        self.add_port("power switch", layout::POWER_PORT, POWER_LEN, power.clone())?;
        let i8042 = Arc::new(I8042::new(sender));
        self.add_port("keyboard controller", I8042_PORT, I8042_LEN, i8042)?;
        let (port, calls) = (layout::CALL_PORT.into(), Arc::new(self.calls.clone()));
        self.add_port("call port", port, layout::CALL_PORTS, calls)?;
        Ok((serial, power, events))
    }

    fn add_disk(&mut self, disk: &DiskConfig, cpus: u8) -> Result<(), AttachError> {
        let file = open_image(&disk.path, disk.read_only)?;
        let block = Block::new(BlockConfig {
            file,
            read_only: disk.read_only,
            serial: disk.serial.clone(),
            queues: u16::from(cpus).min(MAX_DISK_QUEUES),
        })
        .map_err(|source| AttachError::Disk {
            path: disk.path.clone(),
            source,
        })?;
        self.meters.disks.push(block.stats());
        self.add_virtio("disk", Box::new(block))
    }

    fn add_net(&mut self, config: NetConfig) -> Result<(), AttachError> {
        let net = Net::new(net::NetConfig {
            tap: match config.tap {
                TapSource::Interface(name) => Tap::open(&name, config.queue_pairs)?,
                TapSource::Socket { socket, mtu } => Tap::from_sockets(vec![socket], mtu),
            },
            mac: Some(config.mac),
            queue_pairs: config.queue_pairs,
        })?;
        self.meters.nets.push(net.counters());
        self.add_virtio("network card", Box::new(net))
    }

    /// A balloon that is not inflated until the owner of the machine asks for it.
    fn add_balloon(&mut self) -> Result<BalloonHandle, AttachError> {
        let (balloon, handle) = Balloon::new(BalloonConfig {
            target_mib: 0,
            deflate_on_oom: true,
            free_page_reporting: true,
        });
        self.add_virtio("balloon", Box::new(balloon))?;
        Ok(handle)
    }

    fn add_vsock(&mut self, config: &VsockConfig) -> Result<Sockets, AttachError> {
        let (vsock, handle) =
            Vsock::new(vsock::VsockConfig::new(config.cid)).map_err(make("vsock device"))?;
        self.add_virtio("vsock device", Box::new(vsock))?;
        let uds = match &config.uds {
            Some(path) => Some(VsockUds::bind(path, handle.clone())?),
            None => None,
        };
        Ok((Some(handle), uds))
    }

    fn line(&self, device: &str, gsi: u32) -> Result<vmm_sys_util::eventfd::EventFd, AttachError> {
        notify::interrupt_line(self.vm.fd(), gsi).map_err(joined(device))
    }

    fn add_port(
        &mut self,
        name: &str,
        port: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), AttachError> {
        self.buses
            .pio
            .insert(port, len, device)
            .map_err(placed(name))
    }

    /// Puts a virtio device behind the next free registers and interrupt line.
    fn add_virtio(&mut self, name: &str, device: Box<dyn VirtioDevice>) -> Result<(), AttachError> {
        let index = self.nodes.len() as u32;
        let gsi = interrupts::VIRTIO_GSI_FIRST + index;
        if gsi > interrupts::GSI_LAST {
            return Err(AttachError::TooMany {
                max: self.nodes.len(),
            });
        }
        let address = layout::virtio_mmio(index);
        let line = self.line(name, gsi)?;
        let transport = MmioTransport::new(device, self.memory.clone(), line)
            .map_err(make(name))
            .map(Arc::new)?;
        self.vm
            .show(address - PAGE_OFFSET, transport.page().clone());
        notify::queue_notifications(self.vm.fd(), address, transport.kicks())
            .map_err(joined(name))?;
        notify::acknowledgements(self.vm.fd(), address).map_err(joined(name))?;
        self.buses
            .mmio
            .insert(address, MMIO_SIZE, transport.clone())
            .map_err(placed(name))?;
        self.transports.push(transport);
        self.nodes.push(VirtioNode {
            address: address as u32,
            len: MMIO_SIZE as u32,
            gsi,
        });
        Ok(())
    }
}

fn make(device: &str) -> impl FnOnce(io::Error) -> AttachError {
    let device = device.to_owned();
    move |source| AttachError::Make { device, source }
}

fn placed(device: &str) -> impl FnOnce(BusError) -> AttachError {
    let device = device.to_owned();
    move |source| AttachError::Place { device, source }
}

fn joined(device: &str) -> impl FnOnce(NotifyError) -> AttachError {
    let device = device.to_owned();
    move |source| AttachError::Notify { device, source }
}
