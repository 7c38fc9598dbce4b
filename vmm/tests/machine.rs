//! Whole machines with hand-written guests: a few instructions as a PVH kernel on the host's KVM.
//!
//! The guests use nothing that a software KVM's instruction emulator lacks. Without a usable
//! /dev/kvm each test says that it was skipped.

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use vmm::{Initrd, LaunchError, MachineConfig, Outcome, RunError};

/// Long enough for a guest of a dozen instructions on a busy machine; a test that waits this long
/// has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where guests are loaded and start.
const CODE: u32 = 0x10_0000;

const COM1: u16 = 0x3f8;
const SLEEP_CONTROL: u16 = 0x600;
const RESET: u16 = 0x603;
const I8042_COMMAND: u16 = 0x64;
/// SLP_TYP 5 and SLP_EN.
const S5: u8 = 5 << 2 | 1 << 5;
const FIRST_VIRTIO: u32 = 0xd000_0f00;

/// 32-bit machine code, a method an instruction or two.
#[derive(Default)]
struct Guest(Vec<u8>);

impl Guest {
    fn new() -> Self {
        Self::default()
    }

    fn raw(mut self, code: &[u8]) -> Self {
        self.0.extend(code);
        self
    }

    /// `mov dx, port`
    fn port(self, port: u16) -> Self {
        self.raw(&[0x66, 0xba]).raw(&port.to_le_bytes())
    }

    /// `mov al, value; out dx, al`
    fn out(self, port: u16, value: u8) -> Self {
        self.port(port).raw(&[0xb0, value, 0xee])
    }

    /// `in al, dx`, then prints AL.
    fn print_port(self, port: u16) -> Self {
        self.port(port).raw(&[0xec]).print_al()
    }

    fn print_al(self) -> Self {
        self.port(COM1).raw(&[0xee])
    }

    /// `mov eax, [address]`, then prints its four bytes, lowest first.
    fn print_u32(self, address: u32) -> Self {
        let mut guest = self.raw(&[0xa1]).raw(&address.to_le_bytes()).port(COM1);
        for _ in 0..4 {
            // out dx, al; shr eax, 8
            guest = guest.raw(&[0xee, 0xc1, 0xe8, 8]);
        }
        guest
    }

    /// `mov dword [address], value`
    fn store_u32(self, address: u32, value: u32) -> Self {
        self.raw(&[0xc7, 0x05])
            .raw(&address.to_le_bytes())
            .raw(&value.to_le_bytes())
    }

    /// Prints the string at ESI up to its NUL: lodsb; test al, al; jz +3; out dx, al; jmp back.
    fn print_string(self) -> Self {
        self.port(COM1)
            .raw(&[0xac, 0x84, 0xc0, 0x74, 3, 0xee, 0xeb, 0xf8])
    }

    fn power_off(self) -> Self {
        self.out(SLEEP_CONTROL, S5).spin()
    }

    /// `jmp $`
    fn spin(self) -> Self {
        self.raw(&[0xeb, 0xfe])
    }

    /// `hlt; jmp back`
    fn halt(self) -> Self {
        self.raw(&[0xf4, 0xeb, 0xfd])
    }

