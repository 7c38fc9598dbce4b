//! Boots a kernel with an initial RAM disk, its serial console on stdout, and tells how it ended.
//!
//! `boot KERNEL INITRD CPUS MEMORY_MIB [CMDLINE]`

use std::io::Write;
use std::time::Instant;

use vmm::boot::cmdline;
use vmm::{Initrd, MachineConfig};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, kernel, initrd, cpus, mib, append @ ..] = args.as_slice() else {
        eprintln!("usage: boot KERNEL INITRD CPUS MEMORY_MIB [CMDLINE]");
        std::process::exit(2);
    };
    let append: Vec<&str> = append.iter().map(String::as_str).collect();
    let config = MachineConfig {
        cpus: cpus.parse().expect("CPUS is a number up to 255"),
        memory: mib.parse::<u64>().expect("MEMORY_MIB is a number") << 20,
        kernel: kernel.into(),
        initrd: Some(Initrd::File(initrd.into())),
        cmdline: cmdline::join(
            [cmdline::DEFAULT, cmdline::SERIAL_CONSOLE]
                .into_iter()
                .chain(append),
        ),
        console: Some(Box::new(std::io::stdout())),
        ..Default::default()
    };
    let start = Instant::now();
    let machine = match vmm::launch(config) {
        Ok(machine) => machine,
        Err(error) => {
            eprintln!("{:?}\n{error}", error);
            std::process::exit(1);
        }
    };
    let timings = machine.timings();
    let outcome = machine.wait();
    let took = start.elapsed();
    drop(machine);
    let _ = std::io::stdout().flush();
    println!("\n[{outcome:?} after {took:?}; launch {timings:?}]");
    if let vmm::Outcome::Failed(error) = outcome {
        println!("[{error}]");
        std::process::exit(1);
    }
}
