//! Getting a kernel into guest memory and telling it what the machine is.

pub mod cmdline;
mod elf;
pub mod initramfs;
pub mod initrd;
pub mod kernel;
pub mod params;
#[cfg(test)]
mod tests;
