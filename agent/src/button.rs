//! The power button: an input device that reports KEY_POWER (the kernel's Documentation/input).

use std::fs::{self, File};
use std::io::{self, Read};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::power;
use crate::serve::Machine;

/// What commands have between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(5);

/// `struct input_event` of linux/input.h on 64-bit machines: two i64, type u16, code u16, value i32.
const EVENT_SIZE: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Starts a thread for each input device; a machine without any (or without evdev) has no button.
pub fn start(machine: &Arc<Machine>) -> io::Result<()> {
    let entries = match fs::read_dir("/dev/input") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().starts_with(b"event") {
            continue;
        }
        let device = File::open(entry.path())?;
        let machine = Arc::clone(machine);
        let watch = move || {
            // A device that fails has been taken away, and its button with it.
            if let Ok(()) = wait_for_press(device) {
                power::off(&machine, GRACE);
            }
        };
        thread::Builder::new()
            .name("button".to_owned())
            .stack_size(64 << 10)
            .spawn(watch)?;
    }
    Ok(())
}

fn wait_for_press(mut device: impl Read) -> io::Result<()> {
    let mut event = [0; EVENT_SIZE];
    loop {
        device.read_exact(&mut event)?;
        if is_press(&event) {
            return Ok(());
        }
    }
}

fn is_press(event: &[u8; EVENT_SIZE]) -> bool {
    let [.., t0, t1, c0, c1, v0, v1, v2, v3] = *event;
    u16::from_ne_bytes([t0, t1]) == EV_KEY
        && u16::from_ne_bytes([c0, c1]) == KEY_POWER
        && i32::from_ne_bytes([v0, v1, v2, v3]) == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        let time = [0u8; 16];
        [
            &time[..],
            &kind.to_ne_bytes(),
            &code.to_ne_bytes(),
            &value.to_ne_bytes(),
        ]
        .concat()
    }

    #[test]
    fn only_the_press_of_the_power_key_counts() {
        let others = [event(0, 0, 0), event(1, 30, 1), event(1, 116, 0)].concat();
        assert!(
            wait_for_press(others.as_slice()).is_err(),
            "some other event counted as the press"
        );
        let pressed = [others, event(1, 116, 1)].concat();
        wait_for_press(pressed.as_slice()).unwrap();
    }
}