    /// An ELF with this code at [`CODE`] and a PVH note that starts there.
    fn kernel(&self) -> NamedTempFile {
        let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
        elf.resize(16, 0);
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        elf.extend(u64::from(CODE).to_le_bytes());
        elf.extend(64u64.to_le_bytes());
        elf.extend([0; 12]);
        elf.extend([64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        let size = self.0.len() as u64;
        for (kind, offset, address, size) in
            [(1u32, 0x1000u64, u64::from(CODE), size), (4, 0x200, 0, 20)]
        {
            elf.extend(kind.to_le_bytes());
            elf.extend(7u32.to_le_bytes());
            for word in [offset, address, address, size, size, 4] {
                elf.extend(word.to_le_bytes());
            }
        }
        elf.resize(0x200, 0);
        for word in [4u32, 4, 18] {
            elf.extend(word.to_le_bytes());
        }
        elf.extend(b"Xen\0");
        elf.extend(CODE.to_le_bytes());
        elf.resize(0x1000, 0);
        elf.extend(&self.0);
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&elf).unwrap();
        file
    }
}

/// Console output that a test can look at and wait for.
#[derive(Clone, Default)]
struct Console(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Console {
    fn bytes(&self) -> Vec<u8> {
        self.0.0.lock().unwrap().clone()
    }

    fn wait_for(&self, len: usize) {
        let (bytes, grown) = &*self.0;
        let (_bytes, timeout) = grown
            .wait_timeout_while(bytes.lock().unwrap(), PATIENCE, |b| b.len() < len)
            .unwrap();
        assert!(!timeout.timed_out(), "the guest did not print {len} bytes");
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.0.lock().unwrap().extend(bytes);
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn config(kernel: &Path, console: &Console) -> MachineConfig {
    MachineConfig {
        memory: 32 << 20,
        kernel: kernel.to_owned(),
        console: Some(Box::new(console.clone())),
        rng: true,
        ..Default::default()
    }
}

/// Whether there is a KVM to run guests on; says so where there is none.
fn no_kvm() -> bool {
    match vmm::probe::kvm() {
        vmm::probe::KvmVerdict::Works => false,
        verdict => {
            println!("skipped: {verdict}");
            true
        }
    }
}

/// Runs `guest` to its end; None where there is no KVM.
fn run_with(guest: Guest, change: impl FnOnce(&mut MachineConfig)) -> Option<(Outcome, Vec<u8>)> {
    if no_kvm() {
        return None;
    }
    let kernel = guest.kernel();
    let console = Console::default();
    let mut config = config(kernel.path(), &console);
    change(&mut config);
    let machine = vmm::launch(config).unwrap();
    let outcome = machine.wait_timeout(PATIENCE).expect("the guest hangs");
    drop(machine);
    Some((outcome, console.bytes()))
}

fn run(guest: Guest) -> Option<(Outcome, Vec<u8>)> {
    run_with(guest, |_| ())
}

#[test]
fn a_guest_prints_and_powers_off() {
    let guest = Guest::new().out(COM1, b'h').out(COM1, b'i').power_off();
    if let Some(result) = run(guest) {
        assert_eq!(result, (Outcome::PowerOff, b"hi".to_vec()));
    }
}

#[test]
fn both_ways_to_reset_end_as_a_reset() {
    for (port, value) in [(RESET, 1), (I8042_COMMAND, 0xfe)] {
        if let Some((outcome, _)) = run(Guest::new().out(port, value).halt()) {
            assert_eq!(outcome, Outcome::Reset, "port {port:#x}");
        }
    }
}

#[test]
fn the_guest_finds_command_line_acpi_tables_and_initial_ram_disk() {
    // ESI from hvm_start_info at EBX: cmdline_paddr, rsdp_paddr, and the first module's address.
    let guest = Guest::new()
        .raw(&[0x8b, 0x73, 24])
        .print_string()
        .raw(&[0x8b, 0x73, 32, 0xad])
        .port(COM1)
        .raw(&[0xee])
        .raw(&[0x8b, 0x43, 16, 0x8b, 0x30])
        .print_string()
        .power_off();
    let result = run_with(guest, |config| {
        config.cmdline = "quiet x=1 ".to_owned();
        config.initrd = Some(Initrd::Bytes(b"ramdisk\0".to_vec()));
    });
    if let Some((outcome, printed)) = result {
        assert_eq!(String::from_utf8_lossy(&printed), "quiet x=1 Rramdisk");
        assert_eq!(outcome, Outcome::PowerOff);
    }
}

#[test]
fn accesses_to_nothing_read_all_ones() {
    let guest = Guest::new()
        .print_port(0x1234)
        .print_port(0xcfc)
        .print_u32(0xc800_0000)
        .store_u32(0xc800_0000, 7)
        .out(0x80, 1)
        .power_off();
    if let Some(result) = run(guest) {
        assert_eq!(result, (Outcome::PowerOff, vec![0xff; 6]));
    }
}

#[test]
fn a_virtio_device_answers_where_acpi_says_and_bad_notifications_do_nothing() {
    let notify = FIRST_VIRTIO + 0x50;
    let guest = Guest::new()
        .print_u32(FIRST_VIRTIO)
        .print_u32(FIRST_VIRTIO + 8)
        .store_u32(notify, 0)
        .store_u32(notify, 77)
        .power_off();
    if let Some(result) = run(guest) {
        assert_eq!(result, (Outcome::PowerOff, b"virt\x04\0\0\0".to_vec()));
    }
}

#[test]
fn what_a_driver_selects_is_what_it_reads_and_nothing_else_can_be_written() {
    const DEVICE_FEATURES: u32 = FIRST_VIRTIO + 0x10;
    const DEVICE_FEATURES_SEL: u32 = FIRST_VIRTIO + 0x14;
    const INTERRUPT_ACK: u32 = FIRST_VIRTIO + 0x64;
    let guest = Guest::new()
        .store_u32(DEVICE_FEATURES_SEL, 1)
        .print_u32(DEVICE_FEATURES)
        .store_u32(DEVICE_FEATURES_SEL, 2)
        .print_u32(DEVICE_FEATURES)
        .store_u32(INTERRUPT_ACK, 1)
        .store_u32(INTERRUPT_ACK, 3)
        .store_u32(FIRST_VIRTIO, 7)
        .print_u32(FIRST_VIRTIO)
        .power_off();
    if let Some(result) = run(guest) {
        let printed = b"\x01\0\0\0\0\0\0\0virt".to_vec();
        assert_eq!(result, (Outcome::PowerOff, printed));
    }
}

#[test]
fn a_crash_ends_the_machine_with_a_message() {
    // lidt of an empty table, then ud2: no handler for it, nor for the faults that follow. A KVM
    // that emulates all instructions may give up before the processor does.
    let guest = Guest::new().raw(&[0x0f, 0x01, 0x1d, 0, 0, 0x30, 0, 0x0f, 0x0b]);
    match run(guest) {
        Some((Outcome::Failed(error), _)) => {
            assert!(
                matches!(
                    error,
                    RunError::TripleFault { vcpu: 0, .. } | RunError::Internal { vcpu: 0, .. }
                ),
                "{error}"
            );
        }
        Some((other, _)) => panic!("{other:?}"),
        None => {}
    }
}

#[test]
fn guests_that_spin_or_sleep_are_stopped_from_any_thread() {
    if no_kvm() {
        return;
    }
    for guest in [Guest::new().spin(), Guest::new().halt()] {
        let kernel = guest.kernel();
        let mut config = config(kernel.path(), &Console::default());
        config.cpus = 3;
        let machine = vmm::launch(config).unwrap();
        assert_eq!(machine.wait_timeout(Duration::from_millis(20)), None);
        std::thread::scope(|scope| {
            scope.spawn(|| machine.stop());
            scope.spawn(|| machine.stop());
            assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::Stopped));
        });
        machine.stop();
        assert_eq!(machine.wait(), Outcome::Stopped);
    }
}

#[test]
fn dropping_a_machine_that_runs_ends_its_threads() {
    if no_kvm() {
        return;
    }
    let kernel = Guest::new().spin().kernel();
    let machine = vmm::launch(config(kernel.path(), &Console::default())).unwrap();
    drop(machine);
    let mut config = config(kernel.path(), &Console::default());
    config.cpus = 2;
    // Never started.
    drop(vmm::prepare(config).unwrap());
}

#[test]
fn a_paused_guest_prints_nothing_until_it_is_resumed() {
    if no_kvm() {
        return;
    }
    // Prints for ever: out dx, al; jmp back.
    let kernel = Guest::new().port(COM1).raw(&[0xee, 0xeb, 0xfd]).kernel();
    let console = Console::default();
    let machine = vmm::prepare(config(kernel.path(), &console)).unwrap();
    assert_eq!(console.bytes(), b"", "printed before it was started");
    machine.resume();
    console.wait_for(100);
    for _ in 0..3 {
        machine.pause();
        machine.pause();
        settle(&console);
        let before = console.bytes().len();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(console.bytes().len(), before, "a paused guest printed");
        machine.resume();
        console.wait_for(before + 100);
    }
    machine.pause();
    machine.stop();
    assert_eq!(machine.wait(), Outcome::Stopped);
}

#[test]
fn a_guest_with_a_kvm_clock_is_told_that_it_was_paused() {
    const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    /// Where the guest lets KVM keep the time, and in it the byte of flags.
    const TIME: u32 = 0x20_0000;
    const FLAGS: u32 = TIME + 29;
    const PVCLOCK_GUEST_STOPPED: u8 = 1 << 1;
    if no_kvm() {
        return;
    }
    // mov ecx, MSR; mov eax, TIME | enabled; xor edx, edx; wrmsr
    let guest = Guest::new()
        .raw(&[0xb9])
        .raw(&MSR_KVM_SYSTEM_TIME_NEW.to_le_bytes())
        .raw(&[0xb8])
        .raw(&(TIME | 1).to_le_bytes())
        .raw(&[0x31, 0xd2, 0x0f, 0x30])
        .port(COM1);
    // For ever: mov al, [FLAGS]; out dx, al; jmp back
    let guest = guest
        .raw(&[0xa0])
        .raw(&FLAGS.to_le_bytes())
        .raw(&[0xee, 0xeb, 0xf8]);
    let kernel = guest.kernel();
    let console = Console::default();
    let machine = vmm::launch(config(kernel.path(), &console)).unwrap();
    console.wait_for(100);
    let stopped = |byte: &u8| byte & PVCLOCK_GUEST_STOPPED != 0;
    assert!(!console.bytes().iter().any(stopped), "told without a pause");
    machine.pause();
    settle(&console);
    let before = console.bytes().len();
    machine.resume();
    console.wait_for(before + 100);
    assert!(
        console.bytes()[before..].iter().any(stopped),
        "not told of the pause"
    );
}

#[test]
fn a_machine_counts_what_it_uses() {
    if no_kvm() {
        return;
    }
    // Writes to 4 MiB: mov edi, 16 MiB; mov ecx, 1 Mi; mov al, 1; rep stosd. Then prints for ever.
    let guest = Guest::new()
        .raw(&[0xbf, 0, 0, 0, 1, 0xb9, 0, 0, 0x10, 0, 0xb0, 1])
        .raw(&[0xfc, 0xf3, 0xab])
        .port(COM1)
        .raw(&[0xee, 0xeb, 0xfd]);
    let kernel = guest.kernel();
    let console = Console::default();
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let mut config = config(kernel.path(), &console);
    config.cpus = 2;
    config.disks = vec![vmm::DiskConfig {
        path: disk.path().to_owned(),
        read_only: true,
        serial: String::new(),
    }];
    config.vsock = Some(vmm::VsockConfig { cid: 3, uds: None });
    let machine = vmm::launch(config).unwrap();
    console.wait_for(1);
    machine.pause();
    let stats = machine.stats().unwrap();
    assert_eq!(stats.vcpus.len(), 2);
    assert_ne!(stats.vcpus[0].cpu_ns, 0);
    assert_eq!(stats.memory.size, 32 << 20);
    assert!(stats.memory.resident >= 4 << 20, "{:?}", stats.memory);
    assert!(stats.memory.resident <= 32 << 20, "{:?}", stats.memory);
    assert_eq!(stats.disks, [vmm::DiskStats::default()]);
    assert_eq!(stats.nets, []);
    assert_eq!(stats.vsock, Some(vmm::VsockStats::default()));
    machine.resume();
    console.wait_for(console.bytes().len() + 1000);
    let later = machine.stats().unwrap();
    assert!(later.vcpus[0].cpu_ns > stats.vcpus[0].cpu_ns);
    machine.stop();
    assert_eq!(machine.wait(), Outcome::Stopped);
}

/// Waits for the console's thread to hand over what was printed before the pause.
fn settle(console: &Console) {
    let start = Instant::now();
    let mut len = console.bytes().len();
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let now = console.bytes().len();
        if now == len {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "output does not end");
        len = now;
    }
}

#[test]
fn console_input_reaches_the_guest() {
    if no_kvm() {
        return;
    }
    // Waits for "data ready" in COM1's line status, echoes one byte, powers off.
    let guest = Guest::new()
        .port(COM1 + 5)
        .raw(&[0xec, 0xa8, 1, 0x74, 0xfb])
        .print_port(COM1)
        .power_off();
    let kernel = guest.kernel();
    let console = Console::default();
    let machine = vmm::launch(config(kernel.path(), &console)).unwrap();
    assert_eq!(machine.console_input(b"z"), 1);
    assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::PowerOff));
    drop(machine);
    assert_eq!(console.bytes(), b"z");
}

