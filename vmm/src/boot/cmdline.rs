//! The kernel's command line: defaults for a machine without a PC's legacy, and placing it.

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::arch::layout;

/// What keeps a stock kernel from looking for hardware that this machine does not have, and what
/// makes a panic end the machine rather than hang it. Everything else is the caller's choice.
///
/// `reboot=k` resets through the keyboard controller's port, which needs no firmware; `panic=-1`
/// resets at once after a panic; the other options skip probes.
pub const DEFAULT: &str = "reboot=k panic=-1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd";

/// Kernel messages on the serial port.
pub const SERIAL_CONSOLE: &str = "console=ttyS0";

/// Why a command line cannot be given to the kernel.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// Longer than the kernel reads.
    #[error("the kernel command line of {len} bytes is longer than the {max} that Linux reads")]
    TooLong {
        /// Its length in bytes.
        len: usize,
        /// The longest possible.
        max: usize,
    },
    /// A NUL or a newline.
    #[error("the kernel command line holds the control character {0:#04x}")]
    Control(u8),
    /// No memory at its place.
    #[error("the kernel command line does not fit the guest's memory")]
    Memory,
}

/// Joins the parts that are not empty with spaces.
pub fn join<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let parts: Vec<_> = parts
        .into_iter()
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect();
    parts.join(" ")
}

/// Checks `cmdline` and writes it, with its NUL, to [`layout::CMDLINE_START`].
pub fn write(memory: &GuestMemoryMmap, cmdline: &str) -> Result<(), CmdlineError> {
    check(cmdline)?;
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::CMDLINE_START))
        .map_err(|_| CmdlineError::Memory)
}

/// Whether the kernel can be given `cmdline`.
pub fn check(cmdline: &str) -> Result<(), CmdlineError> {
    let max = layout::CMDLINE_MAX - 1;
    let len = cmdline.len();
    if len > max {
        return Err(CmdlineError::TooLong { len, max });
    }
    match cmdline.bytes().find(u8::is_ascii_control) {
        Some(control) => Err(CmdlineError::Control(control)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_joined_by_single_spaces() {
        assert_eq!(join(["a", "", " b=1 ", "c"]), "a b=1 c");
        assert_eq!(join([]), "");
    }

    #[test]
    fn a_line_of_the_longest_length_is_taken_and_one_more_byte_is_not() {
        assert_eq!(check(&"x".repeat(2047)), Ok(()));
        assert_eq!(
            check(&"x".repeat(2048)),
            Err(CmdlineError::TooLong {
                len: 2048,
                max: 2047
            })
        );
    }

    #[test]
    fn control_characters_are_refused() {
        assert_eq!(check("quiet\0init=/x"), Err(CmdlineError::Control(0)));
        assert_eq!(check("quiet\n"), Err(CmdlineError::Control(b'\n')));
    }

    #[test]
    fn the_line_ends_with_a_nul_in_memory() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let at = GuestAddress(layout::CMDLINE_START);
        memory.write_slice(&[0xff; 64], at).unwrap();
        write(&memory, "quiet").unwrap();
        let mut bytes = [0; 7];
        memory.read_slice(&mut bytes, at).unwrap();
        assert_eq!(&bytes, b"quiet\0\xff");
    }
}
