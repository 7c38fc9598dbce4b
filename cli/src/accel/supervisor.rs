//! The process that owns one outer Linux: starts QEMU, offers the agent's ports, and ends both when
//! nobody has used them for a while.
//!
//! It says on its standard output, once, `ready` or what failed, and closes it. QEMU is bound to die
//! with it; whoever starts the next one finds its files by their locks and replaces them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, thread};

use agent::protocol::Hello;
use anyhow::{Context, Result, anyhow, bail};
use devices::vhost_user::VhostUserVsock;
use devices::virtio::vsock::uds::VsockUds;
use devices::virtio::vsock::{VsockConfig, VsockHandle};
use rustix::fs::MemfdFlags;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::outer::{self, Outer};
use super::qemu::Emulation;
use super::state::{Description, Files};
use super::{TRAMPOLINE, join};
use crate::console::{Console, Tail};
use crate::descriptors;
use crate::link::{self, Link};

/// How long the outer Linux stays when nobody uses it.
const IDLE: Duration = Duration::from_secs(60);

/// How often use is looked at.
const TICK: Duration = Duration::from_secs(1);

/// How long the outer Linux may take to come up: an emulator on a busy machine is slow.
const BOOT: Duration = Duration::from_secs(180);

/// What its processes get to end by themselves.
pub const POWER_OFF_GRACE: Duration = Duration::from_secs(5);

/// How long it may take to power off.
const POWER_OFF: Duration = Duration::from_secs(10);

const CID: u64 = 3;

/// A vsock port of the outer Linux at which nobody listens.
const NOBODYS_PORT: u32 = 1;

enum Event {
    Hello(Hello),
    QemuEnded,
    Signal,
}

/// Why the outer Linux was not needed any more.
enum End {
    /// Nobody used it.
    Idle,
    /// It ended, or was told to.
    Ended,
}

/// Runs until the outer Linux has ended.
pub fn run() -> Result<ExitCode> {
    // Not a part of the caller's terminal session: its Ctrl-C and hang-up are not for us.
    let _ = rustix::process::setsid();
    descriptors::raise_limit();
    let files = Files::of_this_program()?;
    let _lock = files.lock_supervisor()?;
    files.clean();
    files.clean_abandoned()?;
    let result = supervise(&files);
    files.clean();
    match &result {
        Ok(End::Idle) => files.clean_log(),
        // Whoever was using it may ask for the last words.
        Ok(End::Ended) => {}
        // Nobody listens any more where it had been ready.
        Err(error) => drop(writeln!(std::io::stdout(), "{error:#}")),
    }
    Ok(match result {
        Ok(_) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    })
}

fn supervise(files: &Files) -> Result<End> {
    let (events, inbox) = mpsc::channel();
    watch_signals(events.clone())?;
    let outer = outer::compose()?;
    let listener =
        UnixListener::bind(files.vhost()).context("the socket for QEMU cannot be made")?;
    let (_device, vsock) = VhostUserVsock::serve(listener, VsockConfig::new(CID))
        .context("the vsock device cannot be started")?;
    let greeted = events.clone();
    link::listen_for_hello(&vsock, move |hello| {
        drop(greeted.send(Event::Hello(hello)));
    })?;
    let tail = Tail::default();
    let mut qemu = start_qemu(files, &outer, &tail, events)?;
    let result = await_hello(&inbox, &tail).and_then(|kernel| {
        let _ports = VsockUds::bind(files.socket(), vsock.clone())
            .context("the agent's ports cannot be offered")?;
        join::serve(&files.join(), vsock.clone())?;
        files.describe(&Description {
            pid: std::process::id(),
            kernel,
            memory: outer.memory,
            cpus: outer.cpus,
            since: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
        })?;
        say_ready()?;
        Ok(while_used(&inbox, &vsock))
    });
    if result.is_ok() {
        power_off(&vsock, &inbox);
    }
    // Fails only where QEMU has ended already.
    let _ = qemu.kill();
    qemu.wait().context("QEMU cannot be waited for")?;
    result
}

/// Starts QEMU, with its console and its complaints going to `tail` and the log.
fn start_qemu(files: &Files, outer: &Outer, tail: &Tail, events: Sender<Event>) -> Result<Child> {
    let initramfs = memory_file(&outer.initramfs)?;
    let emulation = Emulation {
        kernel: &outer.kernel,
        // QEMU is of the same user, so it may open it here.
        initrd: format!("/proc/{}/fd/{}", std::process::id(), initramfs.as_raw_fd()).as_ref(),
        cmdline: &outer.cmdline,
        memory: outer.memory,
        cpus: outer.cpus,
        vsock: &files.vhost(),
        cache: &outer.cache,
    }
    .arguments();
    let log = File::create(files.log()).context("the log of the outer Linux cannot be made")?;
    let mut qemu = Command::new(env::current_exe()?)
        .arg(TRAMPOLINE)
        .args(emulation)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone()?)
        .spawn()
        .context("QEMU cannot be started")?;
    let mut console = qemu.stdout.take().context("QEMU has no console")?;
    let mut copy = Console::new(tail.clone(), Some(Box::new(log)));
    thread::Builder::new()
        .name("console".into())
        .spawn(move || {
            let _initramfs = initramfs;
            let mut buffer = [0u8; 4096];
            while let Ok(len @ 1..) = console.read(&mut buffer) {
                let _ = copy.write_all(&buffer[..len]);
            }
            let _ = events.send(Event::QemuEnded);
        })?;
    Ok(qemu)
}

