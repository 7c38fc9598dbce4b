//! Pseudo-terminals: pty(7) and ioctl_tty(2).

use std::io;
use std::os::fd::OwnedFd;

use agent::protocol::WindowSize;
use rustix::fs::{Gid, OFlags, Uid, fchown};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{LocalModes, SpecialCodeIndex, Winsize, tcgetattr, tcsetwinsize};

use crate::tree::Tree;

/// Both sides of a new terminal.
#[derive(Debug)]
pub struct Terminal {
    /// The agent's side, non-blocking.
    pub master: OwnedFd,
    /// The command's side.
    pub slave: OwnedFd,
}

/// Makes a terminal of the devpts beside the tree's own /dev/ptmx, so that its name there is right, for user `uid`.
pub fn open(tree: &Tree, size: WindowSize, uid: u32) -> io::Result<Terminal> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
    let master = tree.open("dev/ptmx", flags)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )?;
    // The group (tty) and the mode are what devpts was mounted with.
    fchown(&slave, Some(Uid::from_raw(uid)), None::<Gid>)?;
    resize(&master, size)?;
    Ok(Terminal { master, slave })
}

/// Sets the size; the kernel tells the foreground process group with SIGWINCH.
pub fn resize(master: &OwnedFd, size: WindowSize) -> io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(tcsetwinsize(master, size)?)
}

/// The character that means end of file (Ctrl-D), where the terminal is in a mode that has one.
pub fn end_of_file_character(master: &OwnedFd) -> io::Result<Option<u8>> {
    let attributes = tcgetattr(master)?;
    let canonical = attributes.local_modes.contains(LocalModes::ICANON);
    Ok(canonical.then(|| attributes.special_codes[SpecialCodeIndex::VEOF]))
}

/// Signals the terminal's foreground process group; false where it has none.
pub fn signal_foreground(master: &OwnedFd, signal: i32) -> bool {
    match rustix::termios::tcgetpgrp(master) {
        // SAFETY: kill(2) takes no memory. The kernel has just named the group as this terminal's.
        Ok(group) => unsafe { libc::kill(-group.as_raw_pid(), signal) == 0 },
        Err(_) => false,
    }
}
