//! What a machine's owner does when it is asked at the control socket.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Owned, declare};
use crate::args::Net;
use crate::control::protocol::{
    Answer, ControlError, Direction, Disk, DiskStats, Forward, Inspection, NetStats, Op, State,
    Stats, VsockStats,
};
use crate::control::{Latch, Owner};
use crate::event::Event;
use crate::forward::spec::{PortRange, Protocol, Publish, Reverse};
use crate::forward::{self, Auto, Kind};
use crate::resolve::{self, Surroundings};
use crate::store::{Bytes, Changes, Name};

impl Owner for Owned {
    fn inspect(&self) -> Inspection {
        let args = &self.args;
        let claim = self.claim();
        let name = claim.as_ref().map(|claim| claim.name().clone());
        let definition = claim.as_ref().and_then(|claim| claim.definition().ok());
        drop(claim);
        let changes = definition
            .map(|definition| definition.changes)
            .unwrap_or_default();
        let surroundings = Surroundings::of(args, self.host_root.as_ref());
        let env = surroundings.env.iter();
        Inspection {
            name: name.unwrap_or_else(|| self.name.clone()),
            state: *self.state(),
            pid: std::process::id(),
            mvm: env!("CARGO_PKG_VERSION").to_owned(),
            started: self.started,
            accel: self.accel.to_owned(),
            kernel: self.kernel.get().cloned(),
            cpus: args.cpus.into(),
            memory: args.memory,
            command: args.command.iter().map(Bytes::from).collect(),
            terminal: args.tty,
            user: surroundings.user,
            env: env
                .map(|(name, value)| Bytes([name, &b"="[..], value].concat()))
                .collect(),
            workdir: surroundings.workdir.map(Bytes),
            disks: disks(self),
            tap: match &args.net {
                Net::Tap(name) => Some(name.clone()),
                Net::None => None,
            },
            mounts: self.mounts(),
            forwards: self.forwarder.list().map(shown).unwrap_or_default(),
            auto: changes.auto.unwrap_or(args.forward.publish_auto),
            exclude: changes
                .exclude
                .unwrap_or_else(|| excluded(&args.forward.publish_auto_exclude)),
            socks: self
                .proxy
                .as_ref()
                .and_then(|proxy| proxy.addresses().first())
                .map(|address| address.port()),
            ssh_agent: declare::ssh_agent_path(args).map(|path| path.as_os_str().to_owned().into()),
            notes: Default::default(),
        }
    }

    fn stats(&self) -> Result<Stats, ControlError> {
        let used = self.instance.stats()?;
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let forwards = self.forwarder.list().unwrap_or_default();
        Ok(Stats {
            at_ns: now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs(),
            cpus: self.args.cpus.into(),
            cpu_ns: used.vcpus.iter().map(|vcpu| vcpu.cpu_ns).sum(),
            memory: used.memory.size,
            memory_resident: used.memory.resident,
            disks: named(&used.disks, |name, disk| DiskStats {
                name: format!("disk{name}"),
                reads: disk.reads,
                writes: disk.writes,
                read_bytes: disk.read_bytes,
                written_bytes: disk.written_bytes,
            }),
            nets: named(&used.nets, |name, net| NetStats {
                name: format!("net{name}"),
                received_bytes: net.rx_bytes,
                received_packets: net.rx_packets,
                sent_bytes: net.tx_bytes,
                sent_packets: net.tx_packets,
            }),
            vsock: used
                .vsock
                .map_or_else(VsockStats::default, |vsock| VsockStats {
                    connections: vsock.connections,
                    received_bytes: vsock.rx_bytes,
                    sent_bytes: vsock.tx_bytes,
                }),
            forwarded_total: forwards.iter().map(|forward| forward.connections).sum(),
        })
    }

    fn stop(&self, grace: Duration) -> Result<(), ControlError> {
        // A guest that stands still cannot end in an orderly way.
        self.go_on()?;
        *self.state() = State::Stopping;
        self.tell(Event::Stop(grace))
    }

    fn kill(&self, signal: i32) -> Result<(), ControlError> {
        self.tell(Event::Kill(signal))
    }

