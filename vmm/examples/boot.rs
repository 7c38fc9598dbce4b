//! Boots a kernel with an initial RAM disk, its serial console on stdout, and tells how it ended.
//!
//! `boot KERNEL INITRD CPUS MEMORY_MIB [disk=PATH] [rodisk=PATH] [net=TAP] [vsock] [quiet]
//! [press=SECONDS] [stop=SECONDS] [KERNEL_PARAMETER...]`
//!
//! `vsock` echoes what the guest sends to port 7 of the host, and connects to port 9 of the guest.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use vmm::boot::cmdline;
use vmm::{DiskConfig, Initrd, Machine, MachineConfig, NetConfig, TapSource, VsockConfig};

#[derive(Default)]
struct Extra {
    press: Option<Duration>,
    stop: Option<Duration>,
    vsock: bool,
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, kernel, initrd, cpus, mib, rest @ ..] = args.as_slice() else {
        eprintln!("usage: boot KERNEL INITRD CPUS MEMORY_MIB [OPTION...]");
        std::process::exit(2);
    };
    let mut config = MachineConfig {
        cpus: cpus.parse().expect("CPUS is a number up to 255"),
        memory: mib.parse::<u64>().expect("MEMORY_MIB is a number") << 20,
        kernel: kernel.into(),
        initrd: Some(Initrd::File(initrd.into())),
        console: Some(Box::new(io::stdout())),
        cmdline: cmdline::DEFAULT.to_owned(),
        rng: true,
        ..Default::default()
    };
    let extra = options(&mut config, rest);
    let start = Instant::now();
    let machine = match vmm::launch(config) {
        Ok(machine) => machine,
        Err(error) => {
            eprintln!("{error}\n{error:?}");
            std::process::exit(1);
        }
    };
    let timings = machine.timings();
    talk(&machine, &extra);
    let outcome = machine.wait();
    let took = start.elapsed();
    let memory = own_memory();
    let dropping = Instant::now();
    drop(machine);
    println!(
        "\n[{outcome:?} after {took:?}; launch {timings:?}; end {:?}]",
        dropping.elapsed()
    );
    println!("[memory besides the guest's: {} KiB]", memory / 1024);
    if let vmm::Outcome::Failed(error) = outcome {
        println!("[{error}]");
        std::process::exit(1);
    }
}

fn options(config: &mut MachineConfig, rest: &[String]) -> Extra {
    let mut extra = Extra::default();
    let mut parameters = vec![cmdline::DEFAULT];
    let mut console = cmdline::SERIAL_CONSOLE;
    let seconds = |s: &str| Some(Duration::from_secs_f64(s.parse().expect("seconds")));
    for option in rest {
        match option.split_once('=').unwrap_or((option, "")) {
            ("disk" | "rodisk", path) => config.disks.push(DiskConfig {
                path: path.into(),
                read_only: option.starts_with("ro"),
                serial: format!("disk{}", config.disks.len()),
            }),
            ("net", tap) => {
                config.net = Some(NetConfig {
                    tap: TapSource::Interface(tap.to_owned()),
                    mac: [2, 0, 0, 0, 0, 1],
                    queue_pairs: 1,
                });
            }
            ("vsock", _) => {
                extra.vsock = true;
                config.vsock = Some(VsockConfig { cid: 3, uds: None });
            }
            ("balloon", _) => config.balloon = true,
            ("noconsole", _) => console = "",
            ("press", s) => extra.press = seconds(s),
            ("stop", s) => extra.stop = seconds(s),
            _ => parameters.push(option),
        }
    }
    config.cmdline = cmdline::join(parameters.into_iter().chain([console]));
    extra
}

fn talk(machine: &Machine, extra: &Extra) {
    if let (true, Some(vsock)) = (extra.vsock, machine.vsock()) {
        vsock
            .listen(7, |mut stream| {
                std::thread::spawn(move || {
                    let mut writer = stream.try_clone().expect("a descriptor");
                    let copied = io::copy(&mut stream, &mut writer);
                    println!("[vsock echo: {copied:?}]");
                });
            })
            .expect("a vsock service");
    }
    if let Some(after) = extra.press
        && machine.wait_timeout(after).is_none()
    {
        println!("[pressing the power button]");
        machine.press_power_button().expect("an eventfd");
    }
    if let Some(after) = extra.stop
        && machine.wait_timeout(after).is_none()
    {
        let start = Instant::now();
        machine.pause();
        println!("[paused in {:?}]", start.elapsed());
        machine.resume();
        let start = Instant::now();
        machine.stop();
        println!("[stopped in {:?}]", start.elapsed());
    }
}

/// Resident bytes of this process that are not the guest's memory or a file placed in it.
fn own_memory() -> u64 {
    let mut text = String::new();
    let read =
        std::fs::File::open("/proc/self/smaps").and_then(|mut f| f.read_to_string(&mut text));
    if read.is_err() {
        return 0;
    }
    let (mut total, mut guest) = (0, false);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or("");
        if first.contains('-') && !first.ends_with(':') {
            guest =
                line.contains("guest-memory") || line.contains("vmlinu") || line.contains(".cpio");
            if std::env::var_os("SMAPS").is_some() {
                println!("{line}");
            }
        } else if first == "Rss:" && !guest {
            total += words
                .next()
                .and_then(|n| n.parse::<u64>().ok())
                .unwrap_or(0)
                * 1024;
            if std::env::var_os("SMAPS").is_some() {
                println!("{line}");
            }
        }
    }
    let _ = io::stdout().flush();
    total
}
