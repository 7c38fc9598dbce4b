//! Power off, reset and the power button, as hardware-reduced ACPI has them (ACPI 6.5, section 4.8.3.7)
//! with a Generic Event Device for the button, and the keyboard controller's reset line.
//!
//! The vmm's ACPI tables point at these registers; the constants are the contract between the two.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::Sender;

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Byte register: the FADT's SLEEP_CONTROL_REG.
pub const SLEEP_CONTROL: u64 = 0;
/// Byte register: the FADT's SLEEP_STATUS_REG.
pub const SLEEP_STATUS: u64 = 1;
/// Byte register: pending [`GED_POWER_BUTTON`] events; reading clears them.
pub const GED_EVENT: u64 = 2;
/// Byte register: the FADT's RESET_REG; takes [`RESET_VALUE`].
pub const RESET: u64 = 3;
/// How many bytes of registers there are.
pub const POWER_LEN: u64 = 4;

/// The FADT's RESET_VALUE.
pub const RESET_VALUE: u8 = 1;
/// The SLP_TYP value that the DSDT's `_S5` object names.
pub const SLP_TYP_S5: u8 = 5;
/// The bit of [`GED_EVENT`] that stands for the power button.
pub const GED_POWER_BUTTON: u8 = 1 << 0;

const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u8 = 2;
const SLEEP_BITS: u8 = SLP_EN | 0x7 << SLP_TYP_SHIFT;
const ENTER_S5: u8 = SLP_EN | SLP_TYP_S5 << SLP_TYP_SHIFT;

/// The first port of the keyboard controller.
pub const I8042_PORT: u64 = 0x60;
/// How many ports it takes, data (0x60) to command (0x64).
pub const I8042_LEN: u64 = 5;

const I8042_COMMAND: u64 = 4;
const I8042_PULSE_RESET: u8 = 0xfe;

/// What the guest asked of its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerEvent {
    /// Power off: the machine ends.
    Off,
    /// Reset: the machine starts again, or ends where it cannot.
    Reset,
}

/// Tells the machine's owner of the first event; a guest that repeats itself adds nothing.
struct Announcer {
    events: Sender<PowerEvent>,
    told: AtomicBool,
}

impl Announcer {
    fn new(events: Sender<PowerEvent>) -> Self {
        Self {
            events,
            told: AtomicBool::new(false),
        }
    }

    fn tell(&self, event: PowerEvent) {
        if !self.told.swap(true, Ordering::Relaxed) {
            // Fails when the receiver is gone: the machine is ending already.
            let _ = self.events.send(event);
        }
    }
}

/// The ACPI power registers.
pub struct Power {
    ged_irq: EventFd,
    pending: AtomicU8,
    announcer: Announcer,
}

impl fmt::Debug for Power {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Power")
            .field("pending", &self.pending)
            .finish_non_exhaustive()
    }
}

impl Power {
    /// Registers that raise the GED's (edge) interrupt through `ged_irq` and announce the first
    /// power off or reset on `events`.
    pub fn new(ged_irq: EventFd, events: Sender<PowerEvent>) -> Self {
        Self {
            ged_irq,
            pending: AtomicU8::new(0),
            announcer: Announcer::new(events),
        }
    }

    /// Presses the power button: a guest that listens shuts down in an orderly way.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.pending.fetch_or(GED_POWER_BUTTON, Ordering::AcqRel);
        self.ged_irq.write(1)
    }
}

impl BusDevice for Power {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The sleep registers read as zero: no sleep state is left, and WAK_STS is never set.
        if let (GED_EVENT, [byte]) = (offset, data) {
            *byte = self.pending.swap(0, Ordering::AcqRel);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match offset {
            SLEEP_CONTROL if value & SLEEP_BITS == ENTER_S5 => self.announcer.tell(PowerEvent::Off),
            RESET if value == RESET_VALUE => self.announcer.tell(PowerEvent::Reset),
            _ => {}
        }
    }
}

/// The part of a PC's keyboard controller that resets the machine (`reboot=k`).
///
/// There is no keyboard: all ports read as zero, so that a driver finds the controller idle.
pub struct I8042 {
    announcer: Announcer,
}

impl fmt::Debug for I8042 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("I8042").finish_non_exhaustive()
    }
}

impl I8042 {
    /// A controller that announces a reset on `events`. Put it on the port bus at [`I8042_PORT`].
    pub fn new(events: Sender<PowerEvent>) -> Self {
        Self {
            announcer: Announcer::new(events),
        }
    }
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, offset: u64, data: &[u8]) {
        if (offset, data) == (I8042_COMMAND, &[I8042_PULSE_RESET]) {
            self.announcer.tell(PowerEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{self, Receiver};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn power() -> (Power, EventFd, Receiver<PowerEvent>) {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let (sender, receiver) = mpsc::channel();
        (Power::new(irq.try_clone().unwrap(), sender), irq, receiver)
    }

    #[test]
    fn entering_s5_powers_off_once() {
        let (power, _, events) = power();
        for _ in 0..1000 {
            power.write(SLEEP_CONTROL, &[SLP_TYP_S5 << 2 | SLP_EN]);
        }
        drop(power);
        assert_eq!(events.iter().collect::<Vec<_>>(), [PowerEvent::Off]);
    }

    #[test]
    fn other_sleep_states_and_writes_without_slp_en_do_nothing() {
        let (power, _, events) = power();
        for typ in (0..8).filter(|typ| *typ != SLP_TYP_S5) {
            power.write(SLEEP_CONTROL, &[typ << 2 | SLP_EN]);
        }
        power.write(SLEEP_CONTROL, &[SLP_TYP_S5 << 2]);
        power.write(RESET, &[0]);
        power.write(SLEEP_STATUS, &[0xff]);
        power.write(SLEEP_CONTROL, &[]);
        power.write(RESET, &[RESET_VALUE, 0]);
        power.write(u64::MAX, &[RESET_VALUE]);
        drop(power);
        assert_eq!(events.iter().next(), None);
    }

    #[test]
    fn the_reset_register_resets() {
        let (power, _, events) = power();
        power.write(RESET, &[RESET_VALUE]);
        assert_eq!(events.try_recv(), Ok(PowerEvent::Reset));
    }

    #[test]
    fn the_power_button_is_pending_until_it_is_read() {
        let (power, irq, _events) = power();
        let read = || {
            let mut byte = [0];
            power.read(GED_EVENT, &mut byte);
            byte[0]
        };
        assert_eq!(read(), 0);
        power.press_power_button().unwrap();
        assert_eq!(irq.read().unwrap(), 1);
        assert_eq!(read(), GED_POWER_BUTTON);
        assert_eq!(read(), 0, "reading clears it");
    }

    #[test]
    fn the_keyboard_controller_resets_on_its_one_command() {
        let (sender, events) = mpsc::channel();
        let i8042 = I8042::new(sender);
        i8042.write(0, &[I8042_PULSE_RESET]);
        i8042.write(I8042_COMMAND, &[0xff]);
        i8042.write(I8042_COMMAND, &[I8042_PULSE_RESET, 0]);
        assert!(events.try_recv().is_err());
        i8042.write(I8042_COMMAND, &[I8042_PULSE_RESET]);
        assert_eq!(events.try_recv(), Ok(PowerEvent::Reset));
    }
}