    fn pause(&self) -> Result<(), ControlError> {
        let mut state = self.state();
        match *state {
            State::Paused => return Err(ControlError::failed("the machine is paused already")),
            State::Stopping => return Err(ControlError::failed("the machine is about to end")),
            _ => {
                self.instance.pause()?;
                *state = State::Paused;
            }
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), ControlError> {
        match self.go_on()? {
            true => Ok(()),
            false => Err(ControlError::failed("the machine is not paused")),
        }
    }

    fn rename(&self, to: &Name) -> Result<(), ControlError> {
        let mut claim = self.claim();
        let claim = claim.as_mut().context("the machine is about to end")?;
        Ok(claim.rename(to)?)
    }

    fn connect(&self, port: u32, stream: OwnedFd) -> io::Result<()> {
        let link = self.instance.link().map_err(io::Error::other)?;
        link.join(port, Vec::new(), stream)
    }

    fn forward(&self, op: Op) -> Result<Answer, ControlError> {
        Ok(self.change(op)?)
    }

    fn mount(&self, op: Op) -> Result<Answer, ControlError> {
        Ok(self.change_mounts(op)?)
    }

    fn ended(&self) -> &Latch {
        &self.ended
    }
}

impl Owned {
    /// Lets the CPUs go on, and sets the guest's clock; false where they were not paused.
    fn go_on(&self) -> Result<bool> {
        {
            let mut state = self.state();
            if *state != State::Paused {
                return Ok(false);
            }
            self.instance.resume()?;
            *state = match self.kernel.get() {
                Some(_) => State::Running,
                None => State::Starting,
            };
        }
        self.set_clock();
        Ok(true)
    }

    fn tell(&self, event: Event) -> Result<(), ControlError> {
        self.events
            .send(event)
            .map_err(|_| ControlError::failed("the machine is about to end"))
    }

    /// Does one of the operations on forwards, and writes down what is to be so at the next start.
    fn change(&self, op: Op) -> Result<Answer> {
        match op {
            Op::PortAdd { publish } => {
                let mut added = Vec::new();
                for publish in parsed::<Publish>(&publish)? {
                    let done = self.forwarder.publish(&publish)?;
                    if let Some(warning) = done.warning {
                        eprintln!("mvm: {warning}");
                    }
                    added.extend(done.forwards);
                    self.note(|changes| {
                        changes
                            .publish
                            .get_or_insert_default()
                            .push(publish.to_string().as_str().into());
                    })?;
                }
                Ok(Answer::Forwards(shown(added)))
            }
            Op::PortRm { publish, .. } => {
                let mut removed = Vec::new();
                for publish in parsed::<Publish>(&publish)? {
                    removed.extend(self.forwarder.remove(&publish)?);
                    let left = self.declared(Kind::Published)?;
                    self.note(|changes| {
                        forget(
                            changes.publish.get_or_insert_default(),
                            &publish.to_string(),
                            left,
                        );
                    })?;
                }
                Ok(Answer::Forwards(shown(removed)))
            }
            Op::PortLs => Ok(Answer::Forwards(shown(self.forwarder.list()?))),
            Op::PortAuto { on, exclude } => self.publish_auto(on, exclude),
            Op::ReverseAdd { reverse } => {
                let mut added = Vec::new();
                for reverse in parsed::<Reverse>(&reverse)? {
                    added.push(self.forwarder.reverse(&reverse)?);
                    self.note(|changes| {
                        changes
                            .reverse
                            .get_or_insert_default()
                            .push(reverse.to_string().as_str().into());
                    })?;
                }
                Ok(Answer::Forwards(shown(added)))
            }
            Op::ReverseRm { reverse } => {
                let mut removed = Vec::new();
                for reverse in parsed::<Reverse>(&reverse)? {
                    removed.push(self.forwarder.remove_reverse(&reverse)?);
                    let left = self.declared(Kind::Reverse)?;
                    self.note(|changes| {
                        forget(
                            changes.reverse.get_or_insert_default(),
                            &reverse.to_string(),
                            left,
                        );
                    })?;
                }
                Ok(Answer::Forwards(shown(removed)))
            }
            Op::SshAgent { path } => {
                if let Some(path) = path {
                    self.forwarder
                        .offer_ssh_agent(PathBuf::from(path.as_os_str()));
                }
                Ok(Answer::Done)
            }
            other => anyhow::bail!("{other:?} is no operation on forwards"),
        }
    }

