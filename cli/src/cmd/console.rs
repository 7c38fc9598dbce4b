//! The keyboard's way to a machine's serial console.

use std::io::{self, Read};
use std::sync::mpsc::Sender;
use std::thread;

use anyhow::{Context, Result};
use signal_hook::consts::SIGINT;

use crate::event::Event;
use crate::instance::Keyboard;
use crate::terminal;

/// Ctrl-A: the next key is for mvm, as with QEMU.
const ESCAPE: u8 = 0x01;

/// Copies standard input to the console of `machine`, in a thread of its own.
///
/// On a terminal, Ctrl-A x ends the machine and Ctrl-A Ctrl-A sends Ctrl-A.
pub fn feed(mut machine: Keyboard, events: &Sender<Event>) -> Result<()> {
    let events = events.clone();
    let keyboard = terminal::stdin_is_terminal();
    if keyboard {
        eprint!("mvm: this is the guest's console; Ctrl-A x ends the machine\r\n");
    }
    thread::Builder::new()
        .name("input".into())
        .spawn(move || {
            if let Err(error) = copy(&mut machine, &events, keyboard) {
                tracing::debug!("no more input for the console: {error}");
            }
        })
        .context("no thread for the console's input")?;
    Ok(())
}

fn copy(machine: &mut Keyboard, events: &Sender<Event>, keyboard: bool) -> io::Result<()> {
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
        machine.give(&input)?;
    }
}
