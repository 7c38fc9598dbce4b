//! `mvm run --timing`: where the time between typing and output went.

use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// In the environment of an mvm in the outer Linux: when the one on the host started, in
/// microseconds since 1970.
pub const STARTED_VARIABLE: &str = "MVM_STARTED_US";

/// The moments that matter, as they pass.
#[derive(Debug)]
pub struct Timing {
    start: Instant,
    /// Between the start on the host and `start`, where this mvm runs in the outer Linux.
    accel: Option<Duration>,
    /// Host, kernel and files were found, the guest's files packed.
    pub resolved: Option<Instant>,
    /// The machine was set up.
    pub launched: Option<Instant>,
    /// Where that time went.
    pub launch: Option<vmm::Timings>,
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
        let accel = std::env::var(STARTED_VARIABLE)
            .ok()
            .and_then(|value| value.parse().ok())
            .map(Duration::from_micros)
            .and_then(|started| since_epoch().checked_sub(started));
        Self {
            start: Instant::now(),
            accel,
            resolved: None,
            launched: None,
            launch: None,
            agent: None,
            ready: None,
            first_output: None,
            exited: None,
            ended: None,
        }
    }
}

/// Microseconds since 1970, to be handed to an mvm elsewhere.
pub fn now_us() -> String {
    since_epoch().as_micros().to_string()
}

fn since_epoch() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

impl fmt::Display for Timing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, time: Option<Duration>| match time {
            Some(time) => writeln!(f, "timing: {name:<15}{:>9.1} ms", time.as_secs_f64() * 1e3),
            None => Ok(()),
        };
        let between = |from: Option<Instant>, to: Option<Instant>| Some(to?.duration_since(from?));
        let start = Some(self.start);
        line("outer Linux", self.accel)?;
        line("preparation", between(start, self.resolved))?;
        line("VMM set-up", between(self.resolved, self.launched))?;
        if let Some(launch) = self.launch {
            line("· memory, VM", Some(launch.vm))?;
            line("· devices", Some(launch.devices))?;
            line("· kernel, files", Some(launch.kernel))?;
            line("· vCPUs", Some(launch.vcpus))?;
        }
        // The guest's clock starts late in its kernel's own start, so only the agent counts by it.
        let boot = between(self.launched, self.ready);
        line(
            "kernel",
            boot.map(|t| t.saturating_sub(self.agent.unwrap_or_default())),
        )?;
        line("agent", self.agent)?;
        line("command", between(self.ready, self.first_output))?;
        let first = between(start, self.first_output);
        line(
            "first output",
            first.map(|t| t + self.accel.unwrap_or_default()),
        )?;
        line("command ended", between(start, self.exited))?;
        line("machine ended", between(start, self.ended))
    }
}