    fn publish_auto(&self, on: Option<bool>, exclude: Option<Vec<u16>>) -> Result<Answer> {
        let (mut now_on, mut now_excluded) = (false, Vec::new());
        self.note(|changes| {
            now_on = on.unwrap_or(changes.auto.unwrap_or(self.args.forward.publish_auto));
            now_excluded = exclude
                .or(changes.exclude.take())
                .unwrap_or_else(|| excluded(&self.args.forward.publish_auto_exclude));
            changes.auto = Some(now_on);
            changes.exclude = Some(now_excluded.clone());
        })?;
        let ranges = now_excluded
            .iter()
            .filter_map(|&port| PortRange::new(port, port));
        let auto = Auto {
            exclude: ranges.collect(),
        };
        self.forwarder.set_auto(now_on.then_some(auto))?;
        Ok(Answer::Auto {
            on: now_on,
            exclude: now_excluded,
        })
    }

    /// What is forwarded now, each as it would be declared.
    fn declared(&self, kind: Kind) -> Result<Vec<Bytes>> {
        let all = self.forwarder.list()?;
        let of_kind = all.iter().filter(|forward| forward.kind == kind);
        Ok(of_kind
            .map(|forward| match kind {
                Kind::Reverse => format!("{}:{}", forward.guest, forward.host),
                _ if forward.protocol == Protocol::Udp => {
                    format!("{}:{}/udp", forward.host, forward.guest)
                }
                _ => format!("{}:{}", forward.host, forward.guest),
            })
            .map(|text| text.as_str().into())
            .collect())
    }

    /// Writes down a change of what the machine declares.
    pub(super) fn note(&self, change: impl FnOnce(&mut Changes)) -> Result<()> {
        let claim = self.claim();
        let claim = claim.as_ref().context("the machine is about to end")?;
        let mut definition = claim.definition()?;
        definition.changes = declare::changes(&self.args, &definition);
        change(&mut definition.changes);
        claim.redefine(&definition)
    }
}

fn parsed<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    list: &[Bytes],
) -> Result<Vec<T>> {
    list.iter()
        .map(|text| {
            let text = text.to_string();
            text.parse()
                .with_context(|| format!("{text} cannot be forwarded"))
        })
        .collect()
}

/// Takes `gone` from the list of what is declared; where it was not declared in these words, the list
/// becomes what is `left`.
fn forget(declared: &mut Vec<Bytes>, gone: &str, left: Vec<Bytes>) {
    match declared.iter().position(|text| text.0 == gone.as_bytes()) {
        Some(at) => drop(declared.remove(at)),
        None => *declared = left,
    }
}

fn excluded(ranges: &[PortRange]) -> Vec<u16> {
    ranges.iter().flat_map(|range| range.ports()).collect()
}

fn named<T, U>(devices: &[T], shown: impl Fn(usize, &T) -> U) -> Vec<U> {
    devices
        .iter()
        .enumerate()
        .map(|(index, device)| shown(index, device))
        .collect()
}

fn disks(machine: &Owned) -> Vec<Disk> {
    resolve::disks(&machine.args)
        .into_iter()
        .map(|(path, read_only)| Disk {
            path: path.into_os_string().into(),
            read_only,
        })
        .collect()
}

fn shown(forwards: Vec<forward::Forward>) -> Vec<Forward> {
    forwards
        .into_iter()
        .map(|forward| Forward {
            direction: match forward.kind {
                Kind::Published | Kind::Auto => Direction::ToGuest,
                Kind::Reverse | Kind::SshAgent => Direction::ToHost,
            },
            protocol: forward.protocol.to_string(),
            host: forward.host.as_str().into(),
            guest: forward.guest.as_str().into(),
            auto: forward.kind == Kind::Auto,
            connections: forward.connections,
        })
        .collect()
}
