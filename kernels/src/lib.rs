//! Kernels for machines: where they come from, what they can do, and how they are unpacked.
//!
//! A kernel of the [`cache::Cache`] is a directory named by version and digest that holds an
//! uncompressed `vmlinux`, its configuration and, for a packaged kernel, its modules. It gets
//! there by [`fetch`] (a distribution's package), [`build`] (a distribution's kernel source and
//! the configuration kept in `config/`) or [`add`] (a file of the user's). [`select`] answers
//! which kernel a run boots, [`image::bootable`] turns any kernel file into an ELF that can be
//! mapped, [`check`] says what a kernel lacks for a purpose.
//!
//! Kernel files, packages and archives are not trusted: whatever is read from them is bounded
//! and checked before use.

pub mod add;
pub mod archive;
pub mod build;
pub mod busybox;
pub mod bzimage;
pub mod cache;
pub mod check;
pub mod config;
pub mod deb;
pub mod elf;
pub mod fetch;
pub mod image;
pub mod modules;
pub mod package;
pub mod payload;
pub mod progress;
pub mod select;
pub mod version;