fn memory_file(content: &[u8]) -> Result<File> {
    let fd = rustix::fs::memfd_create("mvm-outer-initramfs", MemfdFlags::CLOEXEC)
        .context("no memory for the initramfs")?;
    let mut file = File::from(fd);
    file.write_all(content)
        .context("no memory for the initramfs")?;
    Ok(file)
}

/// Waits for the agent; returns the kernel's release.
fn await_hello(inbox: &Receiver<Event>, tail: &Tail) -> Result<String> {
    let with_tail = |message: &str| {
        anyhow!(
            "{message}\nThe last lines of its console:\n  {}",
            tail.last_lines(20).join("\n  ")
        )
    };
    match inbox.recv_timeout(BOOT) {
        Ok(Event::Hello(Hello::Ready { kernel_release, .. })) => Ok(kernel_release),
        Ok(Event::Hello(Hello::Failed(reason))) => {
            bail!("the outer Linux cannot be used: {reason}")
        }
        Ok(Event::QemuEnded) => Err(with_tail(
            "QEMU ended before the outer Linux was up; its complaints are in the log that `mvm accel status` names",
        )),
        Ok(Event::Signal) => bail!("the start was interrupted"),
        Err(_) => Err(with_tail(&format!(
            "the outer Linux was not up after {} s",
            BOOT.as_secs()
        ))),
    }
}

fn say_ready() -> Result<()> {
    println!("ready");
    // The caller reads to the end of the pipe, so it has to end; whatever is printed later is lost.
    let null = File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null).context("standard output cannot be closed")?;
    Ok(())
}

/// Returns when nobody has used the outer Linux for a while, or it has to end.
fn while_used(inbox: &Receiver<Event>, vsock: &VsockHandle) -> End {
    let mut used = Instant::now();
    loop {
        match inbox.recv_timeout(TICK) {
            Ok(Event::QemuEnded | Event::Signal) | Err(RecvTimeoutError::Disconnected) => {
                return End::Ended;
            }
            Ok(Event::Hello(_)) => {}
            Err(RecvTimeoutError::Timeout) => {}
        }
        if vsock.counters().connections.load(Ordering::Relaxed) > 0 {
            used = Instant::now();
            nudge(vsock);
        } else if used.elapsed() >= IDLE {
            return End::Idle;
        }
    }
}

/// Gives the outer Linux an interrupt, by a connection that it refuses.
///
/// QEMU (seen in 7.2) changes `interrupt_request` without its lock where a nested guest is left (`do_vmexit`), and so loses
/// an interrupt that comes at that very moment until there is another one. Where it was that of the only timer, the
/// outer Linux and all machines in it would stand still until somebody types.
fn nudge(vsock: &VsockHandle) {
    // Where that fails, the outer Linux has ended, which is heard of elsewhere.
    drop(vsock.connect(NOBODYS_PORT));
}

fn power_off(vsock: &VsockHandle, inbox: &Receiver<Event>) {
    let asked = link::ask_to_power_off(&Link::Machine(vsock.clone(), None), POWER_OFF_GRACE);
    let Ok(_stream) = asked else { return };
    let deadline = Instant::now() + POWER_OFF;
    while let Some(left) = deadline.checked_duration_since(Instant::now()) {
        match inbox.recv_timeout(left) {
            Ok(Event::QemuEnded) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

fn watch_signals(events: Sender<Event>) -> Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM])
        .context("signals cannot be watched")?;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for _ in signals.forever() {
                if events.send(Event::Signal).is_err() {
                    return;
                }
            }
        })?;
    Ok(())
}

/// The log's last words, for whoever asks why there is no outer Linux.
pub fn last_words(files: &Files) -> Option<String> {
    let log = fs::read(files.log()).ok()?;
    let text = String::from_utf8_lossy(&log);
    let lines: Vec<_> = text
        .lines()
        .filter(|line| !line.contains("TCG doesn't support requested feature"))
        .collect();
    let last = lines[lines.len().saturating_sub(10)..].join("\n  ");
    (!last.is_empty()).then_some(last)
}
