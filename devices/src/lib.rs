//! The devices of a machine: what a guest driver can see and reach, and nothing of KVM.
//!
//! A device is given guest memory, an [`interrupt::Interrupt`] that is an eventfd and some
//! registers, and host resources that were opened for it. It never opens a hypervisor handle and
//! never depends on the `vmm` crate; `vmm` joins the eventfds to KVM.
//!
//! The guest is hostile: no value that it writes into a register, a ring or a buffer may make a
//! device panic, spin, or touch memory outside of [`vm_memory::GuestMemoryMmap`].

pub mod bus;
mod counter;
pub mod interrupt;
pub mod power;
pub mod serial;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vhost_user;
pub mod virtio;
pub mod worker;
