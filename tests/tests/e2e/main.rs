//! End to end: what a user types, and what comes of it. A file a topic.

mod accel;
mod background;
mod bad_forwards;
mod bad_input;
mod clock;
mod control;
mod copy;
mod disks;
mod doctor;
mod exec;
mod folders;
mod guest_failures;
mod kernels;
mod logs;
mod net;
mod ports;
mod rootfs;
mod run;
mod screen;
mod signals;
mod sizes;
mod ssh;
mod streams;
mod stress;
mod terminal;
mod vsock_uds;