#[test]
fn the_power_button_is_pending_in_the_event_register() {
    if no_kvm() {
        return;
    }
    // Spins until the event register is not zero, prints it, powers off.
    let guest = Guest::new()
        .port(0x602)
        .raw(&[0xec, 0x84, 0xc0, 0x74, 0xfb])
        .print_al()
        .power_off();
    let kernel = guest.kernel();
    let console = Console::default();
    let machine = vmm::launch(config(kernel.path(), &console)).unwrap();
    machine.press_power_button().unwrap();
    assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::PowerOff));
    drop(machine);
    assert_eq!(console.bytes(), [1]);
}

#[test]
fn impossible_machines_are_refused_before_anything_runs() {
    if no_kvm() {
        return;
    }
    let kernel = Guest::new().spin().kernel();
    let refused = |change: fn(&mut MachineConfig)| {
        let mut config = config(kernel.path(), &Console::default());
        change(&mut config);
        vmm::launch(config).unwrap_err()
    };
    let error = refused(|c| c.cmdline = "x".repeat(4096));
    assert!(matches!(error, LaunchError::Cmdline(_)), "{error}");
    let error = refused(|c| c.memory = 1 << 50);
    assert!(matches!(error, LaunchError::Memory(_)), "{error}");
    let error = refused(|c| c.kernel = "/etc/hostname".into());
    assert!(matches!(error, LaunchError::Kernel(_)), "{error}");
    let error = refused(|c| c.initrd = Some(Initrd::Bytes(vec![0; 40 << 20])));
    assert!(matches!(error, LaunchError::Initrd(_)), "{error}");
    let error = refused(|c| {
        c.disks = vec![vmm::DiskConfig {
            path: "/nonexistent".into(),
            read_only: true,
            serial: String::new(),
        }]
    });
    assert!(matches!(error, LaunchError::Attach(_)), "{error}");
}

#[test]
fn as_many_cpus_as_kvm_recommends_can_be_had() {
    if no_kvm() {
        return;
    }
    for cpus in [2, 16] {
        let guest = Guest::new().out(COM1, b'x').power_off();
        if let Some(result) = run_with(guest, |config| config.cpus = cpus) {
            assert_eq!(result, (Outcome::PowerOff, b"x".to_vec()), "{cpus} CPUs");
        }
    }
}
