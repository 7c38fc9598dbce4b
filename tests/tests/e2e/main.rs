//! End to end: what a user types, and what comes of it. A file a topic.

mod accel;
mod bad_input;
mod disks;
mod doctor;
mod guest_failures;
mod kernels;
mod net;
mod rootfs;
mod run;
mod signals;
mod sizes;
mod streams;
mod terminal;
