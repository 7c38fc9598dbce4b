//! `mvm run --timing`: where the time between typing and output went.

use std::fmt;
use std::time::{Duration, Instant};

use crate::instance::SetUp;

/// The moments that matter, as they pass.
#[derive(Debug)]
pub struct Timing {
    start: Instant,
    /// Where the time of the machine's making went, wherever it was made.
    pub set_up: Option<SetUp>,
    /// The machine was made.
    pub launched: Option<Instant>,
    /// The agent's own part until it was ready.
    pub agent: Option<Duration>,
    /// The agent said that it was ready.
    pub ready: Option<Instant>,
    /// The command printed something.
    pub first_output: Option<Instant>,
    /// The command ended.
    pub exited: Option<Instant>,
    /// The machine ended.
    pub ended: Option<Instant>,
}

impl Timing {
    /// Starts the watch.
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
            set_up: None,
            launched: None,
            agent: None,
            ready: None,
            first_output: None,
            exited: None,
            ended: None,
        }
    }
}

impl fmt::Display for Timing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, time: Option<Duration>| match time {
            Some(time) => writeln!(f, "timing: {name:<15}{:>9.1} ms", time.as_secs_f64() * 1e3),
            None => Ok(()),
        };
        let between = |from: Option<Instant>, to: Option<Instant>| Some(to?.duration_since(from?));
        let start = Some(self.start);
        if let (Some(set_up), Some(before)) = (self.set_up, between(start, self.launched)) {
            let vmm = set_up.vm + set_up.devices + set_up.kernel + set_up.vcpus;
            // What was done on the host, and in the outer Linux where there is one.
            line("preparation", before.checked_sub(vmm))?;
            line("· of the guest", Some(set_up.preparation))?;
            line("VMM set-up", Some(vmm))?;
            line("· memory, VM", Some(set_up.vm))?;
            line("· devices", Some(set_up.devices))?;
            line("· kernel, files", Some(set_up.kernel))?;
            line("· vCPUs", Some(set_up.vcpus))?;
        }
        // The guest's clock starts late in its kernel's own start, so only the agent counts by it.
        let boot = between(self.launched, self.ready);
        line(
            "kernel",
            boot.map(|t| t.saturating_sub(self.agent.unwrap_or_default())),
        )?;
        line("agent", self.agent)?;
        line("command", between(self.ready, self.first_output))?;
        line("first output", between(start, self.first_output))?;
        line("command ended", between(start, self.exited))?;
        line("machine ended", between(start, self.ended))
    }
}
