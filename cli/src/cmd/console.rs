//! The keyboard's way to a machine's serial console.

use std::io::{self, Read};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};
use std::thread;

use anyhow::{Context, Result};
use signal_hook::consts::SIGINT;
use vmm::Machine;

use crate::event::Event;
use crate::terminal;

/// Ctrl-A: the next key is for mvm, as with QEMU.
const ESCAPE: u8 = 0x01;

/// Copies standard input to the console of `machine`, in a thread of its own.
///
/// On a terminal, Ctrl-A x ends the machine and Ctrl-A Ctrl-A sends Ctrl-A.
pub fn feed(machine: &Arc<Machine>, events: &Sender<Event>) -> Result<()> {
    let machine = Arc::downgrade(machine);
    let events = events.clone();
    let keyboard = terminal::stdin_is_terminal();
    if keyboard {
        eprint!("mvm: this is the guest's console; Ctrl-A x ends the machine\r\n");
    }
    thread::Builder::new()
        .name("input".into())
        .spawn(move || {
            if let Err(error) = copy(&machine, &events, keyboard) {
                tracing::debug!("no more input for the console: {error}");
            }
        })
        .context("no thread for the console's input")?;
    Ok(())
}

fn copy(machine: &Weak<Machine>, events: &Sender<Event>, keyboard: bool) -> io::Result<()> {
    let mut buffer = [0u8; 4096];
    let mut escaped = false;
    loop {
        let len = io::stdin().lock().read(&mut buffer)?;
        if len == 0 {
            return Ok(());
        }
        let mut input = Vec::with_capacity(len);
        for &byte in &buffer[..len] {
            match (keyboard, escaped, byte) {
                (true, true, b'x') => {
                    let _ = events.send(Event::Signal(SIGINT));
                    return Ok(());
                }
                (true, false, ESCAPE) => escaped = true,
                _ => {
                    escaped = false;
                    input.push(byte);
                }
            }
        }
        give(machine, &input)?;
    }
}

/// Gives all of `input` to the serial port, waiting while its FIFO is full.
fn give(machine: &Weak<Machine>, mut input: &[u8]) -> io::Result<()> {
    while !input.is_empty() {
        let Some(machine) = machine.upgrade() else {
            return Ok(());
        };
        let taken = machine.console_input(input);
        input = &input[taken..];
        if input.is_empty() {
            break;
        }
        let Some(room) = machine.console_room() else {
            return Ok(());
        };
        let room = room.try_clone()?;
        // Not held while waiting: the guest may never read, and the machine has to be droppable.
        drop(machine);
        room.read()?;
    }
    Ok(())
}
